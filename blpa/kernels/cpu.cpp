// The functions of any_layout.py for CPUs; cpu.py compiles this file and calls it. any_layout.py is the specification,
// and has the formulas. Codes and decoded values equal its own to the bit, so operations keep its order, and the compiler
// must not fuse a product and a sum. Batch norms have the bits of PyTorch's own, which are fused, where a CPU can.
//
// A tensor is a sequence of lines, in the order of memory. With the channels last a line is one pixel: C elements, each
// with parameters of its own. Else it is one channel of one sample: elements with the same parameters. A thread takes a
// line in pieces whose intermediate results stay in the first-level cache; one loop does one thing, and is vectorised.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#define NOINLINE __attribute__((noinline))  // else every function has the code for every dtype

namespace {

constexpr int64_t PIECE = 1024;           // elements
constexpr int64_t CHUNK = 1 << 15;        // elements that are worth a thread
constexpr int64_t MOST_CHUNKS = 64;       // of a sum

// Slabs of bytes follow one another, and so do those of elements: byte j of a slab has the codes of its elements
// j + k slab_bytes, k = 0, 1, ... as far as the slab goes.
struct Layout {
  int64_t bits, channels;
  int64_t lines, length;                  // of bytes
  int64_t lines_per_slab, slab_bytes, slab_elements;
  int64_t lines_per_outer, outer_step;    // the k-th element of line l is of sample l / lines_per_outer + k outer_step
  int64_t outer, per_element;             // whether each element of a line has parameters of its own

  int64_t codes() const { return bits ? 8 / bits : 1; }
  int64_t elements() const { return lines / lines_per_slab * slab_elements; }
};

struct Piece {
  int64_t line, first, size;              // bytes of a line
  int64_t byte, channel;                  // of the first
};

struct Block {                            // the k-th elements of a piece; size may be 0 or less
  int64_t position, size, outer;
};

Block block_of(const Layout& layout, const Piece& piece, int64_t k) {
  const int64_t slab = piece.line / layout.lines_per_slab;
  const int64_t j = piece.line % layout.lines_per_slab * layout.length + piece.first + k * layout.slab_bytes;
  return {slab * layout.slab_elements + j, std::min(piece.size, layout.slab_elements - j),
          piece.line / layout.lines_per_outer + k * layout.outer_step};
}

template <class F>
void for_pieces(const Layout& layout, int64_t begin, int64_t end, const F& f) {
  for (int64_t line = begin; line < end; ++line)
    for (int64_t first = 0; first < layout.length; first += PIECE)
      f(Piece{line, first, std::min(PIECE, layout.length - first), line * layout.length + first,
              layout.per_element ? first : line % layout.channels});
}

template <class F>
void parallel(int64_t count, int64_t elements, int threads, const F& f) {
  if (elements < CHUNK || count < 2) threads = 1;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; ++i) f(i);
}

// Each piece on any thread.
template <class F>
void parallel_pieces(const Layout& layout, int threads, const F& f) {
  const int64_t step = std::max<int64_t>(1, CHUNK / 2 / layout.length);
  parallel((layout.lines + step - 1) / step, layout.elements(), threads, [&](int64_t i) {
    for_pieces(layout, i * step, std::min(layout.lines, (i + 1) * step), f);
  });
}

// ---- tensors of any dtype

enum class BFloat16 : uint16_t {};

#ifdef __FLT16_MAX__
using Half = _Float16;
constexpr int HAS_HALF = 1;
#else
using Half = BFloat16;                    // cpu.py does not pass any
constexpr int HAS_HALF = 0;
#endif

struct Array {
  void* data;
  int64_t dtype;                          // as numbered in cpu.py
};

template <class F>
void with_type(const Array& array, const F& f) {
  switch (array.dtype) {
    case 0: f(static_cast<float*>(array.data)); break;
    case 1: f(static_cast<double*>(array.data)); break;
    case 2: f(static_cast<BFloat16*>(array.data)); break;
    default: f(static_cast<Half*>(array.data));
  }
}

template <class To, class From>
To cast(From value) {
  if constexpr (std::is_same_v<From, BFloat16>) {
    const uint32_t bits = uint32_t(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return To(wide);
  } else if constexpr (std::is_same_v<To, BFloat16>) {  // to the nearest, ties to even
    const float wide = float(value);
    uint32_t bits;
    std::memcpy(&bits, &wide, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return BFloat16(wide != wide ? 0x7fc0u : rounded);
  } else {
    return To(value);
  }
}

template <class From, class To>
void convert(const From* from, int64_t size, To* to) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) to[i] = cast<To>(from[i]);
}

