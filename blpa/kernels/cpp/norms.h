// Norms: a batch norm in training, sums and input gradients; and codes of tensors of which nothing is known.
#pragma once

#include "codes.h"
#include "statistics.h"

namespace {

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

// ---- gradients

template <class T, bool V, bool W>
void input_grad(const Call& call) {
  const T zero = 0, one = 1;
  const Rows<T> centre = call.rows(call.centre, call.centre_step, zero);
  const Rows<T> scale = call.rows(call.scale, call.scale_step, one);
  const Rows<T> centre_z = call.rows(call.centre_z, call.centre_step, zero);
  map_gradient<T, V>(call, [&](const Decoding<T, V>& of, const Piece& piece, const Block& block, const T* dy, T* dx) {
    const int64_t c = piece.channel;
    const Parameter<T, W> factor(scale.at(block.outer, c));
    if (!call.centre) {
#pragma omp simd
      for (int64_t i = 0; i < block.size; ++i) dx[i] = dy[i] * of.gamma[i] * factor[i];
      return;
    }
    const Parameter<T, W> mean(centre.at(block.outer, c)), mean_z(centre_z.at(block.outer, c));
    if (call.rectified) {
#pragma omp simd
      for (int64_t i = 0; i < block.size; ++i) {
        const T code = of.code(i), du = of.relu_grad(i, code, dy[i]) * of.gamma[i];
        dx[i] = (du - mean[i] - of.z(i, code) * mean_z[i]) * factor[i];
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < block.size; ++i)
        dx[i] = (dy[i] * of.gamma[i] - mean[i] - of.z(i, of.code(i)) * mean_z[i]) * factor[i];
    }
  });
}

// Add dY and dY z~ to each element's sums, or to one for all; dy_of(i, code) is dY. Sums are in double: an fp32 sum of
// n terms would lose up to n units in the last place.
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

}  // namespace

extern "C" {

BLPA_FUNCTION(normalise_encode, T, V, W)
BLPA_FUNCTION(input_grad, T, V, W)
BLPA_FUNCTION(gradient_sums, T, V)
BLPA_FUNCTION(row_means, T, V)

// A batch norm in training from its statistics; the call has addresses for the vectors, and for rstd as scale.
void blpa_batch_norm(const Call* call, const float* stats, const float* gammas, const float* betas, double eps,
                     double clip, double rectified_clip, float rounded_to_zero) {
  const int64_t channels = call->layout->channels;
  float* rstd = static_cast<float*>(call->scale);
  for (int64_t c = 0; c < channels; ++c) rstd[c] = float(1 / std::sqrt(double(stats[channels + c]) + eps));
  blpa_grid_vectors(channels, stats, gammas, betas, stats, rstd, int(call->layout->bits), clip, rectified_clip,
                    rounded_to_zero, static_cast<float*>(call->vectors));
  blpa_normalise_encode(call);
}

// A tensor's own codes, from its own statistics; the calls have addresses for what is computed.
void blpa_encode_own(const Call* of_stats, const Call* call, double clip, double rectified_clip) {
  blpa_channel_stats(of_stats);
  blpa_grid_vectors(call->layout->channels, static_cast<const float*>(of_stats->out.data), nullptr, nullptr, nullptr,
                    nullptr, int(call->layout->bits), clip, rectified_clip, 0, static_cast<float*>(call->vectors));
  blpa_encode(call);
}

}  // extern "C"
