// Spectral normalisation on an NVIDIA GPU: the passes of triton_kernels/spectral.py, one launch per pass
// and layer.
#include <vector>

#include "../ops/spectral.h"
#include "tile.h"

namespace pyflow::cuda {
namespace {

using Tensors = std::vector<Tensor>;

constexpr int64_t kRows = 16;  // rows of W per block

View flat(const Tensor& t) {
  View v;
  v.data = (char*)t.data_ptr();
  v.dtype = dtype_of(t);
  return v;
}

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
  __shared__ T sums[kRows];
  const int64_t first = blockIdx.x * kRows;
  const int count = int(rows - first < kRows ? rows - first : kRows);
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

// norms of W v and W' u, then new u and v (unchanged where a norm vanishes) and sigma
template <class T>
__global__ void __launch_bounds__(kThreads, 2) finish(const __grid_constant__ Finish a) {
  T acc = T(0), sigma;
  if (a.iterates) {
    T left = T(1);
    if (!a.vector) {
      for (int64_t r = threadIdx.x; r < a.rows; r += kThreads) acc = fma_(read<T>(a.y, r), read<T>(a.y, r), acc);
      left = root(total(acc));
    }
    const bool no_left = spectral_vanishes(double(left));
    const T by_left = no_left ? T(1) : left;
    acc = T(0);
    for (int64_t c = threadIdx.x; c < a.cols; c += kThreads) {
      const T part = read<T>(a.z, c) / by_left;
      acc = fma_(part, part, acc);
    }
    const T right = root(total(acc));
    const bool no_right = spectral_vanishes(double(right)), stalls = no_left || no_right;
    sigma = no_left ? T(0) : right;
    for (int64_t r = threadIdx.x; !a.vector && r < a.rows; r += kThreads) {
      write(a.u_out, r, stalls ? read<T>(a.u, r) : read<T>(a.y, r) / by_left);
    }
    for (int64_t c = threadIdx.x; !a.vector && c < a.cols; c += kThreads) {
      write(a.v_out, c, stalls ? read<T>(a.v, c) : read<T>(a.z, c) / by_left / right);
    }
  } else {
    for (int64_t r = threadIdx.x; r < a.rows; r += kThreads) acc = fma_(read<T>(a.y, r), read<T>(a.u, r), acc);
    sigma = total(acc);
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

Tensor dense(const Tensor& t) {
  if (t.is_contiguous()) return t;
  const auto sizes = t.sizes();
  Tensor out = new_empty(t, sizes.data(), int64_t(sizes.size()), t.scalar_type());
  return torch::stable::copy_(out, t);
}

// the values with the strides of empty_like(like)
Tensor as(const Tensor& like, const Tensor& values) {
  if (like.is_contiguous()) return values;
  Tensor out = new_like(like);
  return torch::stable::copy_(out, values);
}

Tensor vector_like(const Tensor& like, int64_t n, ScalarType dtype) { return new_empty(like, &n, 1, dtype); }

Tensor copied(const Tensor& t) {
  Tensor out = vector_like(t, t.numel(), t.scalar_type());
  return torch::stable::copy_(out, t);
}

struct Layer {
  Tensor weight, u, v, sigma;
};

template <class T>
Layer normalized(const Tensor& weight, Tensor u, Tensor v, int64_t n_iter) {
  const Tensor w = dense(weight);
  const bool vector = w.dim() == 1;
  const ScalarType dtype = sum_dtype(w);
  const int64_t rows = vector ? 1 : w.size(0), count = w.numel(), cols = count / rows;
  const Tensor sigma = new_empty(w, nullptr, 0, dtype);
  u = dense(u);
  v = dense(v);
  Tensor new_u = copied(u), new_v = copied(v);
  if (vector) {
    const Finish a{flat(w), flat(w), flat(u), flat(v), flat(new_u), flat(new_v), flat(sigma), 1, cols, true, true};
    launch(finish<T>, 1, w, a);
  } else {
    const int64_t blocks = ceil_div(rows, kRows);
    const Tensor y = vector_like(w, rows, dtype), z = vector_like(w, cols, dtype);
    const Tensor partial = vector_like(w, blocks * cols, dtype);
    T* parts = (T*)partial.data_ptr();
    for (int64_t i = 0; i < (n_iter > 0 ? n_iter : 1); ++i) {
      const bool last = i + 1 >= n_iter;
      // between rounds u and v stay in the compute dtype
      const Tensor to_u = last ? new_u : vector_like(w, rows, dtype), to_v = last ? new_v : vector_like(w, cols, dtype);
      launch(product<T>, blocks, w, flat(w), flat(v), (T*)y.data_ptr(), parts, rows, cols);
      if (n_iter > 0) launch(reduce<T>, ceil_div(cols, kThreads), w, (const T*)parts, (T*)z.data_ptr(), blocks, cols);
      const Finish a{flat(y),     flat(z), flat(u), flat(v), flat(to_u), flat(to_v),
                     flat(sigma), rows,    cols,    false,   n_iter > 0};
      launch(finish<T>, 1, w, a);
      u = to_u;
      v = to_v;
    }
  }
  const Tensor out = new_like(w);
  if (count > 0) launch(scale<T>, ceil_div(count, kThreads), w, flat(w), flat(out), flat(sigma), count);
  return {as(weight, out), new_u, new_v, sigma};
}

template <class T>
Tensor gradient_of(const Tensor& grad, const Tensor& grad_sigma, const Tensor& weight, const Tensor& left,
                   const Tensor& right, const Tensor& sigma) {
  const Tensor w = dense(weight), g = dense(grad), u = dense(left), v = dense(right);
  const Tensor out = new_like(w);
  const int64_t count = w.numel();
  if (count == 0) return as(weight, out);
  const int64_t blocks = ceil_div(count, kTile);
  const ScalarType dtype = sigma.scalar_type();
  const Tensor partial = vector_like(sigma, blocks, dtype), slope = vector_like(sigma, 1, dtype);
  launch(dot<T>, blocks, w, flat(g), flat(w), (T*)partial.data_ptr(), count);
  launch(slope_of<T>, 1, w, (const T*)partial.data_ptr(), flat(grad_sigma), flat(sigma), (T*)slope.data_ptr(), blocks);
  const Gradient a{flat(g), flat(w), flat(u), flat(v), flat(sigma), flat(out), count, count / w.size(0), w.dim() == 1};
  launch(gradient<T>, ceil_div(count, kThreads), w, a, (const T*)slope.data_ptr());
  return as(weight, out);
}

Tensors spectral_normalize(Tensors weights, Tensors u, Tensors v, int64_t n_iter) {
  const size_t n = weights.size();
  Tensors out(4 * n);
  for (size_t i = 0; i < n; ++i) {
    const auto one = weights[i].scalar_type() == ScalarType::Double ? normalized<double> : normalized<float>;
    const Layer layer = one(weights[i], u[i], v[i], n_iter);
    out[i] = layer.weight;
    out[n + i] = layer.u;
    out[2 * n + i] = layer.v;
    out[3 * n + i] = layer.sigma;
  }
  return out;
}

Tensors spectral_normalize_backward(Tensors grads, Tensors grad_sigmas, Tensors weights, Tensors u, Tensors v,
                                    Tensors sigmas) {
  Tensors out;
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto one = weights[i].scalar_type() == ScalarType::Double ? gradient_of<double> : gradient_of<float>;
    out.push_back(one(grads[i], grad_sigmas[i], weights[i], u[i], v[i], sigmas[i]));
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyflow_cuda, CUDA, m) {
  m.impl("spectral_normalize", TORCH_BOX(&spectral_normalize));
  m.impl("spectral_normalize_backward", TORCH_BOX(&spectral_normalize_backward));
}

}  // namespace pyflow::cuda