// Elements in the compute dtype: the array itself, where it has that, else the buffer.
template <class T>
NOINLINE const T* load(const Array& array, const Block& block, T* buffer) {
  const T* result = buffer;
  with_type(array, [&](auto* data) {
    if constexpr (std::is_same_v<decltype(data), T*>)
      result = data + block.position;
    else
      convert(data + block.position, block.size, buffer);
  });
  return result;
}

// Where to write elements in the compute dtype, before `store`.
template <class T>
T* target(const Array& array, const Block& block, T* buffer) {
  const bool is_same = array.dtype == (sizeof(T) == 8);
  return is_same ? static_cast<T*>(array.data) + block.position : buffer;
}

template <class T>
NOINLINE void store(const Array& array, const Block& block, const T* values) {
  with_type(array, [&](auto* data) {
    if constexpr (!std::is_same_v<decltype(data), T*>) convert(values, block.size, data + block.position);
  });
}

// ---- parameters

// Of a piece: one for each element, or one for all.
template <class T, bool per_element>
struct Parameter {
  const T* values;
  T value;
  explicit Parameter(const T* values) : values(values), value(*values) {}
  T operator[](int64_t i) const { return per_element ? values[i] : value; }
};

// [outer or 1, C or 1].
template <class T>
struct Rows {
  const T* data;
  int64_t row_step, channel_step;
  const T* at(int64_t outer, int64_t channel) const { return data + outer * row_step + channel * channel_step; }
};

template <class T>
struct Vectors {
  const T *frac, *zero, *width, *mean, *gamma, *beta, *floor;
  Vectors(const T* data, int64_t c)
      : frac(data), zero(data + c), width(data + 2 * c), mean(data + 3 * c), gamma(data + 4 * c), beta(data + 5 * c),
        floor(data + 6 * c) {}
};

// Arguments of a call; cpu.py has the same. What a function does not have is null.
struct Call {
  const Layout* layout;
  int64_t threads, is_double;
  Array x, y, out;                        // in the backward pass x is the gradient
  uint8_t* values;
  const void* vectors;
  const void *centre, *scale, *centre_z;  // [outer or 1, C or 1]; in the backward pass centres are means
  int64_t centre_step, scale_step;        // from row to row; 0 if there is one row
  int64_t by_channel;                     // whether they have C columns
  int64_t function;
  double slope;                           // of leaky ReLU
  const void* table;                      // [C, L] of f, or of its derivative
  int64_t per_sample, rectified;

  template <class T>
  Rows<T> rows(const void* data, int64_t step, const T& otherwise) const {
    return {data ? static_cast<const T*>(data) : &otherwise, step, by_channel};
  }
  template <class T>
  Vectors<T> all() const {
    return {static_cast<const T*>(vectors), layout->channels};
  }
};

// ---- encode

template <class T, bool V, bool W>
struct Encoding {
  Parameter<T, V> unit, frac, zero, mean;  // unit: bins per unit
  Parameter<T, W> centre, scale;
  T levels;
};

template <class T, bool V, bool W>
void add_codes(Encoding<T, V, W> of, const T* x, const T* y, int64_t size, int shift, int32_t* codes) {
  const T half = of.levels / 2;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const T z = (x[i] - of.centre[i]) * of.scale[i];
    const T bin = std::floor((z - of.mean[i]) * of.unit[i] + of.frac[i]) + half;
    const T zero = of.zero[i], sign = y[i];
    const T lowest = sign <= 0 ? T(0) : zero;
    const T highest = (sign <= 0 ? T(0) : of.levels - zero) + (zero - 1);
    T code = bin < lowest ? lowest : bin;
    code = code > highest ? highest : code;
    code = code == code ? code : T(0);  // a NaN
    codes[i] += int32_t(code) << shift;
  }
}

// Bins per unit of each channel; NaN, and so code 0, also where the grid has no zero.
template <class T>
std::vector<T> units_of(const Layout& layout, const Vectors<T>& all) {
  std::vector<T> units(layout.channels);
  for (int64_t c = 0; c < layout.channels; ++c) units[c] = all.zero[c] == all.zero[c] ? 1 / all.width[c] : all.zero[c];
  return units;
}

