// Shared by the CUDA kernels: the loop of a block over its columns, loads and stores of four neighbours of a strided
// tensor of any dtype, and sums whose bits depend on the number of columns alone. The split (tiles/plan.h) and the
// order of every sum match triton_kernels/_launch.py and _tiles.py.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../math/half.h"
#include "../tiles/plan.h"
#include "shared.h"

namespace pyflow::cuda {

// whether kEach neighbours are always 16 aligned bytes of float32; true for an absent tensor
inline bool whole_vectors(const Space& s, const View& v) {
  if (!v.data) return true;
  bool fits = v.dtype == DType::f32 && s.col_dims == 1 && s.cols % kEach == 0 && v.stride[s.row_dims] == 1 &&
              uintptr_t(v.data) % 16 == 0;
  for (int d = 0; d < s.row_dims; ++d) fits = fits && v.stride[d] % kEach == 0;
  return fits;
}

template <class... Views>
bool whole_vectors(const Space& s, const View& first, const Views&... others) {
  return (whole_vectors(s, first) && ... && whole_vectors(s, others));
}

// Calls f(columns per access as a constant, T()), which choose the variant of a kernel: one double at a time; kEach
// float32 at a time if `whole`; else one at a time, of any dtype and stride, computed in float32.
template <class Args, class F>
void with_types(const Args& a, bool whole, F f) {
  using One = std::integral_constant<int, 1>;
  if (a.f64) {
    f(One{}, double());
  } else if (whole) {
    f(std::integral_constant<int, kEach>{}, float());
  } else {
    f(One{}, float());
  }
}

constexpr int kAny = -1;  // an enum's value selected at run time, where binary size matters more than speed

// with_types for kernels that depend on an enum's value: it is the first argument of f, as an int constant for whole
// vectors and kAny for the others
template <class Args, class Enum, class F>
void with_types(const Args& a, Enum value, bool whole, F f) {
  using One = std::integral_constant<int, 1>;
  using Any = std::integral_constant<int, kAny>;
  if (a.f64) {
    f(Any{}, One{}, double());
  } else if (whole) {
    as_constant(value, [&](auto v) {
      f(std::integral_constant<int, int(v.value)>{}, std::integral_constant<int, kEach>{}, float());
    });
  } else {
    f(Any{}, One{}, float());
  }
}

// calls f with the value as a compile-time constant: V, or if that is kAny, `value` by a switch
template <int V, class Enum, class F>
__device__ void as_known(Enum value, F f) {
  if constexpr (V == kAny) {
    as_constant(value, f);
  } else {
    f(std::integral_constant<Enum, Enum(V)>{});
  }
}

// errors are found by launch_error
template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), int64_t blocks, Stream stream, const Args&... args) {
#if !defined(PYFLOW_EMULATED)
  kernel<<<dim3(unsigned(blocks)), kThreads, 0, stream>>>(args...);
#else
  (void)stream;
  emulated::launch(kernel, unsigned(blocks), kThreads, args...);
#endif
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

template <class T>
__device__ T row_value(const RowView& v, int64_t row) {
  return v.view.data ? read<T>(v.view, row * v.view.stride[0]) : T(v.value);
}

template <class T>
__device__ void write_row_value(const RowView& v, int64_t row, T value) {
  write(v.view, row * v.view.stride[0], value);
}

// number of this thread in a grid of one thread per element
__device__ inline int64_t global_thread() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }

template <class T, int N>
struct alignas(N == kEach ? 16 : sizeof(T)) Group {
  T v[N];
};

// Position of a thread's access: one row, and either kEach columns from `col` as one vector or the single column `col`.
struct Spot {
  int64_t row, col;
  bool inside;
};

// of the i-th column of this thread in the tile at row block `row_block` and column `first_col`
__device__ inline Spot spot(const Space& s, const Plan& p, int64_t row_block, int64_t first_col, int i) {
  const int width = int(p.tile_cols) / kEach;  // threads per row
  const int64_t row = row_block * p.tile_rows + threadIdx.x / width;
  const int64_t col = first_col + int64_t(threadIdx.x % width) * kEach + i;
  return {row, col, row < s.rows && col < s.cols};
}

// calls f(spot, i) for each group of N columns of this thread; i: index of the first among its kEach columns
template <int N, class Args, class F>
__device__ void for_each_group(const Args& a, F f) {
  const int64_t row_block = blockIdx.x / a.plan.segments, first = blockIdx.x % a.plan.segments * a.plan.segment;
  for (int64_t c = 0; c < a.plan.segment; c += a.plan.tile_cols) {
#pragma unroll 1
    for (int i = 0; i < kEach; i += N) f(spot(a.space, a.plan, row_block, first + c, i), i);
  }
}

// calls f(spot) for the first of this thread's kEach columns in each tile
template <class Args, class F>
__device__ void for_each_tile(const Args& a, F f) {
  const int64_t first = blockIdx.x % a.plan.segments * a.plan.segment;
  for (int64_t c = 0; c < a.plan.segment; c += a.plan.tile_cols) {
    f(spot(a.space, a.plan, blockIdx.x / a.plan.segments, first + c, 0));
  }
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

// adds a group's terms to the sums of this thread's kEach columns; columns outside the row add 0
template <int N, class T>
__device__ void add_terms(const Spot& p, int at, const Group<T, N>& terms, Group<T, kEach>& acc) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const T term = p.inside ? terms.v[i] : T(0);
#pragma unroll
    for (int lane = i; lane < kEach; lane += N) acc.v[lane] += lane == at + i ? term : T(0);
  }
}

// row of this thread in the block's tile
template <class Args>
__device__ int64_t row_of(const Args& a) {
  return blockIdx.x / a.plan.segments * a.plan.tile_rows + threadIdx.x / (int(a.plan.tile_cols) / kEach);
}

// stores the sum of a row over the block's segment; `which` counts the sums of a row. All threads of a row have it.
template <class Args, class T>
__device__ void write_row_sum(const Args& a, const RowSums& sums, int64_t which, T sum) {
  const int64_t row = row_of(a);
  if (threadIdx.x % (int(a.plan.tile_cols) / kEach) != 0 || row >= a.space.rows) return;
  T* to = (T*)(sums.partial ? sums.partial : sums.out);
  to[(which * a.space.rows + row) * a.plan.segments + blockIdx.x % a.plan.segments] = sum;
}

}  // namespace pyflow::cuda
