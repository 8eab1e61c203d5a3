// Flow head on an NVIDIA GPU: grids over the scalar functions of ops/flow_head.h.
#include "../args/flow_head.h"
#include "tile.h"

namespace pyflow::cuda {
namespace {

constexpr int kBlockTall = 16, kBlockWide = kThreads / (kBlockTall / kEach);  // tile of sum_blocks

template <Prior P, int N, class T>
__global__ void __launch_bounds__(kThreads, 2) forward(const __grid_constant__ FlowHeadForward a, double constant) {
  Group<T, kEach> acc{};
  for_each_group<N>(a, [&](const Spot& p, int at) {
    const auto h = load<N, T>(a.space, a.h, p);
    Group<T, N> s{}, terms;
    if (a.log_scale.data) s = load<N, T>(a.space, a.log_scale, p);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const T z = a.log_scale.data ? h.v[i] * exp_(s.v[i]) : h.v[i];
      terms.v[i] = prior_log_density<P>(z) + s.v[i];
    }
    add_terms(p, at, terms, acc);
  });
  const T sum = fold(acc, int(a.plan.tile_cols));
  // the prior's constant is added once per row
  write_row_sum(a, a.log_prob, 0, blockIdx.x % a.plan.segments == 0 ? sum + T(constant) : sum);
}

// Sums a tile by pairs of neighbouring rows, and stores the partial sums of the block's columns. All threads of the
// block must call it.
template <class T>
__device__ void write_column_sums(const FlowHeadBackward& a, const Group<T, kEach>& own, int64_t block,
                                  int64_t first_col) {
  const int width = int(a.plan.tile_cols) / kEach, row = threadIdx.x / width;
  __shared__ Group<T, kEach> tile[kThreads];
  tile[threadIdx.x] = own;
  for (int d = 1; d < int(a.plan.tile_rows); d *= 2) {
    __syncthreads();
    if (row % (2 * d) != 0) continue;
#pragma unroll
    for (int i = 0; i < kEach; ++i) tile[threadIdx.x].v[i] += tile[threadIdx.x + d * width].v[i];
  }
  if (row != 0) return;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t col = first_col + threadIdx.x * kEach + i;
    if (col < a.space.cols) ((T*)a.partial)[block * a.space.cols + col] = tile[threadIdx.x].v[i];
  }
}

// a unit is a block of rows of one tile's width
template <Prior P, int N, class T>
__global__ void __launch_bounds__(kThreads, 2) backward(const __grid_constant__ FlowHeadBackward a) {
  const int64_t block = blockIdx.x / a.plan.segments, first = blockIdx.x % a.plan.segments * a.plan.tile_cols;
  Group<T, kEach> acc{};
  for (int64_t r = 0; r < a.block_rows; r += a.plan.tile_rows) {
#pragma unroll 1
    for (int at = 0; at < kEach; at += N) {
      Spot p = spot(a.space, a.plan, 0, first, at);
      p.row += block * a.block_rows + r;
      p.inside = p.row < a.space.rows && p.col < a.space.cols;
      if (!p.inside) continue;
      const T grad = read<T>(a.grad, row_offset(a.space, a.grad, p.row));
      const auto h = load<N, T>(a.space, a.h, p);
      Group<T, N> s{}, gh;
      if (a.log_scale.data) s = load<N, T>(a.space, a.log_scale, p);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const T e = a.log_scale.data ? exp_(s.v[i]) : T(1);
        const T z = h.v[i] * e;
        const T score = prior_score<P>(z);
        gh.v[i] = grad * e * score;
        const T term = fma_(score, z, T(1));
#pragma unroll
        for (int lane = i; lane < kEach; lane += N) {
          if (lane == at + i) acc.v[lane] = fma_(grad, term, acc.v[lane]);
        }
      }
      store(a.space, a.gh, p, gh);
    }
  }
  if (a.partial) write_column_sums(a, acc, block, first);
}

// sums partial (row blocks, cols) to (cols,); a tile of kBlockTall x kBlockWide steps down the row blocks
template <class T>
__global__ void __launch_bounds__(kThreads, 2) sum_blocks(const __grid_constant__ FlowHeadBackward a, int64_t blocks) {
  const int64_t col = int64_t(blockIdx.x) * kBlockWide + threadIdx.x % kBlockWide;
  const int first = threadIdx.x / kBlockWide * kEach;
  Group<T, kEach> acc{};
  for (int64_t b = first; b < blocks && col < a.space.cols; b += kBlockTall) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (b + i < blocks) acc.v[i] += ((const T*)a.partial)[(b + i) * a.space.cols + col];
    }
  }
  __shared__ T part[kThreads];
  part[threadIdx.x] = (acc.v[0] + acc.v[1]) + (acc.v[2] + acc.v[3]);
  __syncthreads();
  if (threadIdx.x >= kBlockWide || col >= a.space.cols) return;
  const T* p = part + threadIdx.x;
  const T sum = (p[0] + p[kBlockWide]) + (p[2 * kBlockWide] + p[3 * kBlockWide]);
  write(a.glog_scale, col_offset(a.space, a.glog_scale, col), sum);
}

}  // namespace

void flow_head_forward(const FlowHeadForward& a, Stream stream) {
  as_constant(a.prior, [&](auto prior) {
    const double constant = kPriorConstant<prior.value> * double(a.space.cols);
    with_types(a, whole_vectors(a.space, a.h, a.log_scale), [&](auto n, auto zero) {
      launch(forward<prior.value, n.value, decltype(zero)>, a.plan.units, stream, a, constant);
    });
  });
}

void flow_head_backward(const FlowHeadBackward& a, Stream stream) {
  as_constant(a.prior, [&](auto prior) {
    with_types(a, whole_vectors(a.space, a.h, a.log_scale, a.gh), [&](auto n, auto zero) {
      launch(backward<prior.value, n.value, decltype(zero)>, a.plan.units, stream, a);
    });
  });
  if (!a.partial) return;
  launch(a.f64 ? sum_blocks<double> : sum_blocks<float>, ceil_div(a.space.cols, kBlockWide), stream, a,
         ceil_div(a.space.rows, a.block_rows));
}

}  // namespace pyflow::cuda