template <class T, bool V, bool W>
void encode(const Call& call) {
  const Layout& layout = *call.layout;
  const Vectors<T> all = call.all<T>();
  const T zero = 0, one = 1;
  const Rows<T> centre = call.rows(call.centre, call.centre_step, zero);
  const Rows<T> scale = call.rows(call.scale, call.scale_step, one);
  const std::vector<T> units = units_of(layout, all);
  parallel_pieces(layout, call.threads, [&](const Piece& piece) {
    const int64_t c = piece.channel;
    int32_t codes[PIECE];
    std::fill(codes, codes + piece.size, 0);
    T x_buffer[PIECE], y_buffer[PIECE];
    for (int64_t k = 0; k < layout.codes(); ++k) {
      const Block block = block_of(layout, piece, k);
      if (block.size <= 0) break;
      const T* xs = load(call.x, block, x_buffer);
      const T* ys = call.x.data == call.y.data ? xs : load(call.y, block, y_buffer);
      const Encoding<T, V, W> of{Parameter<T, V>(&units[c]), Parameter<T, V>(all.frac + c),
                                 Parameter<T, V>(all.zero + c), Parameter<T, V>(all.mean + c),
                                 Parameter<T, W>(centre.at(block.outer, c)), Parameter<T, W>(scale.at(block.outer, c)),
                                 T(1 << layout.bits)};
      add_codes<T, V, W>(of, xs, ys, block.size, int(k * layout.bits), codes);
    }
    convert(codes, piece.size, call.values + piece.byte);
  });
}

// ---- batch norm

template <class T>
T product_and_sum(T a, T b, T c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

template <class T>
void relu(T* y, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const T value = y[i];
    y[i] = value < 0 ? T(0) : value;
  }
}

// Round to the dtype of an array.
template <class T>
NOINLINE void round_as(const Array& array, int64_t size, T* values) {
  with_type(array, [&](auto* data) {
    using To = std::remove_pointer_t<decltype(data)>;
    if constexpr (!std::is_same_v<To, T>) {
      To rounded[PIECE];
      convert(values, size, rounded);
      convert(rounded, size, values);
    }
  });
}

template <class T, bool V, bool W>
void normalise_encode(const Call& call) {
  const Layout& layout = *call.layout;
  const Vectors<T> all = call.all<T>();
  const T *mean = static_cast<const T*>(call.centre), *rstd = static_cast<const T*>(call.scale);
  const std::vector<T> units = units_of(layout, all);
  std::vector<T> slopes(layout.channels), shifts(layout.channels);
  for (int64_t c = 0; c < layout.channels; ++c) {
    slopes[c] = rstd[c] * all.gamma[c];
    shifts[c] = product_and_sum(-mean[c], slopes[c], all.beta[c]);
  }
  parallel_pieces(layout, call.threads, [&](const Piece& piece) {
    const int64_t c = piece.channel;
    const Parameter<T, V> slope(&slopes[c]), shift(&shifts[c]);
    const Encoding<T, V, V> of{Parameter<T, V>(&units[c]), Parameter<T, V>(all.frac + c),
                               Parameter<T, V>(all.zero + c), Parameter<T, V>(all.mean + c),
                               Parameter<T, V>(mean + c), Parameter<T, V>(rstd + c), T(1 << layout.bits)};
    int32_t codes[PIECE];
    std::fill(codes, codes + piece.size, 0);
    T buffer[PIECE], y[PIECE];
    for (int64_t k = 0; k < layout.codes(); ++k) {
      const Block block = block_of(layout, piece, k);
      if (block.size <= 0) break;
      const T* xs = load(call.x, block, buffer);
#pragma omp simd
      for (int64_t i = 0; i < block.size; ++i) y[i] = product_and_sum(xs[i], slope[i], shift[i]);
      round_as(call.out, block.size, y);
      add_codes<T, V, V>(of, xs, y, block.size, int(k * layout.bits), codes);
      if (call.rectified) relu(y, block.size);
      T* out = target(call.out, block, buffer);  // may be where x is
      std::copy(y, y + block.size, out);
      store(call.out, block, out);
    }
    convert(codes, piece.size, call.values + piece.byte);
  });
}

// ---- decode

template <class T, bool V>
void z_of(const Layout& layout, const Vectors<T>& all, const uint8_t* bytes, int64_t c, int64_t k, int64_t size, T* z) {
  const Parameter<T, V> frac(all.frac + c), width(all.width + c), mean(all.mean + c);
  const T middle = T(0.5) - T(1 << layout.bits) / 2;
  const int shift = int(k * layout.bits), mask = (1 << layout.bits) - 1;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) z[i] = (T((bytes[i] >> shift) & mask) + middle - frac[i]) * width[i] + mean[i];
}

