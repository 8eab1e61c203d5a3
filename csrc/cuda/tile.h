// Shared by the CUDA kernels: how rows x columns are split into blocks, loads and stores of four neighbours of a
// strided tensor of any dtype, and sums whose bits depend on the number of columns alone. The split and the order of
// every sum match triton_kernels/_launch.py and _tiles.py.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "../math/half.h"
#include "../torch/tensor.h"

namespace pyflow::cuda {

constexpr int kThreads = 256;
constexpr int kEach = 4;                 // neighbouring columns per thread
constexpr int kTile = kThreads * kEach;  // elements a block handles per loop iteration
constexpr int64_t kLongest = 4 * kTile;  // most columns of a row in one block

inline int64_t power_of_two(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Cut {
  int64_t cols, rows;         // shape of a tile; cols / kEach threads share a row
  int64_t segment, segments;  // columns of a row per block, and blocks per row
  int64_t blocks;
};

inline Cut cut(const Space& s) {
  Cut c;
  c.cols = s.cols > 2 * kTile ? kTile : std::clamp<int64_t>(power_of_two(s.cols), kEach, kTile / 2);
  c.rows = kTile / c.cols;
  c.segment = std::min(c.cols * ceil_div(s.cols, c.cols), kLongest);
  c.segments = ceil_div(s.cols, c.segment);
  c.blocks = ceil_div(s.rows, c.rows) * c.segments;
  return c;
}

// whether kEach neighbours are always 16 aligned bytes of float32; true for an absent tensor
inline bool whole_vectors(const Space& s, const View& v) {
  if (!v.data) return true;
  bool fits = v.dtype == DType::f32 && s.col_dims == 1 && s.cols % kEach == 0 && v.stride[s.row_dims] == 1 &&
              uintptr_t(v.data) % 16 == 0;
  for (int d = 0; d < s.row_dims; ++d) fits = fits && v.stride[d] % kEach == 0;
  return fits;
}

template <class Kernel, class... Args>
void launch(Kernel kernel, int64_t blocks, const Tensor& on, const Args&... args) {
  const int32_t device = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  kernel<<<dim3(unsigned(blocks)), kThreads, 0, cudaStream_t(stream)>>>(args...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

__device__ inline int64_t row_offset(const Space& s, const View& v, int64_t row) {
  int64_t offset = 0;
  for (int d = s.row_dims - 1; d > 0; --d) {
    offset += row % s.size[d] * v.stride[d];
    row /= s.size[d];
  }
  return offset + row * v.stride[0];
}

__device__ inline int64_t col_offset(const Space& s, const View& v, int64_t col) {
  int64_t offset = 0;
  for (int d = s.row_dims + s.col_dims - 1; d > s.row_dims; --d) {
    offset += col % s.size[d] * v.stride[d];
    col /= s.size[d];
  }
  return offset + col * v.stride[s.row_dims];
}

template <class T>
__device__ T read(const View& v, int64_t at) {
  switch (v.dtype) {
    case DType::f32: return T(((const float*)v.data)[at]);
    case DType::f64: return T(((const double*)v.data)[at]);
    case DType::bf16: return T(bf16_to_float(((const uint16_t*)v.data)[at]));
    case DType::f16: return T(half_to_float(((const uint16_t*)v.data)[at]));
    default: return ((const uint8_t*)v.data)[at] ? T(1) : T(0);
  }
}

template <class T>
__device__ void write(const View& v, int64_t at, T value) {
  switch (v.dtype) {
    case DType::f32: ((float*)v.data)[at] = float(value); break;
    case DType::f64: ((double*)v.data)[at] = double(value); break;
    case DType::bf16: ((uint16_t*)v.data)[at] = float_to_bf16(float(value)); break;
    case DType::f16: ((uint16_t*)v.data)[at] = float_to_half(float(value)); break;
    default: break;  // masks are read only
  }
}

template <class T, int N>
struct alignas(N == kEach ? 16 : sizeof(T)) Group {
  T v[N];
};

// Position of a thread's access: one row, and either kEach columns from `col` as one vector or the single column `col`.
struct Spot {
  int64_t row, col;
  bool inside;
};

__device__ inline Spot spot(const Space& s, const Cut& c, int64_t row_block, int64_t first_col, int i) {
  const int width = int(c.cols) / kEach;  // threads per row
  const int64_t row = row_block * c.rows + threadIdx.x / width;
  const int64_t col = first_col + int64_t(threadIdx.x % width) * kEach + i;
  return {row, col, row < s.rows && col < s.cols};
}

template <int N, class T>
__device__ Group<T, N> load(const Space& s, const View& v, const Spot& p) {
  if (!p.inside) return {};
  const int64_t row = row_offset(s, v, p.row);
  if constexpr (N == kEach) {
    return *(const Group<T, N>*)((const T*)v.data + row + p.col);
  } else {
    return {read<T>(v, row + col_offset(s, v, p.col))};
  }
}

template <int N, class T>
__device__ void store(const Space& s, const View& v, const Spot& p, const Group<T, N>& values) {
  if (!p.inside) return;
  const int64_t row = row_offset(s, v, p.row);
  if constexpr (N == kEach) {
    *(Group<T, N>*)((T*)v.data + row + p.col) = values;
  } else {
    write(v, row + col_offset(s, v, p.col), values.v[0]);
  }
}

// bit i is set if the mask passes column i of the group through
template <int N>
__device__ unsigned load_mask(const Space& s, const View& v, const Spot& p) {
  unsigned passes = 0;
  if (!v.data || !p.inside) return passes;
  const int64_t row = row_offset(s, v, p.row);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    passes |= unsigned(((const uint8_t*)v.data)[row + col_offset(s, v, p.col + i)] != 0) << i;
  }
  return passes;
}

// Sum over the columns of a tile by pairs of neighbours: within the thread, between threads of a warp, between warps.
// Every thread of the row gets the result. All threads of the block must call it.
template <class T>
__device__ T fold(const Group<T, kEach>& own, int cols) {
  const int width = cols / kEach;
  T sum = (own.v[0] + own.v[1]) + (own.v[2] + own.v[3]);
  for (int d = 1; d < width && d < 32; d *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
  if (width <= 32) return sum;
  constexpr int kWarps = kThreads / 32;
  __shared__ T of_warp[kWarps];
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  const int warps = width / 32, first = threadIdx.x / width * warps;
  T t[kWarps];
#pragma unroll
  for (int i = 0; i < kWarps; ++i) t[i] = i < warps ? of_warp[first + i] : T(0);
#pragma unroll
  for (int n = kWarps / 2; n > 0; n /= 2) {
#pragma unroll
    for (int i = 0; i < n; ++i) t[i] = t[2 * i] + t[2 * i + 1];
  }
  return t[0];
}

// sums partial (rows, segments) to out (rows,); one tile of columns steps along each row
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    sum_segments(const T* partial, T* out, int64_t rows, int64_t segments, int cols) {
  const int width = cols / kEach;
  const int64_t row = int64_t(blockIdx.x) * (kThreads / width) + threadIdx.x / width;
  Group<T, kEach> acc{};
  for (int64_t first = 0; first < segments; first += cols) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t c = first + threadIdx.x % width * kEach + i;
      if (row < rows && c < segments) acc.v[i] += partial[row * segments + c];
    }
  }
  const T sum = fold(acc, cols);
  if (row < rows && threadIdx.x % width == 0) out[row] = sum;
}

template <class T>
void launch_sum_segments(const Tensor& partial, const Tensor& out, int64_t rows, int64_t segments) {
  const int64_t cols = std::clamp<int64_t>(power_of_two(segments), kEach, kTile);
  launch(sum_segments<T>, ceil_div(rows, kTile / cols), out, (const T*)partial.data_ptr(), (T*)out.data_ptr(), rows,
         segments, int(cols));
}

inline ScalarType sum_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace pyflow::cuda
