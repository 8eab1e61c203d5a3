// Arguments of the flow-head kernels.
#pragma once

#include "../cpu/dispatch.h"
#include "../cuda/shared.h"
#include "../ops/flow_head.h"
#include "../tiles/plan.h"

namespace pyflow {

struct FlowHeadArgs {
  Space space;
  Plan plan;
  bool f64;
  Prior prior;
  View h, log_scale;  // log_scale may be absent
};

struct FlowHeadForward : FlowHeadArgs {
  RowSums log_prob;
};

struct FlowHeadBackward : FlowHeadArgs {
  View grad;  // row dims only
  View gh, glog_scale;
  int64_t block_rows;  // rows whose gradients of log_scale are summed together
  void* partial;       // (row blocks, cols) of the compute type, absent without log_scale
};

// CPU: a unit is kHeadRows rows of a segment of kHeadSegment columns, forward more rows if they are short
constexpr int64_t kHeadRows = 32;             // rows whose gradients of log_scale are summed together
constexpr int64_t kHeadSegment = 4 * kChunk;  // its buffers stay in L1
constexpr int64_t kHeadShort = 8;             // most columns of rows that are computed a unit at a time
static_assert(kHeadRows * kHeadShort <= kChunk);

inline Plan cpu_head_plan(const Space& s, int64_t rows) {
  Plan p{};
  p.tile_rows = rows;
  p.segment = kHeadSegment;
  p.segments = s.cols > kHeadSegment ? ceil_div(s.cols, kHeadSegment) : 1;
  p.units = ceil_div(s.rows, rows) * p.segments;
  p.grain = grain_of(rows * s.cols);
  return p;
}

inline Plan cpu_head_forward_plan(const Space& s) {
  return cpu_head_plan(s, s.cols > 0 && s.cols <= kHeadShort ? kChunk / s.cols : kHeadRows);
}
inline Plan cpu_head_backward_plan(const Space& s) { return cpu_head_plan(s, kHeadRows); }

// GPU, backward: rows per unit; at most 512 partial sums per column, each of at least 32 rows
inline int64_t gpu_block_rows(const Space& s, const Plan& p) {
  const int64_t block = next_power_of_two(ceil_div(s.rows, 512)), least = p.tile_rows > 32 ? p.tile_rows : 32;
  return block > least ? block : least;
}

// GPU, backward: a unit is a block of rows of one tile's width
inline Plan gpu_head_backward_plan(const Space& s) {
  Plan p = gpu_plan(s);
  p.segment = p.tile_cols;
  p.segments = ceil_div(s.cols, p.tile_cols);
  p.units = ceil_div(s.rows, gpu_block_rows(s, p)) * p.segments;
  return p;
}

PYFLOW_CPU_KERNEL(flow_head_forward, FlowHeadForward)
PYFLOW_CPU_KERNEL(flow_head_backward, FlowHeadBackward)
PYFLOW_CPU_KERNEL(flow_head_reduce, FlowHeadBackward)

namespace cuda {
void flow_head_forward(const FlowHeadForward&, Stream);
void flow_head_backward(const FlowHeadBackward&, Stream);
}  // namespace cuda

}  // namespace pyflow
