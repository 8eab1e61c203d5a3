// Flow head on an NVIDIA GPU: grids over the scalar functions of ops/flow_head.h.
#include "../ops/flow_head.h"
#include "tile.h"

namespace pyflow::cuda {
namespace {

constexpr int kBlockTall = 16, kBlockWide = kThreads / (kBlockTall / kEach);  // tile of sum_blocks

struct Args {
  Space space;
  Cut cut;
  View h, log_scale;          // a view without data is absent
  View grad, gh, glog_scale;  // backward; grad is read by row dims only
  void* out;                  // (rows, segments) of the compute type
  void* partial;              // (row blocks, cols), backward with a log_scale
  int64_t block_rows;         // rows per block of the backward
  double offset;              // the prior's constant, added once per row
};

template <Prior P, int N, class T>
__global__ void __launch_bounds__(kThreads, 2) forward(const __grid_constant__ Args a) {
  const int64_t row_block = blockIdx.x / a.cut.segments, segment = blockIdx.x % a.cut.segments;
  Group<T, kEach> acc{};
  for (int64_t c = 0; c < a.cut.segment; c += a.cut.cols) {
#pragma unroll 1
    for (int at = 0; at < kEach; at += N) {
      const Spot p = spot(a.space, a.cut, row_block, segment * a.cut.segment + c, at);
      const auto h = load<N, T>(a.space, a.h, p);
      Group<T, N> s{};
      if (a.log_scale.data) s = load<N, T>(a.space, a.log_scale, p);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const T z = a.log_scale.data ? h.v[i] * exp_(s.v[i]) : h.v[i];
        const T term = p.inside ? prior_log_density<P>(z) + s.v[i] : T(0);
#pragma unroll
        for (int lane = i; lane < kEach; lane += N) acc.v[lane] += lane == at + i ? term : T(0);
      }
    }
  }
  const T sum = fold(acc, int(a.cut.cols));
  const int width = int(a.cut.cols) / kEach;
  const int64_t row = row_block * a.cut.rows + threadIdx.x / width;
  if (threadIdx.x % width == 0 && row < a.space.rows) {
    ((T*)a.out)[row * a.cut.segments + segment] = segment == 0 ? sum + T(a.offset) : sum;
  }
}

// one block of rows x one tile width of columns; cut.segment == cut.cols here
template <Prior P, int N, class T>
__global__ void __launch_bounds__(kThreads, 2) backward(const __grid_constant__ Args a) {
  const int64_t block = blockIdx.x / a.cut.segments, first = blockIdx.x % a.cut.segments * a.cut.cols;
  Group<T, kEach> acc{};
  for (int64_t r = 0; r < a.block_rows; r += a.cut.rows) {
#pragma unroll 1
    for (int at = 0; at < kEach; at += N) {
      Spot p = spot(a.space, a.cut, 0, first, at);
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
  if (!a.partial) return;
  // sum the tile's rows by pairs of neighbours
  const int width = int(a.cut.cols) / kEach, row = threadIdx.x / width;
  __shared__ Group<T, kEach> tile[kThreads];
  tile[threadIdx.x] = acc;
  for (int d = 1; d < int(a.cut.rows); d *= 2) {
    __syncthreads();
    if (row % (2 * d) != 0) continue;
#pragma unroll
    for (int i = 0; i < kEach; ++i) tile[threadIdx.x].v[i] += tile[threadIdx.x + d * width].v[i];
  }
  if (row != 0) return;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t col = first + threadIdx.x * kEach + i;
    if (col < a.space.cols) ((T*)a.partial)[block * a.space.cols + col] = tile[threadIdx.x].v[i];
  }
}

// sums partial (row blocks, cols) to (cols,); a tile of kBlockTall x kBlockWide steps down the row blocks
template <class T>
__global__ void __launch_bounds__(kThreads, 2) sum_blocks(const __grid_constant__ Args a, int64_t blocks) {
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

bool vectors(const Args& a) {
  return whole_vectors(a.space, a.h) && whole_vectors(a.space, a.log_scale) && whole_vectors(a.space, a.gh);
}

template <Prior P>
void launch_forward(const Args& a, const Tensor& h) {
  if (h.scalar_type() == ScalarType::Double) return launch(forward<P, 1, double>, a.cut.blocks, h, a);
  launch(vectors(a) ? forward<P, kEach, float> : forward<P, 1, float>, a.cut.blocks, h, a);
}

template <Prior P>
void launch_backward(const Args& a, const Tensor& h) {
  if (h.scalar_type() == ScalarType::Double) return launch(backward<P, 1, double>, a.cut.blocks, h, a);
  launch(vectors(a) ? backward<P, kEach, float> : backward<P, 1, float>, a.cut.blocks, h, a);
}

Tensor flow_log_prob(Tensor h, std::optional<Tensor> log_scale, int64_t prior) {
  Args a{};
  Layout layout(h, h.dim() - 1);
  layout.add(a.h, h);
  if (log_scale) layout.add_event(a.log_scale, *log_scale);
  a.space = layout.merge();
  const int64_t rows = a.space.rows;
  Tensor out = new_empty(h, &rows, 1, sum_dtype(h));
  if (h.numel() == 0) return torch::stable::zero_(out);
  a.cut = cut(a.space);
  const int64_t count = rows * a.cut.segments;
  Tensor partial = a.cut.segments > 1 ? new_empty(h, &count, 1, sum_dtype(h)) : out;
  a.out = partial.data_ptr();
  const bool gaussian = Prior(prior) == Prior::gaussian;
  a.offset = gaussian ? kPriorConstant<Prior::gaussian> * double(a.space.cols) : 0.0;
  gaussian ? launch_forward<Prior::gaussian>(a, h) : launch_forward<Prior::logistic>(a, h);
  if (a.cut.segments > 1) {
    const auto sum = sum_dtype(h) == ScalarType::Double ? launch_sum_segments<double> : launch_sum_segments<float>;
    sum(partial, out, rows, a.cut.segments);
  }
  return out;
}

std::tuple<Tensor, Tensor> flow_log_prob_backward(Tensor grad, Tensor h, std::optional<Tensor> log_scale,
                                                  int64_t prior) {
  Args a{};
  Layout layout(h, h.dim() - 1);
  const int64_t none = 0;
  Tensor gh = new_like(h);
  Tensor glog_scale = log_scale ? new_like(*log_scale) : new_empty(h, &none, 1, h.scalar_type());
  layout.add(a.h, h);
  layout.add(a.gh, gh);
  layout.add_rows(a.grad, grad);
  if (log_scale) layout.add_event(a.log_scale, *log_scale);
  if (log_scale) layout.add_event(a.glog_scale, glog_scale);
  a.space = layout.merge();
  if (h.numel() == 0) return {gh, torch::stable::zero_(glog_scale)};
  a.cut = cut(a.space);
  a.cut.segment = a.cut.cols;
  a.cut.segments = ceil_div(a.space.cols, a.cut.cols);
  // at most 512 partial sums per column, each of at least 32 rows
  a.block_rows = std::max({power_of_two(ceil_div(a.space.rows, 512)), int64_t(32), a.cut.rows});
  const int64_t blocks = ceil_div(a.space.rows, a.block_rows);
  a.cut.blocks = blocks * a.cut.segments;
  const int64_t count = log_scale ? blocks * a.space.cols : 0;
  Tensor partial = new_empty(h, &count, 1, sum_dtype(h));
  a.partial = log_scale ? partial.data_ptr() : nullptr;
  Prior(prior) == Prior::gaussian ? launch_backward<Prior::gaussian>(a, h) : launch_backward<Prior::logistic>(a, h);
  if (log_scale) {
    const auto sum = sum_dtype(h) == ScalarType::Double ? sum_blocks<double> : sum_blocks<float>;
    launch(sum, ceil_div(a.space.cols, kBlockWide), h, a, blocks);
  }
  return {gh, glog_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyflow_cuda, CUDA, m) {
  m.impl("flow_log_prob", TORCH_BOX(&flow_log_prob));
  m.impl("flow_log_prob_backward", TORCH_BOX(&flow_log_prob_backward));
}

}  // namespace pyflow::cuda