template <class T, bool V>
void y_of(const Layout& layout, const Vectors<T>& all, const uint8_t* bytes, int64_t c, int64_t k, int64_t size, T* y) {
  const Parameter<T, V> frac(all.frac + c), width(all.width + c), mean(all.mean + c), zero(all.zero + c);
  const Parameter<T, V> gamma(all.gamma + c), beta(all.beta + c), floor(all.floor + c);
  const T middle = T(0.5) - T(1 << layout.bits) / 2, tiny = std::numeric_limits<T>::min();
  const int shift = int(k * layout.bits), mask = (1 << layout.bits) - 1;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const T code = T((bytes[i] >> shift) & mask);
    const T sign = code - (zero[i] - T(0.5));
    const T value = ((code + middle - frac[i]) * width[i] + mean[i]) * gamma[i] + beta[i];
    const T positive = sign <= 0 ? T(0) : (value < tiny ? tiny : value);
    const T negative = sign >= 0 ? T(0) : (value > 0 ? T(0) : value);
    const T sum = positive + negative;
    y[i] = sum < floor[i] ? floor[i] : sum;
  }
}

enum Function { IDENTITY, RELU, LEAKY_RELU, TABLE };

// The entries of a table for the codes of a piece.
template <class T>
void look_up(const Layout& layout, const T* table, const uint8_t* bytes, int64_t c, int64_t k, int64_t size, T* found) {
  const int shift = int(k * layout.bits), mask = (1 << layout.bits) - 1;
  const int64_t step = layout.per_element ? mask + 1 : 0;
  table += c * (mask + 1);
  for (int64_t i = 0; i < size; ++i) found[i] = table[i * step + ((bytes[i] >> shift) & mask)];
}

template <class T>
void relu_grad(const T* da, const T* y, int64_t size, T* dy) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const T value = da[i];
    dy[i] = y[i] <= 0 ? T(0) : value;
  }
}

// y itself, or a gradient, times the slope where y is negative.
template <class T>
void leaky_relu(const T* from, const T* y, T slope, int64_t size, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const T value = from[i], product = value * slope;
    out[i] = y[i] > 0 ? value : product;
  }
}

template <class T>
void multiply(const T* da, const T* derivative, int64_t size, T* dy) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const T product = da[i] * derivative[i];
    dy[i] = derivative[i] == 0 ? T(0) : product;
  }
}

// Of each channel a number that is less than the codes of positive y; y is NaN for all codes or for none.
template <class T>
std::vector<T> edges_of(const Layout& layout, const Vectors<T>& all) {
  std::vector<T> edges(layout.channels);
  for (int64_t c = 0; c < layout.channels; ++c) {
    const T y = (all.width[c] - all.frac[c] * all.width[c] + all.mean[c]) * all.gamma[c] + all.beta[c];
    edges[c] = y == y ? all.zero[c] - T(0.5) : -std::numeric_limits<T>::infinity();
  }
  return edges;
}

// dY of a piece, from it or, where a batch norm was rectified, from dA.
template <class T, bool V>
const T* load_dy(const Call& call, const std::vector<T>& edges, const Piece& piece, int64_t k, const Block& block,
                 T* buffer) {
  const T* da = load(call.x, block, buffer);
  if (!call.rectified) return da;
  const Parameter<T, V> edge(&edges[piece.channel]);
  const uint8_t* bytes = call.values + piece.byte;
  const int shift = int(k * call.layout->bits), mask = (1 << call.layout->bits) - 1;
#pragma omp simd
  for (int64_t i = 0; i < block.size; ++i) {
    const T value = da[i];
    buffer[i] = T((bytes[i] >> shift) & mask) <= edge[i] ? T(0) : value;
  }
  return buffer;
}

template <class T, bool V>
void decode(const Call& call) {
  const Layout& layout = *call.layout;
  const Vectors<T> all = call.all<T>();
  const T slope = T(call.slope);
  parallel_pieces(layout, call.threads, [&](const Piece& piece) {
    T buffer[PIECE];
    for (int64_t k = 0; k < layout.codes(); ++k) {
      const Block block = block_of(layout, piece, k);
      if (block.size <= 0) break;
      T* y = target(call.out, block, buffer);
      if (call.function == TABLE)
        look_up(layout, static_cast<const T*>(call.table), call.values + piece.byte, piece.channel, k, block.size, y);
      else
        y_of<T, V>(layout, all, call.values + piece.byte, piece.channel, k, block.size, y);
      if (call.function == RELU) relu(y, block.size);
      if (call.function == LEAKY_RELU) leaky_relu(y, y, slope, block.size, y);
      store(call.out, block, y);
    }
  });
}

