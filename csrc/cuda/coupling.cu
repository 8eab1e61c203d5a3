// Coupling layers on an NVIDIA GPU: grids over the scalar functions of ops/coupling.h.
#include "../args/coupling.h"
#include "tile.h"

namespace pyflow::cuda {
namespace {

template <class T>
__device__ T couple_as(const CouplingArgs& a, T x, T shift, T e) {
  if (a.inverse) return a.shift_first ? couple<true, true>(x, shift, e) : couple<true, false>(x, shift, e);
  return a.shift_first ? couple<false, true>(x, shift, e) : couple<false, false>(x, shift, e);
}

template <class T>
__device__ CouplingGrad<T> couple_backward_as(const CouplingArgs& a, T gy, T gl, T x, T shift, T e, T slope) {
  if (a.inverse) {
    return a.shift_first ? couple_backward<true, true>(gy, gl, x, shift, e, slope)
                         : couple_backward<true, false>(gy, gl, x, shift, e, slope);
  }
  return a.shift_first ? couple_backward<false, true>(gy, gl, x, shift, e, slope)
                       : couple_backward<false, false>(gy, gl, x, shift, e, slope);
}

template <int M, class T>
__device__ T log_scale_of(const CouplingArgs& a, T s) {
  T g;
  as_known<M>(a.scale_map, [&](auto map) { g = log_scale<decltype(map)::value>(s, T(a.map_arg)); });
  return g;
}

template <int M, class T>
__device__ LogScale<T> log_scale_slope_of(const CouplingArgs& a, T s) {
  LogScale<T> l;
  as_known<M>(a.scale_map, [&](auto map) { l = log_scale_slope<decltype(map)::value>(s, T(a.map_arg)); });
  return l;
}

template <int N, class T>
__global__ void __launch_bounds__(kThreads, 2) additive(const __grid_constant__ CouplingForward a) {
  for_each_group<N>(a, [&](const Spot& p, int) {
    const auto x = load<N, T>(a.space, a.x, p);
    const auto shift = load<N, T>(a.space, a.shift, p);
    const unsigned passes = load_mask<N>(a.space, a.mask, p);
    Group<T, N> y;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const T moved = a.inverse ? x.v[i] - shift.v[i] : x.v[i] + shift.v[i];
      y.v[i] = passes >> i & 1 ? x.v[i] : moved;
    }
    store(a.space, a.y, p, y);
  });
}

template <int M, int N, class T>
__global__ void __launch_bounds__(kThreads, 2) forward(const __grid_constant__ CouplingForward a) {
  Group<T, kEach> acc{};
  for_each_group<N>(a, [&](const Spot& p, int at) {
    const auto x = load<N, T>(a.space, a.x, p);
    const auto shift = load<N, T>(a.space, a.shift, p);
    const auto scale = load<N, T>(a.space, a.scale, p);
    const unsigned passes = load_mask<N>(a.space, a.mask, p);
    Group<T, N> y, counted;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const T g = (a.inverse ? T(-1) : T(1)) * log_scale_of<M>(a, scale.v[i]);
      const bool passed = passes >> i & 1;
      y.v[i] = passed ? x.v[i] : couple_as(a, x.v[i], shift.v[i], exp_(g));
      counted.v[i] = passed ? T(0) : g;
    }
    store(a.space, a.y, p, y);
    add_terms(p, at, counted, acc);
  });
  write_row_sum(a, a.logdet, 0, fold(acc, int(a.plan.tile_cols)));
}

template <int M, int N, class T>
__global__ void __launch_bounds__(kThreads, 2) backward(const __grid_constant__ CouplingBackward a) {
  for_each_group<N>(a, [&](const Spot& p, int) {
    const auto scale = load<N, T>(a.space, a.scale, p);
    // without gy only gl contributes: x and shift are replaced by zeros, so that their NaN or inf reaches no gradient
    const bool reached = a.gy.data != nullptr;
    Group<T, N> x{}, shift{}, gy{}, gx, gshift, gscale;
    if (reached) {
      x = load<N, T>(a.space, a.x, p);
      if (a.shift_first != a.inverse) shift = load<N, T>(a.space, a.shift, p);
      gy = load<N, T>(a.space, a.gy, p);
    }
    const unsigned passes = load_mask<N>(a.space, a.mask, p);
    const T gl = a.gl.data && p.inside ? read<T>(a.gl, row_offset(a.space, a.gl, p.row)) : T(0);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const LogScale<T> l = log_scale_slope_of<M>(a, scale.v[i]);
      const T e = reached ? exp_((a.inverse ? T(-1) : T(1)) * l.g) : T(1);
      const auto d = couple_backward_as(a, gy.v[i], gl, x.v[i], shift.v[i], e, l.slope);
      const bool passed = passes >> i & 1;
      gx.v[i] = passed ? gy.v[i] : d.x;
      gshift.v[i] = passed ? T(0) : d.shift;
      gscale.v[i] = passed ? T(0) : d.scale;
    }
    store(a.space, a.gx, p, gx);
    if (a.gshift.data) store(a.space, a.gshift, p, gshift);
    store(a.space, a.gscale, p, gscale);
  });
}

}  // namespace

void coupling_forward(const CouplingForward& a, Stream stream) {
  const bool whole = whole_vectors(a.space, a.x, a.shift, a.scale, a.y);
  if (a.affine) {
    with_types(a, a.scale_map, whole, [&](auto map, auto n, auto zero) {
      launch(forward<map.value, n.value, decltype(zero)>, a.plan.units, stream, a);
    });
  } else {
    with_types(a, whole,
               [&](auto n, auto zero) { launch(additive<n.value, decltype(zero)>, a.plan.units, stream, a); });
  }
}

void coupling_backward(const CouplingBackward& a, Stream stream) {
  const bool whole = whole_vectors(a.space, a.x, a.shift, a.scale, a.gy, a.gx, a.gshift, a.gscale);
  with_types(a, a.scale_map, whole, [&](auto map, auto n, auto zero) {
    launch(backward<map.value, n.value, decltype(zero)>, a.plan.units, stream, a);
  });
}

}  // namespace pyflow::cuda
