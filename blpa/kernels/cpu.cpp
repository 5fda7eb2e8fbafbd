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
  double slope, low, high;                // of leaky ReLU, and the ends of a clamp
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

  int32_t code(int64_t i, T x, T sign) const {
    const T z = (x - centre[i]) * scale[i];
    const T bin = std::floor((z - mean[i]) * unit[i] + frac[i]) + levels / 2;
    const T first = zero[i];
    const T lowest = sign <= 0 ? T(0) : first;
    const T highest = (sign <= 0 ? T(0) : levels - first) + (first - 1);
    T code = bin < lowest ? lowest : bin;
    code = code > highest ? highest : code;
    return int32_t(code == code ? code : T(0));  // a NaN
  }
};

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
      const int shift = int(k * layout.bits);
#pragma omp simd
      for (int64_t i = 0; i < block.size; ++i) codes[i] += of.code(i, xs[i], ys[i]) << shift;
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
  const T least = call.rectified ? T(0) : -std::numeric_limits<T>::infinity();
  parallel_pieces(layout, call.threads, [&](const Piece& piece) {
    const int64_t c = piece.channel;
    const Parameter<T, V> slope(&slopes[c]), shift(&shifts[c]);
    const Encoding<T, V, V> of{Parameter<T, V>(&units[c]), Parameter<T, V>(all.frac + c),
                               Parameter<T, V>(all.zero + c), Parameter<T, V>(all.mean + c),
                               Parameter<T, V>(mean + c), Parameter<T, V>(rstd + c), T(1 << layout.bits)};
    int32_t codes[PIECE];
    std::fill(codes, codes + piece.size, 0);
    for (int64_t k = 0; k < layout.codes(); ++k) {
      const Block block = block_of(layout, piece, k);
      if (block.size <= 0) break;
      const int bits = int(k * layout.bits);
      with_type(call.x, [&](auto* data) {
        using X = std::remove_pointer_t<decltype(data)>;
        const X* xs = data + block.position;
        X* out = static_cast<X*>(call.out.data) + block.position;  // may be where x is
#pragma omp simd
        for (int64_t i = 0; i < block.size; ++i) {
          const T x = cast<T>(xs[i]), y = cast<T>(cast<X>(product_and_sum(x, slope[i], shift[i])));
          codes[i] += of.code(i, x, y) << bits;
          out[i] = cast<X>(y < least ? least : y);
        }
      });
    }
    convert(codes, piece.size, call.values + piece.byte);
  });
}

// ---- decode

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

template <class T>
struct Grids {
  Vectors<T> all;
  std::vector<T> edges;
  explicit Grids(const Call& call) : all(call.all<T>()), edges(edges_of(*call.layout, all)) {}
};

// The k-th codes of a piece.
template <class T, bool V>
struct Decoding {
  const uint8_t* bytes;
  int shift, mask;
  T middle;
  Parameter<T, V> frac, zero, width, mean, gamma, beta, floor, edge;
  Decoding(const Call& call, const Grids<T>& grids, const Piece& piece, int64_t k)
      : bytes(call.values + piece.byte), shift(int(k * call.layout->bits)), mask((1 << call.layout->bits) - 1),
        middle(T(0.5) - T(1 << call.layout->bits) / 2), frac(grids.all.frac + piece.channel),
        zero(grids.all.zero + piece.channel), width(grids.all.width + piece.channel),
        mean(grids.all.mean + piece.channel), gamma(grids.all.gamma + piece.channel),
        beta(grids.all.beta + piece.channel), floor(grids.all.floor + piece.channel),
        edge(&grids.edges[piece.channel]) {}