template <class T, bool V>
void elementwise_grad(const Call& call) {
  const Layout& layout = *call.layout;
  const Vectors<T> all = call.all<T>();
  const T slope = T(call.slope);
  parallel_pieces(layout, call.threads, [&](const Piece& piece) {
    T buffer[PIECE], y[PIECE], out_buffer[PIECE];
    for (int64_t k = 0; k < layout.codes(); ++k) {
      const Block block = block_of(layout, piece, k);
      if (block.size <= 0) break;
      const T* da = load(call.x, block, buffer);
      T* dy = target(call.out, block, out_buffer);
      if (call.function == TABLE) {     // y is the derivative; where that is 0, so is dY, whatever dA
        look_up(layout, static_cast<const T*>(call.table), call.values + piece.byte, piece.channel, k, block.size, y);
        multiply(da, y, block.size, dy);
      } else {
        y_of<T, V>(layout, all, call.values + piece.byte, piece.channel, k, block.size, y);
        if (call.function == RELU)
          relu_grad(da, y, block.size, dy);
        else
          leaky_relu(da, y, slope, block.size, dy);
      }
      store(call.out, block, dy);
    }
  });
}

template <class T, bool V, bool W>
void input_grad(const Call& call) {
  const Layout& layout = *call.layout;
  const Vectors<T> all = call.all<T>();
  const T zero = 0, one = 1;
  const Rows<T> centre = call.rows(call.centre, call.centre_step, zero);
  const Rows<T> scale = call.rows(call.scale, call.scale_step, one);
  const Rows<T> centre_z = call.rows(call.centre_z, call.centre_step, zero);
  const std::vector<T> edges = edges_of(layout, all);
  parallel_pieces(layout, call.threads, [&](const Piece& piece) {
    const int64_t c = piece.channel;
    const Parameter<T, V> gamma(all.gamma + c);
    T buffer[PIECE], z[PIECE], out_buffer[PIECE];
    for (int64_t k = 0; k < layout.codes(); ++k) {
      const Block block = block_of(layout, piece, k);
      if (block.size <= 0) break;
      const T* dy = load_dy<T, V>(call, edges, piece, k, block, buffer);
      T* dx = target(call.out, block, out_buffer);
      const Parameter<T, W> factor(scale.at(block.outer, c));
      if (call.centre) {
        const Parameter<T, W> mean(centre.at(block.outer, c)), mean_z(centre_z.at(block.outer, c));
        z_of<T, V>(layout, all, call.values + piece.byte, c, k, block.size, z);
#pragma omp simd
        for (int64_t i = 0; i < block.size; ++i) dx[i] = (dy[i] * gamma[i] - mean[i] - z[i] * mean_z[i]) * factor[i];
      } else {
#pragma omp simd
        for (int64_t i = 0; i < block.size; ++i) dx[i] = dy[i] * gamma[i] * factor[i];
      }
      store(call.out, block, dx);
    }
  });
}

// ---- sums

// Groups of lines, each summed by itself in chunks that do not depend on the number of threads; nor do the sums.
struct Chunks {
  int64_t groups, lines, per_group, step;
  Chunks(const Layout& layout, bool per_sample) {
    groups = per_sample ? layout.lines / layout.lines_per_outer : 1;
    lines = layout.lines / groups;
    const int64_t wanted = std::min(MOST_CHUNKS, layout.elements() / CHUNK);
    step = std::max<int64_t>(1, lines / std::max<int64_t>(1, wanted / groups));
    per_group = (lines + step - 1) / step;
  }
  int64_t count() const { return groups * per_group; }
  int64_t begin(int64_t i) const { return i / per_group * lines + i % per_group * step; }
  int64_t end(int64_t i) const { return i / per_group * lines + std::min(lines, (i % per_group + 1) * step); }
};

// Sums are in double: an fp32 sum of n terms would lose up to n units in the last place.
template <class T, bool V>
void add_to_sums(const T* dy, const T* z, int64_t size, double* sum, double* sum_z) {
  if (V) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      sum[i] += double(dy[i]);
      sum_z[i] += double(dy[i] * z[i]);
    }
    return;
  }
  double total = 0, total_z = 0;
#pragma omp simd reduction(+ : total, total_z)
  for (int64_t i = 0; i < size; ++i) {
    total += double(dy[i]);
    total_z += double(dy[i] * z[i]);
  }
  *sum += total;
  *sum_z += total_z;
}

