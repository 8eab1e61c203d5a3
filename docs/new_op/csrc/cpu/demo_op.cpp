// demo_op, forward and backward. A unit is a block of whole short rows or one segment of a long row.
#include "../args/demo_op.h"

#include "tile.h"

namespace pyflow::PYFLOW_ISA {
namespace {

template <class T>
void forward_chunk(const T* __restrict x, T scale, T log_scale, T* __restrict y, T* __restrict terms, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    y[i] = demo_op_value(x[i], scale);
    terms[i] = demo_op_log_slope(x[i], log_scale);
  }
}

template <class T>
void backward_row(const T* __restrict gy, T gl, const T* __restrict x, T scale, T* __restrict gx, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    gx[i] = demo_op_gradient(gy[i], gl, x[i], scale);
  }
}

template <class T>
void forward_unit(const DemoOpForward& a, const Tile& unit, int64_t segment) {
  alignas(64) T xs[kChunk], ys[kChunk], terms[kChunk];
  double total = 0;  // of a unit of one row; several rows are one chunk
  for_each_chunk(unit, [&](const Tile& t, const Tile& next) {
    prefetch(a.space, a.x, next);
    const T* x = load(a.space, a.x, t, xs);
    T* y = target(a.space, a.y, t, ys);
    forward_chunk(x, T(a.scale), T(a.log_scale), y, terms, t.count());
    store(a.space, a.y, t, y);
    for (int64_t r = 0; r < t.rows; ++r) {
      const double sum = double(lane_sum(terms + r * t.cols, t.cols));
      if (unit.rows > 1) write_row_sum<T>(a.logdet, a.plan, t.row + r, segment, sum);
      total += sum;
    }
  });
  if (unit.rows == 1) write_row_sum<T>(a.logdet, a.plan, unit.row, segment, total);
}

template <class T>
void backward_unit(const DemoOpBackward& a, const Tile& unit) {
  alignas(64) T gys[kChunk], xs[kChunk], gxs[kChunk];
  if (!a.gy.data) fill(gys, T(0), kChunk);
  for_each_chunk(unit, [&](const Tile& t, const Tile& next) {
    prefetch(a.space, a.x, next);
    if (a.gy.data) prefetch(a.space, a.gy, next);
    const T* x = load(a.space, a.x, t, xs);
    const T* gy = a.gy.data ? load(a.space, a.gy, t, gys) : gys;
    T* gx = target(a.space, a.gx, t, gxs);
    for (int64_t r = 0; r < t.rows; ++r) {
      const T gl = a.gl.data ? read<T>(a.gl, row_offset(a.space, a.gl, t.row + r)) : T(0);
      const int64_t at = r * t.cols;
      backward_row(gy + at, gl, x + at, T(a.scale), gx + at, t.cols);
    }
    store(a.space, a.gx, t, gx);
  });
}

}  // namespace

void demo_op_forward(const DemoOpForward& a, int64_t begin, int64_t end) {
  for_each_unit(a, begin, end,
                [&](const Tile& unit, int64_t segment, auto zero) { forward_unit<decltype(zero)>(a, unit, segment); });
}

void demo_op_backward(const DemoOpBackward& a, int64_t begin, int64_t end) {
  for_each_unit(a, begin, end, [&](const Tile& unit, int64_t, auto zero) { backward_unit<decltype(zero)>(a, unit); });
}

}  // namespace pyflow::PYFLOW_ISA
