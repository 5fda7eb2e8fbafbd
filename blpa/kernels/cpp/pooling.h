// Max pooling, and one bit per element.
#pragma once

#include "memory.h"

namespace {

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
  std::vector<int64_t> begin(of.kernel[1], width), end(of.kernel[1], 0);  // outputs that have this column inside
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

// The first element of each plane, in the input and in the outputs.
template <class F>
void for_planes(const Windows& of, int64_t planes, int threads, const F& f) {
  const int64_t size = of.size[0] * of.size[1], outputs = of.outputs[0] * of.outputs[1];
  parallel(planes, planes * size, threads, [&](int64_t plane) { f(plane * size, plane * outputs); });
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

}  // namespace

extern "C" {

void blpa_max_pool(const Windows* windows, int64_t planes, int threads, const float* x, float* out, uint8_t* places) {
  for_planes(*windows, planes, threads, [&](int64_t in, int64_t outputs) {
    max_pool(*windows, x + in, out + outputs, places + outputs);
  });
}

void blpa_max_pool_grad(const Windows* windows, int64_t planes, int threads, const float* grad, const uint8_t* places,
                        float* out) {
  for_planes(*windows, planes, threads, [&](int64_t in, int64_t outputs) {
    max_pool_grad(*windows, grad + outputs, places + outputs, out + in);
  });
}

void blpa_pack_between(const Array* y, int64_t size, float low, float high, int threads, uint8_t* packed) {
  for_bits(size, threads, [&](int64_t first, int64_t bytes, int64_t count) {
    int32_t bits[PIECE];
    std::fill(bits, bits + bytes, 0);
    with_type(*y, [&](auto* data) {
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

void blpa_masked(const Array* grad, int64_t size, const uint8_t* packed, int threads, void* out) {
  for_bits(size, threads, [&](int64_t first, int64_t bytes, int64_t count) {
    with_type(*grad, [&](auto* data) {
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

}  // extern "C"