  int index(int64_t i) const { return (bytes[i] >> shift) & mask; }
  T code(int64_t i) const { return T(index(i)); }
  T z(int64_t i, T code) const { return (code + middle - frac[i]) * width[i] + mean[i]; }
  T y(int64_t i, T code) const {
    const T sign = code - (zero[i] - T(0.5)), tiny = std::numeric_limits<T>::min();
    const T value = z(i, code) * gamma[i] + beta[i];
    const T positive = sign <= 0 ? T(0) : (value < tiny ? tiny : value);
    const T negative = sign >= 0 ? T(0) : (value > 0 ? T(0) : value);
    const T sum = positive + negative;
    return sum < floor[i] ? floor[i] : sum;
  }
  T relu(int64_t i, T code) const {
    const T value = z(i, code) * gamma[i] + beta[i], tiny = std::numeric_limits<T>::min();
    const T positive = value < tiny ? tiny : value;
    return code <= edge[i] ? T(0) : positive;
  }
  T relu_grad(int64_t i, T code, T da) const { return code <= edge[i] ? T(0) : da; }
};

enum Function { IDENTITY, RELU, LEAKY_RELU, CLAMP, TABLE };

// y of each code of each channel [C, L].
template <class T>
void levels_of(const Call& call) {
  const Grids<T> grids(call);
  const int64_t levels = 1 << call.layout->bits;
  for (int64_t c = 0; c < call.layout->channels; ++c) {
    const Decoding<T, false> of(call, grids, Piece{0, 0, 0, 0, c}, 0);
    T* out = static_cast<T*>(call.out.data) + c * levels;
#pragma omp simd
    for (int64_t code = 0; code < levels; ++code) out[code] = of.y(0, T(code));
  }
}

template <class T, bool V>
void decode(const Call& call) {
  const Layout& layout = *call.layout;
  const Grids<T> grids(call);
  const T slope = T(call.slope), low = T(call.low), high = T(call.high);
  const int64_t levels = 1 << layout.bits;
  parallel_pieces(layout, call.threads, [&](const Piece& piece) {
    T buffer[PIECE];
    const T* table = static_cast<const T*>(call.table) + piece.channel * levels;
    for (int64_t k = 0; k < layout.codes(); ++k) {
      const Block block = block_of(layout, piece, k);
      if (block.size <= 0) break;
      const Decoding<T, V> of(call, grids, piece, k);
      T* y = target(call.out, block, buffer);
      if (call.function == TABLE) {
        for (int64_t i = 0; i < block.size; ++i) y[i] = table[i * V * levels + of.index(i)];
      } else if (call.function == RELU) {
#pragma omp simd
        for (int64_t i = 0; i < block.size; ++i) y[i] = of.relu(i, of.code(i));
      } else if (call.function == CLAMP) {
#pragma omp simd
        for (int64_t i = 0; i < block.size; ++i) {
          const T value = of.y(i, of.code(i)), most = value > high ? high : value;
          y[i] = most < low ? low : most;
        }
      } else {
        const T factor = call.function == LEAKY_RELU ? slope : T(1);
#pragma omp simd
        for (int64_t i = 0; i < block.size; ++i) {
          const T value = of.y(i, of.code(i)), product = value * factor;
          y[i] = value > 0 ? value : product;
        }
      }
      store(call.out, block, y);
    }
  });
}

template <class T, bool V>
void elementwise_grad(const Call& call) {
  const Layout& layout = *call.layout;
  const Grids<T> grids(call);
  const T slope = T(call.slope);
  const int64_t levels = 1 << layout.bits;
  parallel_pieces(layout, call.threads, [&](const Piece& piece) {
    T buffer[PIECE], out_buffer[PIECE];
    const T* table = static_cast<const T*>(call.table) + piece.channel * levels;
    for (int64_t k = 0; k < layout.codes(); ++k) {
      const Block block = block_of(layout, piece, k);
      if (block.size <= 0) break;
      const Decoding<T, V> of(call, grids, piece, k);
      const T* da = load(call.x, block, buffer);
      T* dy = target(call.out, block, out_buffer);
      if (call.function == TABLE) {       // of the derivative; where that is 0, so is dY, whatever dA
        for (int64_t i = 0; i < block.size; ++i) {
          const T derivative = table[i * V * levels + of.index(i)];
          dy[i] = derivative == 0 ? T(0) : da[i] * derivative;
        }
      } else if (call.function == RELU) {
#pragma omp simd
        for (int64_t i = 0; i < block.size; ++i) dy[i] = of.relu_grad(i, of.code(i), da[i]);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < block.size; ++i) {
          const T product = da[i] * slope;
          dy[i] = of.y(i, of.code(i)) > 0 ? da[i] : product;
        }
      }
      store(call.out, block, dy);
    }
  });
}

