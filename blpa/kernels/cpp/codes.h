// Codes: encode, decode, and the gradients of activation functions.
#pragma once

#include "memory.h"

namespace {

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
    for (int64_t k = 0; k < layout.codes(); ++k) {
      const Block block = block_of(layout, piece, k);
      if (block.size <= 0) break;
      const Decoding<T, V> of(call, grids, piece, k);
      T* y = target(call.out, block, buffer);
      if (call.function == TABLE) {
        const T* table = static_cast<const T*>(call.table) + piece.channel * levels;
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

// Write f(codes, piece, block, gradient, out) for each block of a tensor, given a gradient.
template <class T, bool V, class F>
void map_gradient(const Call& call, const F& f) {
  const Layout& layout = *call.layout;
  const Grids<T> grids(call);
  parallel_pieces(layout, call.threads, [&](const Piece& piece) {
    T buffer[PIECE], out_buffer[PIECE];
    for (int64_t k = 0; k < layout.codes(); ++k) {
      const Block block = block_of(layout, piece, k);
      if (block.size <= 0) break;
      T* out = target(call.out, block, out_buffer);
      f(Decoding<T, V>(call, grids, piece, k), piece, block, load(call.x, block, buffer), out);
      store(call.out, block, out);
    }
  });
}

template <class T, bool V>
void elementwise_grad(const Call& call) {
  const T slope = T(call.slope);
  const int64_t levels = 1 << call.layout->bits;
  map_gradient<T, V>(call, [&](const Decoding<T, V>& of, const Piece& piece, const Block& block, const T* da, T* dy) {
    if (call.function == TABLE) {         // of the derivative; where that is 0, so is dY, whatever dA
      const T* table = static_cast<const T*>(call.table) + piece.channel * levels;
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
  });
}

}  // namespace

extern "C" {

BLPA_FUNCTION(encode, T, V, W)
BLPA_FUNCTION(levels_of, T)
BLPA_FUNCTION(decode, T, V)
BLPA_FUNCTION(elementwise_grad, T, V)

}  // extern "C"
