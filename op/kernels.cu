// CUDA kernels of this package, with a C interface: no PyTorch headers, so that they compile in
// seconds and go with any version.  An operation is a struct that computes elements of its output;
// `launch` runs it on a GPU.  Compiled as plain C++ (g++ -x c++), `launch` is a loop instead and
// all else the same: that is how the arithmetic is tested without a GPU.

#include <algorithm>
#include <cstdint>

#if defined(__CUDACC__) || __has_include(<cuda_bf16.h>)
#define HAS_HALF
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

namespace {

// The type in which products are summed.
template <typename T>
struct Precise {
  using type = float;
};
template <>
struct Precise<double> {
  using type = double;
};

// Reads memory that no kernel writes, which lets the compiler move loads out of loops.
template <typename T>
HOST_DEVICE typename Precise<T>::type read(const T* address) {
#ifdef __CUDA_ARCH__
  return static_cast<typename Precise<T>::type>(__ldg(address));
#else
  return static_cast<typename Precise<T>::type>(*address);
#endif
}

// Rounds up, for negative numbers too.
HOST_DEVICE int ceil_div(int a, int b) { return a / b + (a % b > 0); }

// ---- upfirdn2d ----

// Images as (outer, height, width, inner): inner is 1 for NCHW, the channels for channels_last.
struct Shape {
  int64_t outer;
  int inner, in_h, in_w, out_h, out_w, taps_h, taps_w, up, down, top, left;
};

// With u[j] = x[j / up] where up divides j and 0 elsewhere, an output along one axis is
//     y[i] = sum over k of u[i down + k - before] filter[taps - 1 - k].
// Only every up-th k meets a pixel: the m-th of them is x[first + m], at k = tap + m up.
struct Window {
  int first, tap;
  HOST_DEVICE Window(int i, int up, int down, int before) {
    const int start = i * down - before;
    first = ceil_div(start, up);
    tap = first * up - start;
  }
};

// UP, DOWN and TAPS (on both axes) are known to the compiler where they are not 0.
template <typename T, int UP, int DOWN, int TAPS>
struct Upfirdn2d {
  const T* x;
  const T* filter;
  T* y;
  Shape s;

  HOST_DEVICE int64_t columns() const { return int64_t(s.out_h) * s.out_w * s.inner; }
  HOST_DEVICE int64_t rows() const { return s.outer; }

  // Writes the same pixel of several images: the places of its windows are computed once.
  HOST_DEVICE void operator()(int64_t column, int64_t first_row, int64_t row_step) const {
    const int up = UP ? UP : s.up, down = DOWN ? DOWN : s.down;
    const int pixel = int(column) / s.inner, lane = int(column) % s.inner;
    const Window rows_in(pixel / s.out_w, up, down, s.top);
    const Window columns_in(pixel % s.out_w, up, down, s.left);
    const int64_t in_plane = int64_t(s.in_h) * s.in_w * s.inner, out_plane = columns();
    for (int64_t row = first_row; row < s.outer; row += row_step) {
      const T* plane = x + row * in_plane + lane;
      y[row * out_plane + column] = T(sum(plane, rows_in, columns_in));
    }
  }

  HOST_DEVICE typename Precise<T>::type sum(const T* plane, Window v, Window h) const {
    const int up = UP ? UP : s.up;
    const int taps_h = TAPS ? TAPS : s.taps_h, taps_w = TAPS ? TAPS : s.taps_w;
    typename Precise<T>::type total = 0;
#pragma unroll
    for (int m = 0; m < (taps_h + up - 1) / up; ++m) {
      const int i = v.first + m, k = v.tap + m * up;
      if (i < 0 || i >= s.in_h || k >= taps_h) continue;
#pragma unroll
      for (int n = 0; n < (taps_w + up - 1) / up; ++n) {
        const int j = h.first + n, l = h.tap + n * up;
        if (j < 0 || j >= s.in_w || l >= taps_w) continue;
        total += read(plane + (int64_t(i) * s.in_w + j) * s.inner) *
                 read(filter + (taps_h - 1 - k) * taps_w + taps_w - 1 - l);
      }
    }
    return total;
  }
};

// ---- bias, leaky ReLU, gain ----

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T items[V];
};

