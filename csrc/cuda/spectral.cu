// Spectral normalisation on an NVIDIA GPU: the passes of triton_kernels/spectral.py, one launch per pass and layer.
#include "../args/spectral.h"
#include "tile.h"

namespace pyflow::cuda {
namespace {

// sum of all threads' values over the block; every thread gets it
template <class T>
__device__ T total(T own) {
  __syncthreads();
  return fold(Group<T, kEach>{{own, T(0), T(0), T(0)}}, kTile);
}

template <class T>
__device__ T root(T x) {
  if constexpr (sizeof(T) == 8) {
    return __dsqrt_rn(x);
  } else {
    return __fsqrt_rn(x);
  }
}

// y = W v for one block of rows, and the block's part of W' y: partial (row blocks, cols)
template <class T>
__global__ void __launch_bounds__(kThreads, 2) product(View w, View v, T* y, T* partial, int64_t rows, int64_t cols) {
  __shared__ T sums[kSpectralBlock];
  const int64_t first = blockIdx.x * kSpectralBlock;
  const int count = int(rows - first < kSpectralBlock ? rows - first : kSpectralBlock);
  for (int r = 0; r < count; ++r) {
    T acc = T(0);
    for (int64_t c = threadIdx.x; c < cols; c += kThreads) {
      acc = fma_(read<T>(w, (first + r) * cols + c), read<T>(v, c), acc);
    }
    const T sum = total(acc);
    if (threadIdx.x == 0) sums[r] = y[first + r] = sum;
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < cols; c += kThreads) {
    T acc = T(0);
    for (int r = 0; r < count; ++r) acc = fma_(sums[r], read<T>(w, (first + r) * cols + c), acc);
    partial[blockIdx.x * cols + c] = acc;
  }
}

// sums partial (row blocks, cols) to z (cols,)
template <class T>
__global__ void __launch_bounds__(kThreads, 2) reduce(const T* partial, T* z, int64_t blocks, int64_t cols) {
  const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= cols) return;
  T acc = T(0);
  for (int64_t b = 0; b < blocks; ++b) acc += partial[b * cols + c];
  z[c] = acc;
}

struct Finish {
  View y, z, u, v, u_out, v_out, sigma;
  int64_t rows, cols;
  bool vector, iterates;
};

// norms of W v and W' u, then sigma and new u and v; if a norm vanishes, u and v are unchanged and sigma is u' W v
template <class T>
__global__ void __launch_bounds__(kThreads, 2) finish(const __grid_constant__ Finish a) {
  T acc = T(0), left = T(1), right = T(1);
  bool stalls = true;
  if (a.iterates) {
    if (!a.vector) {
      for (int64_t r = threadIdx.x; r < a.rows; r += kThreads) acc = fma_(read<T>(a.y, r), read<T>(a.y, r), acc);
      left = root(total(acc));
    }
    stalls = spectral_vanishes(double(left));
    if (stalls) left = T(1);
    acc = T(0);
    for (int64_t c = threadIdx.x; c < a.cols; c += kThreads) {
      const T part = read<T>(a.z, c) / left;
      acc = fma_(part, part, acc);
    }
    right = root(total(acc));
    stalls = !a.vector && (stalls || spectral_vanishes(double(right)));
  }
  T sigma = right;
  if (stalls) {
    acc = T(0);
    for (int64_t r = threadIdx.x; r < a.rows; r += kThreads) acc = fma_(read<T>(a.y, r), read<T>(a.u, r), acc);
    sigma = total(acc);
  }
  if (a.iterates && !a.vector) {
    for (int64_t r = threadIdx.x; r < a.rows; r += kThreads) {
      write(a.u_out, r, stalls ? read<T>(a.u, r) : read<T>(a.y, r) / left);
    }
    for (int64_t c = threadIdx.x; c < a.cols; c += kThreads) {
      write(a.v_out, c, stalls ? read<T>(a.v, c) : read<T>(a.z, c) / left / right);
    }
  }
  if (threadIdx.x == 0) write(a.sigma, 0, T(spectral_floored(double(sigma))));
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) scale(View w, View out, View sigma, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) write(out, i, read<T>(w, i) / read<T>(sigma, 0));
}