template <class T, bool V>
void gradient_sums(const Call& call) {
  const Layout& layout = *call.layout;
  const Vectors<T> all = call.all<T>();
  const bool per_sample = call.per_sample;
  const std::vector<T> edges = edges_of(layout, all);
  T* out = static_cast<T*>(call.out.data);
  const Chunks chunks(layout, per_sample);
  const int64_t channels = layout.channels, rows = per_sample ? layout.outer : 1;
  const int64_t samples = per_sample && layout.outer_step ? layout.codes() : 1;  // of a line, to be told apart
  const int64_t size = samples * 2 * channels;
  const std::unique_ptr<double[]> sums(new double[chunks.count() * size]);
  parallel(chunks.count(), layout.elements(), call.threads, [&](int64_t i) {
    double* mine = sums.get() + i * size;
    std::fill(mine, mine + size, 0.0);
    T buffer[PIECE], z[PIECE];
    for_pieces(layout, chunks.begin(i), chunks.end(i), [&](const Piece& piece) {
      const int64_t c = piece.channel;
      for (int64_t k = 0; k < layout.codes(); ++k) {
        const Block block = block_of(layout, piece, k);
        if (block.size <= 0) break;
        const T* dy = load_dy<T, V>(call, edges, piece, k, block, buffer);
        z_of<T, V>(layout, all, call.values + piece.byte, c, k, block.size, z);
        double* sum = mine + (samples > 1 ? k : 0) * 2 * channels + c;
        add_to_sums<T, V>(dy, z, block.size, sum, sum + channels);
      }
    });
  });
  std::vector<double> total(2 * channels);
  for (int64_t group = 0; group < chunks.groups; ++group)
    for (int64_t k = 0; k < samples; ++k) {
      const int64_t row = group + k * layout.outer_step;
      if (row >= rows) break;
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t i = 0; i < chunks.per_group; ++i) {
        const double* part = sums.get() + (group * chunks.per_group + i) * size + k * 2 * channels;
        for (int64_t c = 0; c < 2 * channels; ++c) total[c] += part[c];
      }
      for (int64_t c = 0; c < channels; ++c) {
        out[row * channels + c] = T(total[c]);
        out[(rows + row) * channels + c] = T(total[channels + c]);
      }
    }
}

template <class T, bool V>
void row_means(const Call& call) {
  const Layout& layout = *call.layout;
  const Vectors<T> all = call.all<T>();
  T* out = static_cast<T*>(call.out.data);
  const int64_t step = std::max<int64_t>(1, CHUNK / 2 / layout.length);
  parallel((layout.lines + step - 1) / step, layout.elements(), call.threads, [&](int64_t chunk) {
    T buffer[PIECE], du[PIECE], z[PIECE];
    for (int64_t line = chunk * step; line < std::min(layout.lines, (chunk + 1) * step); ++line)
      for (int64_t k = 0; k < layout.codes(); ++k) {
        double sum = 0, sum_z = 0;
        int64_t row = -1;
        for_pieces(layout, line, line + 1, [&](const Piece& piece) {
          const Block block = block_of(layout, piece, k);
          if (block.size <= 0) return;
          row = block.outer;
          const T* dy = load(call.x, block, buffer);
          const T* gamma = all.gamma + piece.channel;
          z_of<T, true>(layout, all, call.values + piece.byte, piece.channel, k, block.size, z);
#pragma omp simd
          for (int64_t i = 0; i < block.size; ++i) du[i] = dy[i] * gamma[i];
          add_to_sums<T, false>(du, z, block.size, &sum, &sum_z);
        });
        if (row < 0) continue;
        out[row] = T(sum / double(layout.channels));
        out[layout.outer + row] = T(sum_z / double(layout.channels));
      }
  });
}

// ---- statistics

// About a value of the channel, in double: the mean of squares less the square of the mean loses what the mean has more
// of than the deviation, which is then at most the root of the number of elements.
template <class T, bool V>
void add_to_stats(const T* z, int64_t size, const double* from, double* sum, double* squares, T* low, T* high) {
  if (V) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const double deviation = double(z[i]) - from[i];
      sum[i] += deviation;
      squares[i] += deviation * deviation;
      low[i] = (z[i] < low[i]) | (z[i] != z[i]) ? z[i] : low[i];
      high[i] = (z[i] > high[i]) | (z[i] != z[i]) ? z[i] : high[i];
    }
    return;
  }
  const double origin = *from;
  double total = 0, total_squares = 0;
  T least = *low, most = *high;
#pragma omp simd reduction(+ : total, total_squares) reduction(min : least) reduction(max : most)
  for (int64_t i = 0; i < size; ++i) {
    const double deviation = double(z[i]) - origin;
    total += deviation;
    total_squares += deviation * deviation;
    least = z[i] < least ? z[i] : least;
    most = z[i] > most ? z[i] : most;
  }
  *sum += total;
  *squares += total_squares;
  if (total != total)
    for (int64_t i = 0; i < size; ++i)
      if (z[i] != z[i]) least = most = z[i];
  if (*low == *low) *low = least, *high = most;  // a NaN stays
}