template <class T, bool V, bool W>
void input_grad(const Call& call) {
  const Layout& layout = *call.layout;
  const Grids<T> grids(call);
  const T zero = 0, one = 1;
  const Rows<T> centre = call.rows(call.centre, call.centre_step, zero);
  const Rows<T> scale = call.rows(call.scale, call.scale_step, one);
  const Rows<T> centre_z = call.rows(call.centre_z, call.centre_step, zero);
  parallel_pieces(layout, call.threads, [&](const Piece& piece) {
    const int64_t c = piece.channel;
    T buffer[PIECE], out_buffer[PIECE];
    for (int64_t k = 0; k < layout.codes(); ++k) {
      const Block block = block_of(layout, piece, k);
      if (block.size <= 0) break;
      const Decoding<T, V> of(call, grids, piece, k);
      const T* dy = load(call.x, block, buffer);
      T* dx = target(call.out, block, out_buffer);
      const Parameter<T, W> factor(scale.at(block.outer, c));
      const Parameter<T, W> mean(centre.at(block.outer, c)), mean_z(centre_z.at(block.outer, c));
      if (call.rectified) {
#pragma omp simd
        for (int64_t i = 0; i < block.size; ++i) {
          const T code = of.code(i), du = of.relu_grad(i, code, dy[i]) * of.gamma[i];
          dx[i] = (du - mean[i] - of.z(i, code) * mean_z[i]) * factor[i];
        }
      } else if (call.centre) {
#pragma omp simd
        for (int64_t i = 0; i < block.size; ++i)
          dx[i] = (dy[i] * of.gamma[i] - mean[i] - of.z(i, of.code(i)) * mean_z[i]) * factor[i];
      } else {
#pragma omp simd
        for (int64_t i = 0; i < block.size; ++i) dx[i] = dy[i] * of.gamma[i] * factor[i];
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

// Add dY and dY z~ to each element's sums, or to one for all; dy_of(i, code) is dY. Sums are in double: an fp32 sum of n
// terms would lose up to n units in the last place.
template <bool per_element, class T, bool V, class F>
void add_to_sums(const Decoding<T, V>& of, int64_t size, const F& dy_of, double* sum, double* sum_z) {
  T dy[PIECE], dy_z[PIECE];               // one loop from bytes to doubles would be a slow one
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const T code = of.code(i);
    dy[i] = dy_of(i, code);
    dy_z[i] = dy[i] * of.z(i, code);
  }
  if (per_element) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      sum[i] += double(dy[i]);
      sum_z[i] += double(dy_z[i]);
    }
    return;
  }
  double total = 0, total_z = 0;
#pragma omp simd reduction(+ : total, total_z)
  for (int64_t i = 0; i < size; ++i) {
    total += double(dy[i]);
    total_z += double(dy_z[i]);
  }
  *sum += total;
  *sum_z += total_z;
}

template <class T, bool V>
void gradient_sums(const Call& call) {
  const Layout& layout = *call.layout;
  const Grids<T> grids(call);
  const bool per_sample = call.per_sample;
  T* out = static_cast<T*>(call.out.data);
  const Chunks chunks(layout, per_sample);
  const int64_t channels = layout.channels, rows = per_sample ? layout.outer : 1;
  const int64_t samples = per_sample && layout.outer_step ? layout.codes() : 1;  // of a line, to be told apart
  const int64_t size = samples * 2 * channels;
  const std::unique_ptr<double[]> sums(new double[chunks.count() * size]);
  parallel(chunks.count(), layout.elements(), call.threads, [&](int64_t i) {
    double* mine = sums.get() + i * size;
    std::fill(mine, mine + size, 0.0);
    T buffer[PIECE];
    for_pieces(layout, chunks.begin(i), chunks.end(i), [&](const Piece& piece) {
      for (int64_t k = 0; k < layout.codes(); ++k) {
        const Block block = block_of(layout, piece, k);
        if (block.size <= 0) break;
        const Decoding<T, V> of(call, grids, piece, k);
        const T* dy = load(call.x, block, buffer);
        double* sum = mine + (samples > 1 ? k : 0) * 2 * channels + piece.channel;
        if (call.rectified)
          add_to_sums<V>(of, block.size, [&](int64_t i, T code) { return of.relu_grad(i, code, dy[i]); }, sum,
                         sum + channels);
        else
          add_to_sums<V>(of, block.size, [&](int64_t i, T) { return dy[i]; }, sum, sum + channels);
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
  const Grids<T> grids(call);
  T* out = static_cast<T*>(call.out.data);
  const int64_t step = std::max<int64_t>(1, CHUNK / 2 / layout.length);
  parallel((layout.lines + step - 1) / step, layout.elements(), call.threads, [&](int64_t chunk) {
    T buffer[PIECE];
    for (int64_t line = chunk * step; line < std::min(layout.lines, (chunk + 1) * step); ++line)
      for (int64_t k = 0; k < layout.codes(); ++k) {
        double sum = 0, sum_z = 0;
        int64_t row = -1;
        for_pieces(layout, line, line + 1, [&](const Piece& piece) {
          const Block block = block_of(layout, piece, k);
          if (block.size <= 0) return;
          row = block.outer;
          const T* dy = load(call.x, block, buffer);
          const Decoding<T, true> of(call, grids, piece, k);
          add_to_sums<false>(of, block.size, [&](int64_t i, T) { return dy[i] * of.gamma[i]; }, &sum, &sum_z);
        });
        if (row < 0) continue;
        out[row] = T(sum / double(layout.channels));
        out[layout.outer + row] = T(sum_z / double(layout.channels));
      }
  });
}

// ---- statistics

template <class T>
void add_to_range(const T* z, int64_t size, bool may_have_nan, T* low, T* high) {
  T least = *low, most = *high;
#pragma omp simd reduction(min : least) reduction(max : most)
  for (int64_t i = 0; i < size; ++i) {
    least = z[i] < least ? z[i] : least;
    most = z[i] > most ? z[i] : most;
  }
  for (int64_t i = 0; may_have_nan && i < size; ++i)
    if (z[i] != z[i]) least = most = z[i];
  if (*low == *low) *low = least, *high = most;  // a NaN stays
}

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
#pragma omp simd reduction(+ : total, total_squares)
  for (int64_t i = 0; i < size; ++i) {
    const double deviation = double(z[i]) - origin;
    total += deviation;
    total_squares += deviation * deviation;
  }
  *sum += total;
  *squares += total_squares;
  add_to_range(z, size, total != total, low, high);
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

// ---- max pooling

struct Windows {                          // over planes of the input; [rows, columns] each
  int64_t size[2], outputs[2], kernel[2], stride[2], padding[2], dilation[2];

  // Where a window begins in the input, and the first of its places that is inside.
  int64_t start(int dim, int64_t output) const { return output * stride[dim] - padding[dim]; }
  int64_t first(int dim, int64_t output) const {
    const int64_t from = start(dim, output);
    return from < 0 ? (-from + dilation[dim] - 1) / dilation[dim] : 0;
  }
  bool is_inside(int dim, int64_t index) const { return 0 <= index && index < size[dim]; }
};

// As PyTorch: of equal elements the first, and of NaNs the last.
void max_pool(const Windows& of, const float* x, float* maxima, uint8_t* places) {
  const int64_t width = of.outputs[1];
  std::vector<int32_t> chosen(width);
  std::vector<int64_t> begin(of.kernel[1], width), end(of.kernel[1], 0);  // outputs whose windows have this column inside
  for (int64_t v = 0; v < of.kernel[1]; ++v)
    for (int64_t j = 0; j < width; ++j)
      if (of.is_inside(1, of.start(1, j) + v * of.dilation[1])) begin[v] = std::min(begin[v], j), end[v] = j + 1;
  for (int64_t i = 0; i < of.outputs[0]; ++i) {
    float* best = maxima + i * width;
    for (int64_t j = 0; j < width; ++j) {
      best[j] = -std::numeric_limits<float>::infinity();
      chosen[j] = int32_t(of.first(0, i) * of.kernel[1] + of.first(1, j));
    }
    for (int64_t u = 0; u < of.kernel[0]; ++u) {
      const int64_t row = of.start(0, i) + u * of.dilation[0];
      if (!of.is_inside(0, row)) continue;
      for (int64_t v = 0; v < of.kernel[1]; ++v) {
        const float* from = x + row * of.size[1] - of.padding[1] + v * of.dilation[1];
        const int64_t stride = of.stride[1];
        const int32_t place = int32_t(u * of.kernel[1] + v);
        int32_t* choice = chosen.data();
#pragma omp simd
        for (int64_t j = begin[v]; j < end[v]; ++j) {
          const float value = from[j * stride];
          const bool is_better = (value > best[j]) | (value != value);
          best[j] = is_better ? value : best[j];
          choice[j] = is_better ? place : choice[j];
        }
      }
    }
    convert(chosen.data(), width, places + i * width);
  }
}

// Sums in the order of the outputs, as PyTorch.
void max_pool_grad(const Windows& of, const float* grad, const uint8_t* places, float* dx) {
  std::fill(dx, dx + of.size[0] * of.size[1], 0.0f);
  for (int64_t i = 0; i < of.outputs[0]; ++i)
    for (int64_t j = 0; j < of.outputs[1]; ++j, ++grad, ++places) {
      const int64_t row = of.start(0, i) + *places / of.kernel[1] * of.dilation[0];
      const int64_t column = of.start(1, j) + *places % of.kernel[1] * of.dilation[1];
      dx[row * of.size[1] + column] += *grad;
    }
}

// ---- one bit per element

// Byte i has the elements i + k count, k = 0 ... 7, of which there are `size`.
template <class F>
void for_bits(int64_t size, int threads, const F& f) {
  const int64_t count = (size + 7) / 8;
  parallel((count + PIECE - 1) / PIECE, size, threads, [&](int64_t piece) {
    const int64_t first = piece * PIECE;
    f(first, std::min(PIECE, count - first), count);
  });
}

void pack_between(const Array& y, int64_t size, float low, float high, int threads, uint8_t* packed) {
  for_bits(size, threads, [&](int64_t first, int64_t bytes, int64_t count) {
    int32_t bits[PIECE];
    std::fill(bits, bits + bytes, 0);
    with_type(y, [&](auto* data) {
      for (int64_t k = 0; k < 8; ++k) {
        const auto* ys = data + first + k * count;
        const int64_t end = std::min(bytes, size - first - k * count);
#pragma omp simd
        for (int64_t i = 0; i < end; ++i) {
          const auto value = cast<float>(ys[i]);
          bits[i] |= int32_t((value > low) & (value < high)) << k;
        }
      }
    });
    convert(bits, bytes, packed + first);
  });
}

void masked(const Array& grad, int64_t size, const uint8_t* packed, int threads, void* out) {
  for_bits(size, threads, [&](int64_t first, int64_t bytes, int64_t count) {
    with_type(grad, [&](auto* data) {
      using X = std::remove_pointer_t<decltype(data)>;
      for (int64_t k = 0; k < 8; ++k) {
        const X* from = data + first + k * count;
        X* to = static_cast<X*>(out) + first + k * count;
        const int64_t end = std::min(bytes, size - first - k * count);
#pragma omp simd
        for (int64_t i = 0; i < end; ++i) to[i] = (packed[first + i] >> k) & 1 ? from[i] : X(0);
      }
    });
  });
}

// ---- statistics of a batch norm in training

// PyTorch adds the elements of a channel one after another, in double, so that each sum waits for the one before. Four
// channels at once have the same bits in less than half the time.
struct FourSums {
  double a = 0, b = 0, c = 0, d = 0;

  void add(const float* const rows[4], int64_t size) {
    const float *p = rows[0], *q = rows[1], *r = rows[2], *s = rows[3];
    for (int64_t i = 0; i < size; ++i) {
      a += double(p[i]);
      b += double(q[i]);
      c += double(r[i]);
      d += double(s[i]);
    }
  }
  void add_squares(const float* const rows[4], const float means[4], int64_t size) {
    const float *p = rows[0], *q = rows[1], *r = rows[2], *s = rows[3];
    const float of_p = means[0], of_q = means[1], of_r = means[2], of_s = means[3];
    for (int64_t i = 0; i < size; ++i) {
      const float x = p[i] - of_p, y = q[i] - of_q, z = r[i] - of_r, w = s[i] - of_s;
      a += double(x * x);
      b += double(y * y);
      c += double(z * z);
      d += double(w * w);
    }
  }
};

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
      static_cast<void>(V), static_cast<void>(W); \
      name<__VA_ARGS__>(*call); \
    }); \
  }

extern "C" {

int blpa_has_half() { return HAS_HALF; }

BLPA_FUNCTION(channel_stats, T, V, W)
BLPA_FUNCTION(encode, T, V, W)
BLPA_FUNCTION(normalise_encode, T, V, W)
BLPA_FUNCTION(levels_of, T)
BLPA_FUNCTION(decode, T, V)
BLPA_FUNCTION(elementwise_grad, T, V)
BLPA_FUNCTION(gradient_sums, T, V)
BLPA_FUNCTION(row_means, T, V)
BLPA_FUNCTION(input_grad, T, V, W)

// Mean, biased variance and, with the range, low and high [4, C] of x [outer, C, inner]; running averages may be null.
void blpa_batch_stats(const float* x, int64_t outer, int64_t channels, int64_t inner, int threads, int with_range,
                      float momentum, float* running_mean, float* running_var, float* out) {
  const int64_t count = outer * inner;
  parallel((channels + 3) / 4, outer * channels * inner, threads, [&](int64_t group) {
    int64_t of[4];                        // the last ones again, where channels end
    for (int64_t k = 0; k < 4; ++k) of[k] = std::min(4 * group + k, channels - 1);
    const auto for_rows = [&](const auto& f) {
      for (int64_t n = 0; n < outer; ++n) {
        const float* rows[4];
        for (int64_t k = 0; k < 4; ++k) rows[k] = x + (n * channels + of[k]) * inner;
        f(rows);
      }
    };
    FourSums sums, squares;
    for_rows([&](const float* const* rows) { sums.add(rows, inner); });
    const double totals[4] = {sums.a, sums.b, sums.c, sums.d};
    float means[4];
    for (int64_t k = 0; k < 4; ++k) means[k] = float(totals[k] / double(count));
    float low[4], high[4];
    std::fill(low, low + 4, std::numeric_limits<float>::infinity());
    std::fill(high, high + 4, -std::numeric_limits<float>::infinity());
    for_rows([&](const float* const* rows) {
      squares.add_squares(rows, means, inner);
      for (int64_t k = 0; with_range && k < 4; ++k) add_to_range(rows[k], inner, means[k] != means[k], &low[k], &high[k]);
    });
    const float all_squares[4] = {float(squares.a), float(squares.b), float(squares.c), float(squares.d)};
    for (int64_t k = 0; k < std::min<int64_t>(4, channels - 4 * group); ++k) {
      const int64_t c = of[k];
      out[c] = means[k];
      out[channels + c] = all_squares[k] / float(count);
      out[2 * channels + c] = with_range ? low[k] : means[k];
      out[3 * channels + c] = with_range ? high[k] : means[k];
      if (running_mean) running_mean[c] = momentum * means[k] + (1 - momentum) * running_mean[c];
      if (running_var) {
        const double unbiased = all_squares[k] / float(count - 1);
        running_var[c] = float(momentum * unbiased + (1 - momentum) * running_var[c]);
      }
    }
  });
}

// clip <= 0 is the channel's own range; what is null is 1 for gamma, and 0 for beta.
void blpa_grid_vectors(int64_t channels, const float* stats, const float* gammas, const float* betas,
                       const float* centre, const float* scale, int bits, double clip, double rectified_clip,
                       float* out) {
  using T = float;
  const T levels = T(1 << bits), half = levels / 2, infinity = std::numeric_limits<T>::infinity();
  const T tiny = T(std::sqrt(double(std::numeric_limits<T>::min())));
  const bool is_input = !gammas && !betas, is_range = clip <= 0;
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    T mean = stats[c], var = stats[channels + c], low = stats[2 * channels + c], high = stats[3 * channels + c];
    if (centre) {
      var = var * (scale[c] * scale[c]);
      mean = (mean - centre[c]) * scale[c];
      low = (low - centre[c]) * scale[c];
      high = (high - centre[c]) * scale[c];
    }
    const T gamma = gammas ? gammas[c] : T(1), beta = betas ? betas[c] : T(0);
    const T deviation = at_least(std::sqrt(var), tiny);
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
      const T top = is_range ? high : least(high, T(rectified_clip) * std::sqrt(var + mean * mean));
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

// A batch norm in training from its statistics; the call has addresses for what is computed: vectors, and rstd as scale.
void blpa_batch_norm(const Call* call, const float* stats, const float* gammas, const float* betas, double eps,
                     double clip, double rectified_clip) {
  const int64_t channels = call->layout->channels;
  float *rstd = static_cast<float*>(const_cast<void*>(call->scale));
  for (int64_t c = 0; c < channels; ++c) rstd[c] = float(1 / std::sqrt(double(stats[channels + c]) + eps));
  blpa_grid_vectors(channels, stats, gammas, betas, stats, rstd, int(call->layout->bits), clip, rectified_clip,
                    static_cast<float*>(const_cast<void*>(call->vectors)));
  blpa_normalise_encode(call);
}

// A tensor's own codes, from its own statistics; the calls have addresses for what is computed.
void blpa_encode_own(const Call* of_stats, const Call* call, double clip, double rectified_clip) {
  blpa_channel_stats(of_stats);
  blpa_grid_vectors(call->layout->channels, static_cast<const float*>(of_stats->out.data), nullptr, nullptr, nullptr,
                    nullptr, int(call->layout->bits), clip, rectified_clip,
                    static_cast<float*>(const_cast<void*>(call->vectors)));
  blpa_encode(call);
}

void blpa_max_pool(const Windows* windows, int64_t planes, int threads, const float* x, float* out, uint8_t* places) {
  const int64_t size = windows->size[0] * windows->size[1], outputs = windows->outputs[0] * windows->outputs[1];
  parallel(planes, planes * size, threads, [&](int64_t plane) {
    max_pool(*windows, x + plane * size, out + plane * outputs, places + plane * outputs);
  });
}

void blpa_max_pool_grad(const Windows* windows, int64_t planes, int threads, const float* grad, const uint8_t* places,
                        float* out) {
  const int64_t size = windows->size[0] * windows->size[1], outputs = windows->outputs[0] * windows->outputs[1];
  parallel(planes, planes * size, threads, [&](int64_t plane) {
    max_pool_grad(*windows, grad + plane * outputs, places + plane * outputs, out + plane * size);
  });
}

void blpa_pack_between(const Array* y, int64_t size, float low, float high, int threads, uint8_t* packed) {
  pack_between(*y, size, low, high, threads, packed);
}

void blpa_masked(const Array* grad, int64_t size, const uint8_t* packed, int threads, void* out) {
  masked(*grad, size, packed, threads, out);
}

}  // extern "C"
