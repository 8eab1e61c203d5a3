// demo_op, forward and backward. A unit is a block of whole short rows or one segment of a long row.
#include "../args/demo_op.h"

#include "tile.h"

namespace pyflow::PYFLOW_ISA {
namespace {

template <class T>
void forward_chunk(const T* __restrict x, T scale, T* __restrict y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    y[i] = demo_op_value(x[i], scale);
  }
}

template <class T>
void backward_chunk(const T* __restrict gy, const T* __restrict x, T scale, T* __restrict gx, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    gx[i] = gy[i] * demo_op_slope(x[i], scale);
  }
}

template <class T>
void forward_unit(const DemoOpArgs& a, const Tile& unit) {
  alignas(64) T xs[kChunk], ys[kChunk];
  for_each_chunk(unit, [&](const Tile& t, const Tile& next) {
    prefetch(a.space, a.x, next);
    const T* x = load(a.space, a.x, t, xs);
    T* y = target(a.space, a.y, t, ys);
    forward_chunk(x, T(a.scale), y, t.count());
    store(a.space, a.y, t, y);
  });
}

template <class T>
void backward_unit(const DemoOpArgs& a, const Tile& unit) {
  alignas(64) T gys[kChunk], xs[kChunk], gxs[kChunk];
  for_each_chunk(unit, [&](const Tile& t, const Tile& next) {
    prefetch(a.space, a.gy, next);
    prefetch(a.space, a.x, next);
    const T* gy = load(a.space, a.gy, t, gys);
    const T* x = load(a.space, a.x, t, xs);
    T* gx = target(a.space, a.gx, t, gxs);
    backward_chunk(gy, x, T(a.scale), gx, t.count());
    store(a.space, a.gx, t, gx);
  });
}

}  // namespace

void demo_op_forward(const DemoOpArgs& a, int64_t begin, int64_t end) {
  for_each_unit(a, begin, end, [&](const Tile& unit, int64_t, auto zero) { forward_unit<decltype(zero)>(a, unit); });
}

void demo_op_backward(const DemoOpArgs& a, int64_t begin, int64_t end) {
  for_each_unit(a, begin, end, [&](const Tile& unit, int64_t, auto zero) { backward_unit<decltype(zero)>(a, unit); });
}

}  // namespace pyflow::PYFLOW_ISA
