// Coupling layers on an NVIDIA GPU: grids over the scalar functions of ops/coupling.h.
#include "../ops/coupling.h"
#include "tile.h"

namespace pyflow::cuda {
namespace {

struct Args {
  Space space;
  Cut cut;
  bool affine;  // with scale and logdet; else additive
  bool inverse, shift_first;
  ScaleMap scale_map;
  double map_arg;
  View x, shift, scale, mask;       // a view without data is absent
  View y;                           // forward
  View gy, gl, gx, gshift, gscale;  // backward; gl is read by row dims only
  void* logdet;                     // (rows, segments) of the compute type
};

template <class T>
__device__ T couple_as(const Args& a, T x, T shift, T e) {
  if (a.inverse) return a.shift_first ? couple<true, true>(x, shift, e) : couple<true, false>(x, shift, e);
  return a.shift_first ? couple<false, true>(x, shift, e) : couple<false, false>(x, shift, e);
}

template <class T>
__device__ CouplingGrad<T> couple_backward_as(const Args& a, T gy, T gl, T x, T shift, T e, T slope) {
  if (a.inverse) {
    return a.shift_first ? couple_backward<true, true>(gy, gl, x, shift, e, slope)
                         : couple_backward<true, false>(gy, gl, x, shift, e, slope);
  }
  return a.shift_first ? couple_backward<false, true>(gy, gl, x, shift, e, slope)
                       : couple_backward<false, false>(gy, gl, x, shift, e, slope);
}

// calls f with the map as a compile-time constant; f is host or device code
#pragma nv_exec_check_disable
template <class F>
__host__ __device__ void for_map(ScaleMap m, F f) {
  switch (m) {
#define PYFLOW_CASE(name) \
  case ScaleMap::name: return f(std::integral_constant<ScaleMap, ScaleMap::name>{});
    PYFLOW_CASE(exp)
    PYFLOW_CASE(sigmoid)
    PYFLOW_CASE(sigmoid_inv)
    PYFLOW_CASE(softplus)
    PYFLOW_CASE(tanh)
    PYFLOW_CASE(atan)
    PYFLOW_CASE(softsign)
    PYFLOW_CASE(softplus_clamp)
    PYFLOW_CASE(sigmoid_eps)
    PYFLOW_CASE(softplus_eps)
#undef PYFLOW_CASE
  }
}

constexpr int kAnyMap = -1;  // map selected at run time, for cases where binary size matters more than speed

template <int M, class T>
__device__ T log_scale_of(const Args& a, T s) {
  if constexpr (M != kAnyMap) {
    return log_scale<ScaleMap(M)>(s, T(a.map_arg));
  } else {
    T g;
    for_map(a.scale_map, [&](auto map) { g = log_scale<decltype(map)::value>(s, T(a.map_arg)); });
    return g;
  }
}

template <int M, class T>
__device__ LogScale<T> log_scale_slope_of(const Args& a, T s) {
  if constexpr (M != kAnyMap) {
    return log_scale_slope<ScaleMap(M)>(s, T(a.map_arg));
  } else {
    LogScale<T> l;
    for_map(a.scale_map, [&](auto map) { l = log_scale_slope<decltype(map)::value>(s, T(a.map_arg)); });
    return l;
  }
}

// calls f(spot, i) for each group of N columns of this thread; i: index of the first among its kEach columns
template <int N, class F>
__device__ void for_each_group(const Args& a, F f) {
  const int64_t first = blockIdx.x % a.cut.segments * a.cut.segment;
  for (int64_t c = 0; c < a.cut.segment; c += a.cut.cols) {
#pragma unroll 1
    for (int i = 0; i < kEach; i += N) f(spot(a.space, a.cut, blockIdx.x / a.cut.segments, first + c, i), i);
  }
}

template <int N, class T>
__global__ void __launch_bounds__(kThreads, 2) additive(const __grid_constant__ Args a) {
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
__global__ void __launch_bounds__(kThreads, 2) forward(const __grid_constant__ Args a) {
  Group<T, kEach> acc{};
  for_each_group<N>(a, [&](const Spot& p, int at) {
    const auto x = load<N, T>(a.space, a.x, p);
    const auto shift = load<N, T>(a.space, a.shift, p);
    const auto scale = load<N, T>(a.space, a.scale, p);
    const unsigned passes = load_mask<N>(a.space, a.mask, p);
    Group<T, N> y;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const T g = (a.inverse ? T(-1) : T(1)) * log_scale_of<M>(a, scale.v[i]);
      const bool passed = passes >> i & 1;
      y.v[i] = passed ? x.v[i] : couple_as(a, x.v[i], shift.v[i], exp_(g));
      const T counted = p.inside && !passed ? g : T(0);
#pragma unroll
      for (int lane = i; lane < kEach; lane += N) acc.v[lane] += lane == at + i ? counted : T(0);
    }
    store(a.space, a.y, p, y);
  });
  const T sum = fold(acc, int(a.cut.cols));
  const int width = int(a.cut.cols) / kEach;
  const int64_t row = blockIdx.x / a.cut.segments * a.cut.rows + threadIdx.x / width;
  if (threadIdx.x % width == 0 && row < a.space.rows) {
    ((T*)a.logdet)[row * a.cut.segments + blockIdx.x % a.cut.segments] = sum;
  }
}

template <int M, int N, class T>
__global__ void __launch_bounds__(kThreads, 2) backward(const __grid_constant__ Args a) {
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

bool vectors(const Args& a) {
  for (const View* v : {&a.x, &a.shift, &a.scale, &a.y, &a.gy, &a.gx, &a.gshift, &a.gscale}) {
    if (!whole_vectors(a.space, *v)) return false;
  }
  return true;
}

void launch_forward(const Args& a, const Tensor& x) {
  const bool f64 = x.scalar_type() == ScalarType::Double, whole = !f64 && vectors(a);
  if (!a.affine) {
    return launch(f64 ? additive<1, double> : whole ? additive<kEach, float> : additive<1, float>, a.cut.blocks, x, a);
  }
  if (!whole) return launch(f64 ? forward<kAnyMap, 1, double> : forward<kAnyMap, 1, float>, a.cut.blocks, x, a);
  for_map(a.scale_map, [&](auto map) { launch(forward<int(map.value), kEach, float>, a.cut.blocks, x, a); });
}

void launch_backward(const Args& a, const Tensor& x) {
  if (x.scalar_type() == ScalarType::Double) return launch(backward<kAnyMap, 1, double>, a.cut.blocks, x, a);
  if (!vectors(a)) return launch(backward<kAnyMap, 1, float>, a.cut.blocks, x, a);
  for_map(a.scale_map, [&](auto map) { launch(backward<int(map.value), kEach, float>, a.cut.blocks, x, a); });
}

// expects x and the parameters in `layout`; adds y and mask
Tensor run_forward(Args& a, Layout& layout, const Tensor& x, const std::optional<Tensor>& mask) {
  Tensor y = new_like(x);
  layout.add(a.y, y);
  if (mask) layout.add(a.mask, *mask);
  a.space = layout.merge();
  return y;
}

Tensor additive_coupling(Tensor x, Tensor shift, std::optional<Tensor> mask, bool inverse) {
  Args a{};
  Layout layout(x, x.dim() > 1 ? x.dim() - 1 : x.dim());
  a.inverse = inverse;
  layout.add(a.x, x);
  layout.add(a.shift, shift);
  Tensor y = run_forward(a, layout, x, mask);
  if (x.numel() == 0) return y;
  a.cut = cut(a.space);
  launch_forward(a, x);
  return y;
}

struct Map {
  int64_t scale_map;
  double arg;
  bool shift_first, inverse;
};

void set_map(Args& a, const Map& m) {
  a.affine = true;
  a.scale_map = resolve(m.scale_map, m.arg);
  a.map_arg = m.arg;
  a.shift_first = m.shift_first;
  a.inverse = m.inverse;
}

std::tuple<Tensor, Tensor> run_affine(Args& a, Layout& layout, const Tensor& x, const std::optional<Tensor>& mask,
                                      int64_t event_dims) {
  Tensor y = run_forward(a, layout, x, mask);
  Tensor logdet = new_empty(x, x.sizes().data(), x.dim() - event_dims, sum_dtype(x));
  if (x.numel() == 0) return {y, torch::stable::zero_(logdet)};
  a.cut = cut(a.space);
  const int64_t count = a.space.rows * a.cut.segments;
  Tensor partial = a.cut.segments > 1 ? new_empty(x, &count, 1, sum_dtype(x)) : logdet;
  a.logdet = partial.data_ptr();
  launch_forward(a, x);
  if (a.cut.segments > 1) {
    const auto sum = sum_dtype(x) == ScalarType::Double ? launch_sum_segments<double> : launch_sum_segments<float>;
    sum(partial, logdet, a.space.rows, a.cut.segments);
  }
  return {y, logdet};
}

std::tuple<Tensor, Tensor> affine_coupling(Tensor x, Tensor shift, Tensor scale, std::optional<Tensor> mask,
                                           int64_t scale_map, double map_arg, bool shift_first, bool inverse,
                                           int64_t event_dims) {
  Args a{};
  Layout layout(x, event_dims);
  set_map(a, {scale_map, map_arg, shift_first, inverse});
  layout.add(a.x, x);
  layout.add(a.shift, shift);
  layout.add(a.scale, scale);
  return run_affine(a, layout, x, mask, event_dims);
}

// adds the shift and scale views of packed parameters; `packing` as in the operator schema
void add_packed(Layout& layout, View& shift, View& scale, const Tensor& params, int64_t packing, int64_t dim) {
  const int64_t half = params.size(dim) / 2;
  const bool interleaved = packing == 2;
  const int64_t step = interleaved ? 2 : 1, second = interleaved ? 1 : half;
  layout.add_slice(shift, params, dim, packing == 1 ? second : 0, step);
  layout.add_slice(scale, params, dim, packing == 1 ? 0 : second, step);
}

std::tuple<Tensor, Tensor> affine_coupling_packed(Tensor x, Tensor params, std::optional<Tensor> mask, int64_t packing,
                                                  int64_t dim, int64_t scale_map, double map_arg, bool shift_first,
                                                  bool inverse, int64_t event_dims) {
  Args a{};
  Layout layout(x, event_dims);
  set_map(a, {scale_map, map_arg, shift_first, inverse});
  layout.add(a.x, x);
  add_packed(layout, a.shift, a.scale, params, packing, dim);
  return run_affine(a, layout, x, mask, event_dims);
}

// expects x, the parameters and their gradients in `layout`; adds the other views
Tensor run_backward(Args& a, Layout& layout, const std::optional<Tensor>& gy, const std::optional<Tensor>& gl,
                    const Tensor& x, const std::optional<Tensor>& mask) {
  Tensor gx = new_like(x);
  layout.add(a.gx, gx);
  if (gy) layout.add(a.gy, *gy);
  if (gl) layout.add_rows(a.gl, *gl);
  if (mask) layout.add(a.mask, *mask);
  a.space = layout.merge();
  if (x.numel() == 0) return gx;
  a.cut = cut(a.space);
  launch_backward(a, x);
  return gx;
}

std::tuple<Tensor, Tensor, Tensor> affine_coupling_backward(std::optional<Tensor> gy, std::optional<Tensor> gl,
                                                            Tensor x, std::optional<Tensor> shift, Tensor scale,
                                                            std::optional<Tensor> mask, int64_t scale_map,
                                                            double map_arg, bool shift_first, bool inverse,
                                                            int64_t event_dims, std::optional<ScalarType> shift_dtype) {
  Args a{};
  Layout layout(x, event_dims);
  set_map(a, {scale_map, map_arg, shift_first, inverse});
  const int64_t none = 0;
  Tensor gshift =
      shift_dtype ? new_empty(x, x.sizes().data(), x.dim(), *shift_dtype) : new_empty(x, &none, 1, x.scalar_type());
  Tensor gscale = new_like(scale);
  layout.add(a.x, x);
  if (shift) layout.add(a.shift, *shift);
  layout.add(a.scale, scale);
  if (shift_dtype) layout.add(a.gshift, gshift);
  layout.add(a.gscale, gscale);
  Tensor gx = run_backward(a, layout, gy, gl, x, mask);
  return {gx, gshift, gscale};
}

std::tuple<Tensor, Tensor> affine_coupling_packed_backward(std::optional<Tensor> gy, std::optional<Tensor> gl, Tensor x,
                                                           Tensor params, std::optional<Tensor> mask, int64_t packing,
                                                           int64_t dim, int64_t scale_map, double map_arg,
                                                           bool shift_first, bool inverse, int64_t event_dims) {
  Args a{};
  Layout layout(x, event_dims);
  set_map(a, {scale_map, map_arg, shift_first, inverse});
  Tensor gparams = new_like(params);
  layout.add(a.x, x);
  add_packed(layout, a.shift, a.scale, params, packing, dim);
  add_packed(layout, a.gshift, a.gscale, gparams, packing, dim);
  Tensor gx = run_backward(a, layout, gy, gl, x, mask);
  return {gx, gparams};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyflow_cuda, CUDA, m) {
  m.impl("additive_coupling", TORCH_BOX(&additive_coupling));
  m.impl("affine_coupling", TORCH_BOX(&affine_coupling));
  m.impl("affine_coupling_packed", TORCH_BOX(&affine_coupling_packed));
  m.impl("affine_coupling_backward", TORCH_BOX(&affine_coupling_backward));
  m.impl("affine_coupling_packed_backward", TORCH_BOX(&affine_coupling_packed_backward));
}

}  // namespace pyflow::cuda