// y = gain leaky_relu(x + bias), with the side of the kink told by the sign of `gate` where there
// is one.  Moves V elements at a time.  Index is wide enough to count all.
template <typename T, int V, typename Index>
struct Leaky {
  using Real = typename Precise<T>::type;
  const T* x;
  const T* bias;
  const T* gate;
  T* y;
  Index count, channels, inner;
  Real slope, gain;

  HOST_DEVICE int64_t columns() const { return int64_t(count / V); }
  HOST_DEVICE int64_t rows() const { return 1; }

  HOST_DEVICE void operator()(int64_t column, int64_t, int64_t) const {
    const auto values = reinterpret_cast<const Pack<T, V>*>(x)[column];
    const auto gates = reinterpret_cast<const Pack<T, V>*>(gate ? gate : x)[column];
    const Index channel = bias ? Index(column) * V / inner % channels : 0;
    Pack<T, V> result;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      Real value = Real(values.items[v]);
      // A pack lies in one channel, or has one element of each of V channels.
      if (bias) value += read(bias + channel + (inner == 1 ? v : 0));
      const Real side = gate ? Real(gates.items[v]) : value;
      result.items[v] = T(gain * (side > 0 ? value : slope * value));
    }
    reinterpret_cast<Pack<T, V>*>(y)[column] = result;
  }
};

// ---- launch ----

#ifdef __CUDACC__

constexpr int THREADS = 256, ROWS_EACH = 4;

template <typename Work>
__global__ void __launch_bounds__(THREADS) run(Work work) {
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y;
  if (column < work.columns()) work(column, row, int64_t(gridDim.y) * blockDim.y);
}

const char* message(cudaError_t status) {
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// Blocks cover small images with several rows of threads, one for each image.
template <typename Work>
const char* launch(const Work& work, int device, void* stream) {
  // A CUDA runtime other than PyTorch's has a current device of its own.
  if (const char* error = message(cudaSetDevice(device))) return error;
  int wide = 1;
  while (wide < THREADS && wide < work.columns()) wide *= 2;
  const dim3 block(wide, work.rows() > 1 ? THREADS / wide : 1);
  const int64_t across = (work.columns() + wide - 1) / wide;
  const int64_t rows = int64_t(block.y) * ROWS_EACH, along = (work.rows() + rows - 1) / rows;
  const dim3 grid(unsigned(across), unsigned(std::min<int64_t>(along, 65535)));
  run<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(work);
  return message(cudaGetLastError());
}

#else

template <typename Work>
const char* launch(const Work& work, int, void*) {
  // As on a GPU, every element is made by itself and several rows share a call.
  const int64_t step = std::min<int64_t>(3, work.rows());
  for (int64_t column = 0; column < work.columns(); ++column)
    for (int64_t row = 0; row < step; ++row) work(column, row, step);
  return nullptr;
}

#endif

// ---- from arguments to types ----

template <typename T, int UP, int DOWN, int TAPS>
const char* resample(const void* x, const void* filter, void* y, const Shape& shape, int device,
                     void* stream) {
  const Upfirdn2d<T, UP, DOWN, TAPS> work{static_cast<const T*>(x), static_cast<const T*>(filter),
                                          static_cast<T*>(y), shape};
  return launch(work, device, stream);
}

// The four-tap filters of the networks have kernels of their own.
template <typename T>
const char* resample(const void* x, const void* filter, void* y, const Shape& s, int device,
                     void* stream) {
  auto kernel = resample<T, 0, 0, 0>;
  if (s.taps_h == 4 && s.taps_w == 4) {
    if (s.up == 1 && s.down == 1) kernel = resample<T, 1, 1, 4>;
    if (s.up == 2 && s.down == 1) kernel = resample<T, 2, 1, 4>;
    if (s.up == 1 && s.down == 2) kernel = resample<T, 1, 2, 4>;
  }
  return kernel(x, filter, y, s, device, stream);
}

struct Activation {
  const void *x, *bias, *gate;
  void* y;
  int64_t count, channels, inner;
  double slope, gain;
};

template <typename T, int V, typename Index>
const char* activate(const Activation& a, int device, void* stream) {
  using Real = typename Precise<T>::type;
  const Leaky<T, V, Index> work{static_cast<const T*>(a.x),
                                static_cast<const T*>(a.bias),
                                static_cast<const T*>(a.gate),
                                static_cast<T*>(a.y),
                                Index(a.count),
                                Index(a.channels),
                                Index(a.inner),
                                Real(a.slope),
                                Real(a.gain)};
  return launch(work, device, stream);
}

bool whole_packs(const Activation& a, int bytes, int items) {
  const auto aligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  const bool channels_fit = !a.bias || (a.inner == 1 ? a.channels : a.inner) % items == 0;
  return aligned(a.x) && aligned(a.y) && aligned(a.gate) && a.count % items == 0 && channels_fit;
}

template <typename T>
const char* activate(const Activation& a, int device, void* stream) {
  constexpr int BYTES = 16, V = BYTES / sizeof(T);
  const bool small = a.count < INT32_MAX, packs = whole_packs(a, BYTES, V);
  auto kernel = packs ? activate<T, V, uint64_t> : activate<T, 1, uint64_t>;
  if (small) kernel = packs ? activate<T, V, uint32_t> : activate<T, 1, uint32_t>;
  return kernel(a, device, stream);
}

}  // namespace

