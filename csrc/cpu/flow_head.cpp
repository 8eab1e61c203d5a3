#include "flow_head.h"

#include "../ops/flow_head.h"
#include "tile.h"

namespace pyflow::PYFLOW_ISA {

// e = exp(log_scale) of a chunk of columns, shared by every row of the block
template <class T>
void exp_chunk(const T* __restrict log_scale, T* __restrict e, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) e[i] = exp_(log_scale[i]);
}

template <Prior P, class T>
void density_chunk(const T* __restrict h, const T* __restrict log_scale, const T* __restrict e,
                   T* __restrict out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = prior_log_density<P>(h[i] * e[i]) + log_scale[i];
}

// gh and the row's addition to the gradient of log_scale
template <Prior P, class T>
void score_chunk(const T* __restrict h, const T* __restrict e, T grad, T* __restrict gh, T* __restrict sum,
                 int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T z = h[i] * e[i];
    const T score = prior_score<P>(z);
    gh[i] = grad * e[i] * score;
    sum[i] = fma_(grad, fma_(score, z, T(1)), sum[i]);
  }
}

struct Block {
  int64_t row, rows, col, cols;
};

Block block_of(const FlowHeadArgs& a, int64_t unit) {
  const int64_t row = unit / a.segments * kHeadRows;
  const int64_t col = unit % a.segments * kSegment;
  return {row, a.space.rows - row < kHeadRows ? a.space.rows - row : kHeadRows, col,
          a.space.cols - col < kSegment ? a.space.cols - col : kSegment};
}

template <class T>
void scale_of(const FlowHeadArgs& a, const Tile& t, T* log_scale, T* e) {
  if (a.log_scale.data) {
    const T* values = load(a.space, a.log_scale, t, log_scale);
    exp_chunk(values, e, t.cols);
    for (int64_t i = 0; values != log_scale && i < t.cols; ++i) log_scale[i] = values[i];
  } else {
    for (int64_t i = 0; i < t.cols; ++i) log_scale[i] = T(0);
    for (int64_t i = 0; i < t.cols; ++i) e[i] = T(1);
  }
}

template <Prior P, class T>
void forward_block(const FlowHeadForward& a, const Block& b, int64_t segment) {
  alignas(64) T h[kChunk], log_scale[kChunk], e[kChunk], terms[kChunk];
  double total[kHeadRows] = {};
  for (int64_t c0 = 0; c0 < b.cols; c0 += kChunk) {
    const int64_t n = b.cols - c0 < kChunk ? b.cols - c0 : kChunk;
    scale_of(a, {b.row, 1, b.col + c0, n}, log_scale, e);
    for (int64_t r = 0; r < b.rows; ++r) {
      const T* values = load(a.space, a.h, {b.row + r, 1, b.col + c0, n}, h);
      density_chunk<P>(values, log_scale, e, terms, n);
      total[r] += double(lane_sum(terms, n)) + double(n) * kPriorConstant<P>;
    }
  }
  for (int64_t r = 0; r < b.rows; ++r) a.partial[(b.row + r) * a.segments + segment] = total[r];
}

template <Prior P, class T>
void backward_block(const FlowHeadBackward& a, const Block& b) {
  alignas(64) T h[kChunk], log_scale[kChunk], e[kChunk], gh[kChunk], sum[kChunk];
  for (int64_t c0 = 0; c0 < b.cols; c0 += kChunk) {
    const int64_t n = b.cols - c0 < kChunk ? b.cols - c0 : kChunk;
    scale_of(a, {b.row, 1, b.col + c0, n}, log_scale, e);
    for (int64_t i = 0; i < n; ++i) sum[i] = T(0);
    for (int64_t r = 0; r < b.rows; ++r) {
      const Tile t{b.row + r, 1, b.col + c0, n};
      T grad;
      read_typed(a.grad, row_offset(a.space, a.grad, t.row), 1, 1, &grad);
      T* out = target(a.space, a.gh, t, gh);
      score_chunk<P>(load(a.space, a.h, t, h), e, grad, out, sum, n);
      store(a.space, a.gh, t, out);
    }
    if (!a.partial) continue;
    T* partial = (T*)a.partial + b.row / kHeadRows * a.space.cols + b.col + c0;
    for (int64_t i = 0; i < n; ++i) partial[i] = sum[i];
  }
}

void flow_head_forward(const FlowHeadForward& a, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) {
    const Block b = block_of(a, u);
    const int64_t segment = u % a.segments;
    if (Prior(a.prior) == Prior::gaussian) {
      a.f64 ? forward_block<Prior::gaussian, double>(a, b, segment)
            : forward_block<Prior::gaussian, float>(a, b, segment);
    } else {
      a.f64 ? forward_block<Prior::logistic, double>(a, b, segment)
            : forward_block<Prior::logistic, float>(a, b, segment);
    }
  }
}

void flow_head_backward(const FlowHeadBackward& a, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) {
    const Block b = block_of(a, u);
    if (Prior(a.prior) == Prior::gaussian) {
      a.f64 ? backward_block<Prior::gaussian, double>(a, b) : backward_block<Prior::gaussian, float>(a, b);
    } else {
      a.f64 ? backward_block<Prior::logistic, double>(a, b) : backward_block<Prior::logistic, float>(a, b);
    }
  }
}

// the row blocks' partial sums, columns [begin, end), in double and in order
template <class T>
void reduce_columns(const FlowHeadBackward& a, int64_t begin, int64_t end) {
  alignas(64) T out[kChunk];
  const int64_t blocks = (a.space.rows + kHeadRows - 1) / kHeadRows;
  for (int64_t c = begin; c < end; c += kChunk) {
    const int64_t n = end - c < kChunk ? end - c : kChunk;
    double total[kChunk] = {};
    for (int64_t b = 0; b < blocks; ++b) {
      const T* partial = (const T*)a.partial + b * a.space.cols + c;
      for (int64_t i = 0; i < n; ++i) total[i] += double(partial[i]);
    }
    for (int64_t i = 0; i < n; ++i) out[i] = T(total[i]);
    const Tile t{0, 1, c, n};
    T* values = target(a.space, a.glog_scale, t, out);
    for (int64_t i = 0; values != out && i < n; ++i) values[i] = out[i];
    store(a.space, a.glog_scale, t, values);
  }
}

void flow_head_reduce(const FlowHeadBackward& a, int64_t begin, int64_t end) {
  a.f64 ? reduce_columns<double>(a, begin, end) : reduce_columns<float>(a, begin, end);
}

}  // namespace pyflow::PYFLOW_ISA
