// How tensors lie in memory, and what a call says of them.
//
// A tensor is a sequence of lines, in the order of memory. With the channels last a line is one pixel: C elements, each
// with parameters of its own. Else it is one channel of one sample: elements with the same parameters. A thread takes a
// line in pieces whose intermediate results stay in the first-level cache.
#pragma once

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

// Arguments of a call; cpu_build.py has the same. What a function does not have is null.
struct Call {
  const Layout* layout;
  int64_t threads, is_double;
  Array x, y, out;                        // in the backward pass x is the gradient
  uint8_t* values;
  void* vectors;
  const void *centre, *centre_z;          // [outer or 1, C or 1]; in the backward pass means
  void* scale;                            // likewise
  int64_t centre_step, scale_step;        // from row to row; 0 if there is one row
  int64_t by_channel;                     // whether they have C columns
  int64_t function;
  double slope, low, high;                // of leaky ReLU, and the ends of a clamp
  const void* table;                      // [C, L] of f, or of its derivative
  int64_t per_sample, rectified;

  template <class T>
  Rows<T> rows(const void* data, int64_t step, const T& otherwise) const {
    return {data ? static_cast<const T*>(data) : &otherwise, step, data ? by_channel : 0};
  }
  template <class T>
  Vectors<T> all() const {
    return {static_cast<const T*>(vectors), layout->channels};
  }
};

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

extern "C" int blpa_has_half() { return HAS_HALF; }