template <class T, bool V, bool W>
void channel_stats(const Call& call) {
  const Layout& layout = *call.layout;
  const T zero = 0, one = 1;
  const Rows<T> centre = call.rows(call.centre, call.centre_step, zero);
  const Rows<T> scale = call.rows(call.scale, call.scale_step, one);
  T* out = static_cast<T*>(call.out.data);
  const Chunks chunks(layout, false);
  const int64_t channels = layout.channels;
  const auto load_z = [&](const Piece& piece, const Block& block, T* buffer) {
    const T* xs = load(call.x, block, buffer);
    if (!call.centre) return xs;
    const Parameter<T, W> from(centre.at(block.outer, piece.channel)), factor(scale.at(block.outer, piece.channel));
#pragma omp simd
    for (int64_t i = 0; i < block.size; ++i) buffer[i] = (xs[i] - from[i]) * factor[i];
    return static_cast<const T*>(buffer);
  };
  std::vector<double> from(channels);
  for (int64_t c = 0; c < channels; ++c) {
    T one;
    const Piece piece{V ? 0 : c, V ? c : 0, 1, 0, c};
    from[c] = double(*load_z(piece, block_of(layout, piece, 0), &one));
  }
  const std::unique_ptr<double[]> sums(new double[chunks.count() * 2 * channels]);
  const std::unique_ptr<T[]> ends(new T[chunks.count() * 2 * channels]);
  parallel(chunks.count(), layout.elements(), call.threads, [&](int64_t i) {
    double* sum = sums.get() + i * 2 * channels;
    T* low = ends.get() + i * 2 * channels;
    std::fill(sum, sum + 2 * channels, 0.0);
    std::fill(low, low + channels, std::numeric_limits<T>::infinity());
    std::fill(low + channels, low + 2 * channels, -std::numeric_limits<T>::infinity());
    T buffer[PIECE];
    for_pieces(layout, chunks.begin(i), chunks.end(i), [&](const Piece& piece) {
      const int64_t c = piece.channel;
      const Block block = block_of(layout, piece, 0);
      const T* z = load_z(piece, block, buffer);
      add_to_stats<T, V>(z, block.size, &from[c], sum + c, sum + channels + c, low + c, low + channels + c);
    });
  });
  const double count = double(layout.elements() / channels);
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0, squares = 0;
    T low = std::numeric_limits<T>::infinity(), high = -low;
    for (int64_t i = 0; i < chunks.count(); ++i) {
      const double* part = sums.get() + i * 2 * channels + c;
      const T* end = ends.get() + i * 2 * channels + c;
      sum += part[0];
      squares += part[channels];
      low = (end[0] < low) | (end[0] != end[0]) ? end[0] : low;
      high = (end[channels] > high) | (end[channels] != end[channels]) ? end[channels] : high;
    }
    const double mean = sum / count, var = squares / count - mean * mean;
    out[c] = T(from[c] + mean);
    out[channels + c] = T(var < 0 ? 0 : var);
    out[2 * channels + c] = low;
    out[3 * channels + c] = high;
  }
}

// ---- grids

template <class T>
T least(T a, T b) { return (a < b) | (a != a) ? a : b; }

template <class T>
T finite(T value) {
  const T most = T(1 << 30);
  return value != value ? T(0) : value == std::numeric_limits<T>::infinity() ? most
                             : value == -std::numeric_limits<T>::infinity() ? -most : value;
}

template <class T>
T at_least(T value, T low) { return value < low ? low : value; }