// The types, in the order of DTYPES in dispatch.py.
#ifdef HAS_HALF
#define OF_TYPE(dtype, function, ...)                          \
  switch (dtype) {                                             \
    case 0:                                                    \
      return function<float>(__VA_ARGS__);                     \
    case 1:                                                    \
      return function<double>(__VA_ARGS__);                    \
    case 2:                                                    \
      return function<__half>(__VA_ARGS__);                    \
    case 3:                                                    \
      return function<__nv_bfloat16>(__VA_ARGS__);             \
  }                                                            \
  return "unknown dtype"
#else
#define OF_TYPE(dtype, function, ...)                          \
  switch (dtype) {                                             \
    case 0:                                                    \
      return function<float>(__VA_ARGS__);                     \
    case 1:                                                    \
      return function<double>(__VA_ARGS__);                    \
  }                                                            \
  return "compiled without the half-precision types"
#endif

// Each returns null, or an error message.
extern "C" {

const char* upfirdn2d(int64_t dtype, const void* x, const void* filter, void* y, int64_t outer,
                      int64_t inner, int64_t in_h, int64_t in_w, int64_t out_h, int64_t out_w,
                      int64_t taps_h, int64_t taps_w, int64_t up, int64_t down, int64_t top,
                      int64_t left, int64_t device, void* stream) {
  const Shape shape{outer,      int(inner),  int(in_h),   int(in_w), int(out_h), int(out_w),
                    int(taps_h), int(taps_w), int(up),    int(down), int(top),   int(left)};
  OF_TYPE(dtype, resample, x, filter, y, shape, int(device), stream);
}

const char* leaky_relu(int64_t dtype, const void* x, const void* bias, const void* gate, void* y,
                       int64_t count, int64_t channels, int64_t inner, double slope, double gain,
                       int64_t device, void* stream) {
  const Activation activation{x, bias, gate, y, count, channels, inner, slope, gain};
  OF_TYPE(dtype, activate, activation, int(device), stream);
}

// Whether the driver can run the kernels of this file on a device.
const char* probe(int64_t device) {
#ifdef __CUDACC__
  if (const char* error = message(cudaSetDevice(int(device)))) return error;
  cudaFuncAttributes attributes;
  return message(cudaFuncGetAttributes(&attributes, run<Upfirdn2d<float, 0, 0, 0>>));
#else
  return nullptr;
#endif
}

}  // extern "C"
