// demo_op on an NVIDIA GPU: grids over the scalar functions of ops/demo_op.h.
#include "../args/demo_op.h"
#include "tile.h"

namespace pyflow::cuda {
namespace {

template <int N, class T>
__global__ void __launch_bounds__(kThreads, 2) forward(const __grid_constant__ DemoOpForward a) {
  Group<T, kEach> acc{};
  for_each_group<N>(a, [&](const Spot& p, int at) {
    const auto x = load<N, T>(a.space, a.x, p);
    Group<T, N> y, terms;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      y.v[i] = demo_op_value(x.v[i], T(a.scale));
      terms.v[i] = demo_op_log_slope(x.v[i], T(a.log_scale));
    }
    store(a.space, a.y, p, y);
    add_terms(p, at, terms, acc);
  });
  write_row_sum(a, a.logdet, 0, fold(acc, int(a.plan.tile_cols)));
}

template <int N, class T>
__global__ void __launch_bounds__(kThreads, 2) backward(const __grid_constant__ DemoOpBackward a) {
  for_each_group<N>(a, [&](const Spot& p, int) {
    const auto x = load<N, T>(a.space, a.x, p);
    Group<T, N> gy{}, gx;
    if (a.gy.data) gy = load<N, T>(a.space, a.gy, p);
    const T gl = a.gl.data && p.inside ? read<T>(a.gl, row_offset(a.space, a.gl, p.row)) : T(0);
#pragma unroll
    for (int i = 0; i < N; ++i) gx.v[i] = demo_op_gradient(gy.v[i], gl, x.v[i], T(a.scale));
    store(a.space, a.gx, p, gx);
  });
}

}  // namespace

void demo_op_forward(const DemoOpForward& a, Stream stream) {
  with_types(a, whole_vectors(a.space, a.x, a.y),
             [&](auto n, auto zero) { launch(forward<n.value, decltype(zero)>, a.plan.units, stream, a); });
}

void demo_op_backward(const DemoOpBackward& a, Stream stream) {
  with_types(a, whole_vectors(a.space, a.x, a.gy, a.gx),
             [&](auto n, auto zero) { launch(backward<n.value, decltype(zero)>, a.plan.units, stream, a); });
}

}  // namespace pyflow::cuda
