// Kernels for a CPU, with a C interface: no PyTorch headers, so that they compile in a second and go
// with any version.  Images lie in memory as (image, pixel, channel).  Sums are float32 over a few
// pixels and double over the rest, and no thread adds to another's: results do not depend on the
// number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct BFloat16 {
  uint16_t bits;
};

inline float read(float x) { return x; }
inline float read(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

inline void write(float x, float& y) { y = x; }
// Rounds to the nearest, to an even one of two.
inline void write(float x, BFloat16& y) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  y.bits = uint16_t(x == x ? rounded : 0x7fc0);
}

// exp(x) = 2^n exp(r) with |r| <= log(2) / 2, to about one unit in the last place; without branches,
// for loops over lanes.  From 2^127.5 on it is infinite, and never below 1e-38.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x > 89.0f ? 89.0f : x;
  const float n = std::nearbyint(x * 1.44269504f);
  // log(2) in two parts: n times the first is exact.
  const float r = std::fma(n, 2.12194440e-4f, std::fma(n, -0.693359375f, x));
  // Taylor's polynomial; the first term left out is r^8 / 8! < 6e-9.
  float p = std::fma(1.0f / 5040, r, 1.0f / 720);
  p = std::fma(p, r, 1.0f / 120);
  p = std::fma(p, r, 1.0f / 24);
  p = std::fma(p, r, 1.0f / 6);
  p = std::fma(p, r, 0.5f);
  p = std::fma(p, r, 1.0f);
  p = std::fma(p, r, 1.0f);
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

inline float sigmoid(float x) { return 1 / (1 + exponential(-x)); }

// The derivative of x sigmoid(x).
inline float silu_slope(float x) {
  const float s = sigmoid(x);
  return s * (1 + x * (1 - s));
}

// ---- SiLU of group normalisation ----

struct Shape {
  int64_t images, pixels, channels, groups;
  int64_t width() const { return channels / groups; }
};

// What one thread works on: some groups of channels of an image.
struct Part {
  int64_t image, group, groups, channel, channels;
};

template <typename Work>
void in_parts(const Shape& shape, int64_t threads, const Work& work) {
  const int64_t enough = (2 * threads + shape.images - 1) / shape.images;
  const int64_t count = std::min(shape.groups, enough);
#pragma omp parallel for collapse(2) num_threads(int(threads)) schedule(static)
  for (int64_t image = 0; image < shape.images; ++image)
    for (int64_t k = 0; k < count; ++k) {
      const int64_t first = shape.groups * k / count, end = shape.groups * (k + 1) / count;
      const int64_t width = shape.width();
      work(Part{image, first, end - first, first * width, (end - first) * width});
    }
}

// The pixels of a part: the address of each one's first channel.
template <typename T>
struct Rows {
  T* start;
  int64_t step;
  Rows(T* images, const Shape& s, const Part& part)
      : start(images + part.image * s.pixels * s.channels + part.channel), step(s.channels) {}
  T* operator[](int64_t pixel) const { return start + pixel * step; }
};

// Adds up N numbers for each channel, over pixels; `add(pixel, channel, numbers)` adds to them.
template <int N, typename Add>
std::vector<double> sums(int64_t pixels, int64_t channels, const Add& add) {
  constexpr int64_t few = 64;
  std::vector<float> part(N * channels);
  std::vector<double> total(N * channels);
  for (int64_t start = 0; start < pixels; start += few) {
    std::fill(part.begin(), part.end(), 0.0f);
    float* const numbers = part.data();
    for (int64_t pixel = start; pixel < std::min(pixels, start + few); ++pixel) add(pixel, numbers);
    for (int64_t k = 0; k < N * channels; ++k) total[k] += numbers[k];
  }
  return total;
}

// Calls `work(group, first channel, end)` for each group of a part, channels counted from its first.
template <typename Work>
void over_groups(const Shape& s, const Part& part, const Work& work) {
  for (int64_t k = 0; k < part.groups; ++k)
    work(part.image * s.groups + part.group + k, k * s.width(), (k + 1) * s.width());
}

// y = silu(weight (x + shift - mean) / deviation + bias), with statistics of groups.
template <typename T>
void normalize(const Shape& s, const void* x_, const float* shift, const float* weight,
               const float* bias, double eps, void* y_, float* mean, float* inverse,
               int64_t threads) {
  in_parts(s, threads, [&](const Part& part) {
    const Rows<const T> x(static_cast<const T*>(x_), s, part);
    const Rows<T> y(static_cast<T*>(y_), s, part);
    const float* const moved = shift + part.image * s.channels + part.channel;
    const float *const weights = weight + part.channel, *const biases = bias + part.channel;
    const int64_t channels = part.channels;
    std::vector<float> centres(channels), scales(channels);
    float *const centre = centres.data(), *const scale = scales.data();
    const double count = double(s.pixels) * s.width();

    const auto first = sums<1>(s.pixels, channels, [&](int64_t pixel, float* sum) {
      const T* const row = x[pixel];
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) sum[c] += read(row[c]);
    });
    over_groups(s, part, [&](int64_t group, int64_t begin, int64_t end) {
      double total = 0;
      for (int64_t c = begin; c < end; ++c) total += first[c] + double(s.pixels) * moved[c];
      mean[group] = float(total / count);
      for (int64_t c = begin; c < end; ++c) centre[c] = mean[group] - moved[c];
    });
    const auto second = sums<1>(s.pixels, channels, [&](int64_t pixel, float* sum) {
      const T* const row = x[pixel];
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        const float distance = read(row[c]) - centre[c];
        sum[c] += distance * distance;
      }
    });
    over_groups(s, part, [&](int64_t group, int64_t begin, int64_t end) {
      double total = 0;
      for (int64_t c = begin; c < end; ++c) total += second[c];
      inverse[group] = float(1 / std::sqrt(total / count + eps));
      for (int64_t c = begin; c < end; ++c) scale[c] = weights[c] * inverse[group];
    });
    for (int64_t pixel = 0; pixel < s.pixels; ++pixel) {
      const T* const row = x[pixel];
      T* const out = y[pixel];
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        const float z = (read(row[c]) - centre[c]) * scale[c] + biases[c];
        write(z * sigmoid(z), out[c]);
      }
    }
  });
}