// clip <= 0 is the channel's own range; what is null is 1 for gamma, and 0 for beta. The roots are PyTorch's, whose last
// bit is not always the nearest: root of the variance of z, and of its mean square where gamma and beta are null.
template <class T>
void grid_vectors(int64_t channels, const T* stats, const T* roots, const T* mean_roots, const T* gammas,
                  const T* betas, const T* centre, const T* scale, int bits, double clip, double rectified_clip,
                  T* out) {
  const T levels = T(1 << bits), half = levels / 2, infinity = std::numeric_limits<T>::infinity();
  const T tiny = T(std::sqrt(double(std::numeric_limits<T>::min())));
  const bool is_input = !gammas && !betas, is_range = clip <= 0;
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    T mean = stats[c], low = stats[2 * channels + c], high = stats[3 * channels + c];
    if (centre) {
      mean = (mean - centre[c]) * scale[c];
      low = (low - centre[c]) * scale[c];
      high = (high - centre[c]) * scale[c];
    }
    const T gamma = gammas ? gammas[c] : T(1), beta = betas ? betas[c] : T(0);
    const T deviation = at_least(roots[c], tiny);
    const T slope = gamma * deviation + T(0);  // -0 becomes 0
    T shift = gamma * mean + beta;
    const bool is_flat = slope == 0;
    const T flat_zero = shift > 0 ? T(0) : levels;
    if (is_flat) shift = shift > 0 ? T(1) : T(-1);
    T frac, zero, width;
    if (is_range) {
      const T sign = std::copysign(T(1), slope);
      const T one = (low - mean) / deviation * sign, other = (high - mean) / deviation * sign;
      const T first_value = least(one, other), last_value = -least(-one, -other);
      width = at_least((last_value - first_value) / (levels - 1), tiny);
      const T edge = -shift / std::fabs(slope), bins = finite(edge / width), lowest = first_value / width;
      const bool is_inside = (edge > first_value) & (edge < last_value);
      frac = is_inside ? std::ceil(bins) - bins : -lowest;
      const T first = is_inside ? std::floor(lowest + frac) : edge <= first_value ? T(-1) : T(0);
      zero = std::rint(bins + frac) - first;
      frac = frac - first - half;
      width = sign * width;
    } else {
      width = std::copysign(T(2 * clip / double(levels)), slope);
      const T edge = finite(shift / (slope * width)), nearest = std::rint(edge);
      frac = edge - nearest;
      zero = half - nearest;
    }
    zero = zero < 1 ? T(1) : zero > levels - 1 ? levels - 1 : zero;
    zero = is_flat ? flat_zero : zero;
    width = width * deviation;
    T floor = -infinity;
    if (is_input) {
      const T top = is_range ? high : least(high, T(rectified_clip) * mean_roots[c]);
      const T rectified = at_least(top / (levels - 1), tiny);
      const bool is_rectified = (low == 0) | ((low > 0) & (rectified <= std::fabs(width)));
      frac = is_rectified ? 1 - half : frac;
      zero = is_rectified ? T(1) : zero;
      width = is_rectified ? rectified : width;
      mean = is_rectified ? T(0) : mean;
      floor = is_rectified ? T(0) : floor;
    }
    const T found[] = {frac, zero, width, mean, gamma, beta, floor};
    for (int64_t row = 0; row < 7; ++row) out[row * channels + c] = found[row];
  }
}

// ---- from arguments to types

template <class F>
void with_types(const Call& call, const F& f) {
  const auto with_dtype = [&](auto t) {
    if (!call.layout->per_element)
      f(t, std::false_type(), std::false_type());
    else if (call.by_channel)
      f(t, std::true_type(), std::true_type());
    else
      f(t, std::true_type(), std::false_type());
  };
  if (call.is_double)
    with_dtype(double());
  else
    with_dtype(float());
}

}  // namespace

#define BLPA_FUNCTION(name, ...) \
  void blpa_##name(const Call* call) { \
    with_types(*call, [&](auto t, auto v, auto w) { \
      using T = decltype(t); \
      constexpr bool V = v(), W = w(); \
      static_cast<void>(W); \
      name<__VA_ARGS__>(*call); \
    }); \
  }

extern "C" {

int blpa_has_half() { return HAS_HALF; }

BLPA_FUNCTION(channel_stats, T, V, W)
BLPA_FUNCTION(encode, T, V, W)
BLPA_FUNCTION(normalise_encode, T, V, W)
BLPA_FUNCTION(decode, T, V)
BLPA_FUNCTION(elementwise_grad, T, V)
BLPA_FUNCTION(gradient_sums, T, V)
BLPA_FUNCTION(row_means, T, V)
BLPA_FUNCTION(input_grad, T, V, W)

void blpa_grid_vectors(int is_double, int64_t channels, const void* stats, const void* roots, const void* mean_roots,
                       const void* gamma, const void* beta, const void* centre, const void* scale, int bits,
                       double clip, double rectified_clip, void* out) {
  const auto run = [&](auto t) {
    const auto as = [&](const void* data) { return static_cast<const decltype(t)*>(data); };
    grid_vectors(channels, as(stats), as(roots), as(mean_roots), as(gamma), as(beta), as(centre), as(scale), bits, clip,
                 rectified_clip, static_cast<decltype(t)*>(out));
  };
  if (is_double)
    run(double());
  else
    run(float());
}

}  // extern "C"