// one block's part of sum(grad * W)
template <class T>
__global__ void __launch_bounds__(kThreads, 2) dot(View grad, View w, T* partial, int64_t count) {
  T acc = T(0);
  for (int k = 0; k < kEach; ++k) {
    const int64_t i = int64_t(blockIdx.x) * kTile + k * kThreads + threadIdx.x;
    if (i < count) acc = fma_(read<T>(grad, i), read<T>(w, i), acc);
  }
  const T sum = total(acc);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    slope_of(const T* partial, View grad_sigma, View sigma, T* slope, int64_t blocks) {
  T acc = T(0);
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) acc += partial[i];
  const T sum = total(acc);
  if (threadIdx.x > 0) return;
  const T s = read<T>(sigma, 0);
  *slope = spectral_vanishes(double(s)) ? T(0) : read<T>(grad_sigma, 0) - sum / s / s;
}

struct Gradient {
  View grad, w, u, v, sigma, out;
  int64_t count, cols;
  bool vector;
};

// grad / sigma + slope u v'; for a vector, u v' is W / sigma
template <class T>
__global__ void __launch_bounds__(kThreads, 2) gradient(const __grid_constant__ Gradient a, const T* slope) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.count) return;
  const T inverse = T(1) / read<T>(a.sigma, 0);
  const T left = *slope * (a.vector ? inverse : read<T>(a.u, i / a.cols));
  const T right = a.vector ? read<T>(a.w, i) : read<T>(a.v, i % a.cols);
  write(a.out, i, spectral_gradient_of(read<T>(a.grad, i), inverse, left, right));
}

template <class T>
View view_of(T* scratch) {
  View v;
  v.data = (char*)scratch;
  v.dtype = sizeof(T) == 8 ? DType::f64 : DType::f32;
  return v;
}

template <class T>
void normalize(const SpectralLayer& l, int64_t n_iter, Stream stream) {
  const int64_t rows = l.space.rows, cols = l.space.cols;
  if (!l.v.data) {
    launch(finish<T>, 1, stream, Finish{l.w, l.w, {}, {}, {}, {}, l.sigma, rows, cols, true, true});
  } else {
    T *partial = (T*)l.scratch, *z = partial + l.units * cols, *y = z + cols, *left = y + rows, *right = left + rows;
    View u = l.u, v = l.v;
    for (int64_t i = 0; i < (n_iter > 0 ? n_iter : 1); ++i) {
      const bool last = i + 1 >= n_iter;
      launch(product<T>, l.units, stream, l.w, v, y, partial, rows, cols);
      if (n_iter > 0) launch(reduce<T>, ceil_div(cols, kThreads), stream, partial, z, l.units, cols);
      // between rounds u and v stay in the compute type
      const View to_u = last ? l.u_out : view_of(left), to_v = last ? l.v_out : view_of(right);
      const Finish a{view_of(y), view_of(z), u, v, to_u, to_v, l.sigma, rows, cols, false, n_iter > 0};
      launch(finish<T>, 1, stream, a);
      u = to_u;
      v = to_v;
    }
  }
  const int64_t count = rows * cols;
  if (count > 0) launch(scale<T>, ceil_div(count, kThreads), stream, l.w, l.out, l.sigma, count);
}

template <class T>
void normalize_backward(const SpectralLayer& l, Stream stream) {
  const int64_t count = l.space.rows * l.space.cols, tiles = gpu_tiles(l);
  if (count == 0) return;
  T *partial = (T*)l.scratch, *slope = partial + tiles;
  launch(dot<T>, tiles, stream, l.grad, l.w, partial, count);
  launch(slope_of<T>, 1, stream, partial, l.grad_sigma, l.sigma, slope, tiles);
  const Gradient a{l.grad, l.w, l.u, l.v, l.sigma, l.out, count, l.space.cols, !l.v.data};
  launch(gradient<T>, ceil_div(count, kThreads), stream, a, slope);
}

}  // namespace

void spectral_normalize(const SpectralArgs& a, Stream stream) {
  for (int64_t i = 0; i < a.count; ++i) {
    const SpectralLayer& l = a.layers[i];
    l.f64 ? normalize<double>(l, a.n_iter, stream) : normalize<float>(l, a.n_iter, stream);
  }
}

void spectral_normalize_backward(const SpectralArgs& a, Stream stream) {
  for (int64_t i = 0; i < a.count; ++i) {
    const SpectralLayer& l = a.layers[i];
    l.f64 ? normalize_backward<double>(l, stream) : normalize_backward<float>(l, stream);
  }
}

}  // namespace pyflow::cuda
