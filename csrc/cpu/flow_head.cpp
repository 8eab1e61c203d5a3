// Flow head: log-density of the prior at z = h e^{log_scale}, summed per row, and its gradients. A unit is kHeadRows
// rows of one segment, which share e^{log_scale}; flow_head_reduce adds the gradients of log_scale over the row blocks.
#include "../args/flow_head.h"

#include "tile.h"

namespace pyflow::PYFLOW_ISA {
namespace {

// rows that are computed a unit at a time
PYFLOW_FN bool are_short(const FlowHeadArgs& a) { return a.space.cols > 0 && a.space.cols <= kHeadShort; }

// repeats the first cols of count values
template <class T>
void repeat(T* to, int64_t cols, int64_t count) {
  for (int64_t done = cols; done < count; done *= 2) {
    const int64_t n = smaller(done, count - done);
    for (int64_t i = 0; i < n; ++i) to[done + i] = to[i];
  }
}

// e = exp(log_scale) for the columns of a unit, shared by its rows; returns the sum of log_scale
template <class T>
double exp_columns(const FlowHeadArgs& a, const Tile& unit, T* __restrict e) {
  if (!a.log_scale.data) {
    fill(e, T(1), unit.cols);
    return -0.0;
  }
  alignas(64) T buffer[kHeadSegment];
  const T* __restrict log_scale = load(a.space, a.log_scale, {unit.row, 1, unit.col, unit.cols}, buffer);
#pragma omp simd
  for (int64_t i = 0; i < unit.cols; ++i) {
    e[i] = exp_(log_scale[i]);
  }
  double total = -0.0;
  for_each_chunk(0, unit.cols, [&](int64_t i, int64_t n) { total += double(lane_sum(log_scale + i, n)); });
  return total;
}

// sum of n <= kChunk log-densities, in the order of lane_sum
template <Prior P, class T>
T sum_density(const T* __restrict h, const T* __restrict e, int64_t n) {
  T lane[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
#pragma omp simd
    for (int j = 0; j < 16; ++j) {
      lane[j] += prior_log_density<P>(h[i + j] * e[i + j]);
    }
  }
  for (int j = 0; i + j < n; ++j) lane[j] += prior_log_density<P>(h[i + j] * e[i + j]);
  return lane_sum(lane, 16);
}

// gh of a row; adds the row to the gradient of log_scale
template <Prior P, class T>
void score_row(const T* __restrict h, const T* __restrict e, T grad, T* __restrict gh, T* __restrict sum, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T z = h[i] * e[i];
    const T score = prior_score<P>(z);
    gh[i] = grad * e[i] * score;
    sum[i] = fma_(grad, fma_(score, z, T(1)), sum[i]);
  }
}

// the log-densities of short rows, each in the order of sum_density; e: of `exp_rows`
template <Prior P, class T>
void sum_densities(const FlowHeadForward& a, const Tile& unit, const T* __restrict e, T* sums) {
  alignas(64) T buffer[kChunk], term[kChunk];
  const T* __restrict h = load(a.space, a.h, unit, buffer);
#pragma omp simd
  for (int64_t i = 0; i < unit.count(); ++i) {
    term[i] = prior_log_density<P>(h[i] * e[i]);
  }
  row_sums(unit, term, T(1), sums);
}

// e = exp(log_scale) for every element of a unit of short rows; returns the sum of log_scale
template <class T>
double exp_rows(const FlowHeadArgs& a, T* e) {
  const double total = exp_columns(a, {0, 1, 0, a.space.cols}, e);
  repeat(e, a.space.cols, a.plan.tile_rows * a.space.cols);
  return total;
}

template <Prior P, class T>
void forward_short(const FlowHeadForward& a, int64_t begin, int64_t end) {
  alignas(64) T e[kChunk], sums[kChunk];
  const double constant = exp_rows(a, e) + double(a.space.cols) * kPriorConstant<P>;
  for (int64_t u = begin; u < end; ++u) {
    const Tile unit = unit_tile(a.space, a.plan, u);
    sum_densities<P>(a, unit, e, sums);
    T* __restrict out = (T*)a.log_prob.out + unit.row;
#pragma omp simd
    for (int64_t r = 0; r < unit.rows; ++r) {
      out[r] = T(constant + double(sums[r]));
    }
  }
}

template <Prior P, class T>
void forward_unit(const FlowHeadForward& a, const Tile& unit, int64_t segment) {
  alignas(64) T buffer[kHeadSegment], e[kHeadSegment];
  const double constant = exp_columns(a, unit, e) + double(unit.cols) * kPriorConstant<P>;
  for (int64_t r = unit.row; r < unit.row + unit.rows; ++r) {
    prefetch(a.space, a.h, {r + 1, 1, unit.col, unit.cols});
    const T* h = load(a.space, a.h, {r, 1, unit.col, unit.cols}, buffer);
    double total = constant;
    for_each_chunk(0, unit.cols, [&](int64_t i, int64_t n) { total += double(sum_density<P>(h + i, e + i, n)); });
    write_row_sum<T>(a.log_prob, a.plan, r, segment, total);
  }
}

// score_row of short rows, a unit at a time; e and grad for every element, sum for the columns
template <Prior P, class T>
void score_rows(const Tile& t, const T* __restrict h, const T* __restrict e, const T* __restrict grad, T* __restrict gh,
                T* __restrict sum) {
  alignas(64) T term[kChunk];
#pragma omp simd
  for (int64_t i = 0; i < t.count(); ++i) {
    const T z = h[i] * e[i];
    const T score = prior_score<P>(z);
    gh[i] = grad[i] * e[i] * score;
    term[i] = fma_(score, z, T(1));
  }
  for (int64_t i = 0; i < t.count(); i += t.cols) {
    for (int64_t c = 0; c < t.cols; ++c) sum[c] = fma_(grad[i], term[i + c], sum[c]);
  }
}

// the gradients of log_scale that a unit adds up
template <class T>
void store_sums(const FlowHeadBackward& a, const Tile& unit, const T* sum) {
  if (!a.partial) return;
  T* partial = (T*)a.partial + unit.row / kHeadRows * a.space.cols + unit.col;
  for (int64_t i = 0; i < unit.cols; ++i) partial[i] = sum[i];
}

template <Prior P, class T>
void backward_short(const FlowHeadBackward& a, int64_t begin, int64_t end) {
  alignas(64) T h[kChunk], e[kChunk], grad[kChunk], gh[kChunk];
  exp_rows(a, e);
  for (int64_t u = begin; u < end; ++u) {
    const Tile unit = unit_tile(a.space, a.plan, u);
    T sum[kHeadShort] = {};
    load_rows(a.space, a.grad, unit, grad);
    T* out = target(a.space, a.gh, unit, gh);
    score_rows<P>(unit, load(a.space, a.h, unit, h), e, grad, out, sum);
    store(a.space, a.gh, unit, out);
    store_sums(a, unit, sum);
  }
  stream_fence();
}

template <Prior P, class T>
void backward_unit(const FlowHeadBackward& a, const Tile& unit) {
  alignas(64) T h[kHeadSegment], e[kHeadSegment], gh[kHeadSegment], sum[kHeadSegment];
  exp_columns(a, unit, e);
  fill(sum, T(0), unit.cols);
  for (int64_t r = unit.row; r < unit.row + unit.rows; ++r) {
    const Tile t{r, 1, unit.col, unit.cols}, next{r + 1, 1, unit.col, unit.cols};
    prefetch(a.space, a.h, next);
    prefetch<true>(a.space, a.gh, next);
    const T grad = read<T>(a.grad, row_offset(a.space, a.grad, r));
    T* out = target(a.space, a.gh, t, gh);
    score_row<P>(load(a.space, a.h, t, h), e, grad, out, sum, unit.cols);
    store(a.space, a.gh, t, out);
  }
  store_sums(a, unit, sum);
}

// adds the partial sums of all row blocks in double and in order, for columns [begin, end)
template <class T>
void reduce_columns(const FlowHeadBackward& a, int64_t begin, int64_t end) {
  alignas(64) T out[kChunk];
  const int64_t blocks = ceil_div(a.space.rows, kHeadRows);
  for_each_chunk(begin, end, [&](int64_t c, int64_t n) {
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
  });
}

}  // namespace

void flow_head_forward(const FlowHeadForward& a, int64_t begin, int64_t end) {
  as_constant(a.prior, [&](auto p) {
    if (are_short(a)) {
      return a.f64 ? forward_short<p.value, double>(a, begin, end) : forward_short<p.value, float>(a, begin, end);
    }
    for_each_unit(a, begin, end, [&](const Tile& unit, int64_t segment, auto zero) {
      forward_unit<p.value, decltype(zero)>(a, unit, segment);
    });
  });
}

void flow_head_backward(const FlowHeadBackward& a, int64_t begin, int64_t end) {
  as_constant(a.prior, [&](auto p) {
    if (are_short(a)) {
      return a.f64 ? backward_short<p.value, double>(a, begin, end) : backward_short<p.value, float>(a, begin, end);
    }
    for_each_unit(a, begin, end,
                  [&](const Tile& unit, int64_t, auto zero) { backward_unit<p.value, decltype(zero)>(a, unit); });
  });
}

void flow_head_reduce(const FlowHeadBackward& a, int64_t begin, int64_t end) {
  a.f64 ? reduce_columns<double>(a, begin, end) : reduce_columns<float>(a, begin, end);
}

}  // namespace pyflow::PYFLOW_ISA
