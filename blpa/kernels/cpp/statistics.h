// Statistics of channels, and the grids that follow from them.
#pragma once

#include "memory.h"

namespace {

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

}  // namespace

extern "C" {

BLPA_FUNCTION(channel_stats, T, V, W)

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
      for (int64_t k = 0; with_range && k < 4; ++k)
        add_to_range(rows[k], inner, means[k] != means[k], &low[k], &high[k]);
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
                       float rounded_to_zero, float* out) {
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
    const bool is_flat = gamma == 0, is_positive = beta > rounded_to_zero;
    const T flat_zero = is_positive ? T(0) : levels;
    if (is_flat) shift = is_positive ? T(1) : T(-1);
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

}  // extern "C"
