// demo_op on an NVIDIA GPU: grids over the scalar functions of ops/demo_op.h.
#include "../args/demo_op.h"
#include "tile.h"

namespace pyflow::cuda {
namespace {

template <int N, class T>
__global__ void __launch_bounds__(kThreads, 2) forward(const __grid_constant__ DemoOpArgs a) {
  for_each_group<N>(a, [&](const Spot& p, int) {
    const auto x = load<N, T>(a.space, a.x, p);
    Group<T, N> y;
#pragma unroll
    for (int i = 0; i < N; ++i) y.v[i] = demo_op_value(x.v[i], T(a.scale));
    store(a.space, a.y, p, y);
  });
}

template <int N, class T>
__global__ void __launch_bounds__(kThreads, 2) backward(const __grid_constant__ DemoOpArgs a) {
  for_each_group<N>(a, [&](const Spot& p, int) {
    const auto gy = load<N, T>(a.space, a.gy, p);
    const auto x = load<N, T>(a.space, a.x, p);
    Group<T, N> gx;
#pragma unroll
    for (int i = 0; i < N; ++i) gx.v[i] = gy.v[i] * demo_op_slope(x.v[i], T(a.scale));
    store(a.space, a.gx, p, gx);
  });
}

}  // namespace

void demo_op_forward(const DemoOpArgs& a, Stream stream) {
  const bool whole = whole_vectors(a.space, a.x, a.y);
  launch(a.f64 ? forward<1, double> : whole ? forward<kEach, float> : forward<1, float>, a.plan.units, stream, a);
}

void demo_op_backward(const DemoOpArgs& a, Stream stream) {
  const bool whole = whole_vectors(a.space, a.gy, a.x, a.gx);
  launch(a.f64 ? backward<1, double> : whole ? backward<kEach, float> : backward<1, float>, a.plan.units, stream, a);
}

}  // namespace pyflow::cuda