// With n the normalised x + shift and d the gradient of weight n + bias,
//     grad_x = (weight d - mean(weight d) - n mean(weight d n)) / deviation,
// means over the group.  Gradients of weight and bias are of each image, those of the shift sums.
template <typename T>
void derive(const Shape& s, const void* grad_, const void* x_, const float* shift,
            const float* weight, const float* bias, const float* mean, const float* inverse,
            void* grad_x_, float* grad_shift, float* grad_weight, float* grad_bias,
            int64_t threads) {
  in_parts(s, threads, [&](const Part& part) {
    const Rows<const T> grad(static_cast<const T*>(grad_), s, part);
    const Rows<const T> x(static_cast<const T*>(x_), s, part);
    const Rows<T> grad_x(static_cast<T*>(grad_x_), s, part);
    const int64_t start = part.image * s.channels + part.channel, channels = part.channels;
    const float *const weights = weight + part.channel, *const biases = bias + part.channel;
    std::vector<float> centres(channels), scales(channels), means(channels), slopes(channels);
    float *const centre = centres.data(), *const scale = scales.data();
    float *const flat = means.data(), *const slope = slopes.data();
    const double count = double(s.pixels) * s.width();

    over_groups(s, part, [&](int64_t group, int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        centre[c] = mean[group] - shift[start + c];
        scale[c] = inverse[group];
      }
    });
    const auto found = sums<3>(s.pixels, channels, [&](int64_t pixel, float* sum) {
      const T *const row = x[pixel], *const of = grad[pixel];
      float *const with_n = sum + channels, *const of_n = sum + 2 * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        const float n = (read(row[c]) - centre[c]) * scale[c];
        const float d = read(of[c]) * silu_slope(n * weights[c] + biases[c]);
        sum[c] += d;
        with_n[c] += d * n;
        of_n[c] += n;
      }
    });
    const double *const d = found.data(), *const dn = d + channels, *const n = dn + channels;
    over_groups(s, part, [&](int64_t, int64_t begin, int64_t end) {
      double plain = 0, with_n = 0;
      for (int64_t c = begin; c < end; ++c) {
        plain += weights[c] * d[c];
        with_n += weights[c] * dn[c];
      }
      for (int64_t c = begin; c < end; ++c) {
        flat[c] = float(plain / count);
        slope[c] = float(with_n / count);
      }
    });
    for (int64_t c = 0; c < channels; ++c) {
      grad_bias[start + c] = float(d[c]);
      grad_weight[start + c] = float(dn[c]);
      const double sum = weights[c] * d[c] - double(s.pixels) * flat[c] - slope[c] * n[c];
      grad_shift[start + c] = float(scale[c] * sum);
    }
    for (int64_t pixel = 0; pixel < s.pixels; ++pixel) {
      const T *const row = x[pixel], *const of = grad[pixel];
      T* const out = grad_x[pixel];
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        const float n = (read(row[c]) - centre[c]) * scale[c];
        const float d = read(of[c]) * silu_slope(n * weights[c] + biases[c]);
        write(scale[c] * (weights[c] * d - flat[c] - n * slope[c]), out[c]);
      }
    }
  });
}

// ---- sum of two, divided ----

template <typename T>
void add(const void* x_, const void* h_, void* y_, int64_t count, double divisor,
         int64_t threads) {
  const T *const x = static_cast<const T*>(x_), *const h = static_cast<const T*>(h_);
  T* const y = static_cast<T*>(y_);
  const float d = float(divisor);
#pragma omp parallel for simd num_threads(int(threads)) schedule(static)
  for (int64_t k = 0; k < count; ++k) write((read(x[k]) + read(h[k])) / d, y[k]);
}

}  // namespace

// `dtype` is a place in `host.DTYPES`.
#define OF_TYPE(dtype, function, ...) \
  (dtype) ? function<BFloat16>(__VA_ARGS__) : function<float>(__VA_ARGS__)

extern "C" {

void group_norm_silu(int64_t dtype, const void* x, const float* shift, const float* weight,
                     const float* bias, void* y, float* mean, float* inverse, int64_t images,
                     int64_t pixels, int64_t channels, int64_t groups, double eps,
                     int64_t threads) {
  const Shape shape{images, pixels, channels, groups};
  OF_TYPE(dtype, normalize, shape, x, shift, weight, bias, eps, y, mean, inverse, threads);
}

void group_norm_silu_backward(int64_t dtype, const void* grad, const void* x, const float* shift,
                              const float* weight, const float* bias, const float* mean,
                              const float* inverse, void* grad_x, float* grad_shift,
                              float* grad_weight, float* grad_bias, int64_t images,
                              int64_t pixels, int64_t channels, int64_t groups,
                              int64_t threads) {
  const Shape shape{images, pixels, channels, groups};
  OF_TYPE(dtype, derive, shape, grad, x, shift, weight, bias, mean, inverse, grad_x, grad_shift,
          grad_weight, grad_bias, threads);
}

void rescaled_sum(int64_t dtype, const void* x, const void* h, void* y, int64_t count,
                  double divisor, int64_t threads) {
  OF_TYPE(dtype, add, x, h, y, count, divisor, threads);
}

}  // extern "C"
