// Rational-quadratic splines on an NVIDIA GPU: a thread has one element at a time. With K = 8 bins of dense float32
// parameters, the usual case, exponentials stay in registers; else they are computed anew from the parameters, which
// the caches hold, wherever they are needed. No array is indexed at run time, which would be local memory.
#include "../args/spline.h"
#include "tile.h"

namespace pyflow::cuda {
namespace {

constexpr int kAnyBins = 0;
constexpr int kUsualBins = 8;

template <class T>
struct Ends {
  T low, high;
  bool linear;  // tails
};

template <class T>
__device__ SplineConstants<T> constants_of(const SplineArgs& a) {
  const SplineConstants<double>& c = a.constants;
  return {T(c.scale), T(c.limit), T(c.least), T(c.rest), T(c.min_slope)};
}

template <class T>
__device__ Ends<T> ends_of(const SplineArgs& a, const Spot& p) {
  Ends<T> e{T(a.low), T(a.high), a.tails == SplineTails::linear};
  const bool mixed = a.tails == SplineTails::mixed;
  if (!a.bounds.data && !mixed) return e;
  const int64_t f = (p.row * a.space.cols + p.col) % a.features;
  if (a.bounds.data) {
    e.high = ((const T*)a.bounds.data)[f * a.bounds.stride[0]];
    e.low = -e.high;
  }
  if (mixed) e.linear = a.linear[f / 32] >> (f % 32) & 1;
  return e;
}

// the parameters of an element
template <int K, class T>
struct Params {
  const SplineArgs& a;
  int64_t at;

  __device__ int bins() const { return K == kAnyBins ? a.bins : K; }
  __device__ T operator[](int64_t j) const {
    if constexpr (K == kAnyBins) {
      return read<T>(a.params, at + j * a.step);
    } else {
      return ((const T*)a.params.data)[at + j];
    }
  }
};

// e^(logit - most) of the widths or heights of an element
template <SplineVariant V, int K, class T>
struct Parts {
  const Params<K, T>& params;
  int first;
  T most, total;
  T kept[K == kAnyBins ? 1 : K];

  __device__ Parts(const Params<K, T>& given, int at, const SplineConstants<T>& c) : params(given), first(at) {
    most = spline_logit<V>(given[at], c);
    if constexpr (K != kAnyBins) kept[0] = most;
#pragma unroll(K == kAnyBins ? 1 : K)
    for (int j = 1; j < given.bins(); ++j) {
      const T v = spline_logit<V>(given[at + j], c);
      most = v > most ? v : most;
      if constexpr (K != kAnyBins) kept[j] = v;
    }
    total = T(0);
#pragma unroll(K == kAnyBins ? 1 : K)
    for (int j = 0; j < given.bins(); ++j) {
      if constexpr (K == kAnyBins) {
        total += exp(j, c);
      } else {
        kept[j] = spline_exp(kept[j], most);
        total += kept[j];
      }
    }
  }

  __device__ T exp(int j, const SplineConstants<T>& c) const {
    if constexpr (K == kAnyBins) {
      return spline_exp(spline_logit<V>(params[first + j], c), most);
    } else {
      return kept[j];
    }
  }

  // calls f(j, right end of bin j) for all bins but the last
  template <class F>
  __device__ void for_each_knot(const Ends<T>& e, const SplineConstants<T>& c, F f) const {
    const T factor = c.rest / total;
    T sum = T(0);
#pragma unroll(K == kAnyBins ? 1 : K)
    for (int j = 0; j < params.bins() - 1; ++j) {
      sum += fma_(exp(j, c), factor, c.least);
      f(j, fma_(e.high - e.low, sum, e.low));
    }
  }
};

// the bin of an element and its number; where the numbers behind its slopes are, -1 for a slope of 1
template <class T>
struct Found {
  SplineBin<T> bin;
  int k, at0, at1;
};

template <SplineVariant V, class T>
__device__ void search(T value, const Ends<T>& e, int& k, T& left, T& right, int j, T knot) {
  // the knots before the first that is not passed are all passed
  if (k == j) right = knot;
  if (right_of<V>(value, knot)) {
    left = knot;
    right = e.high;
    k = j + 1;
  }
}

template <SplineVariant V, bool Inverse, int K, class T>
__device__ Found<T> find(const SplineArgs& a, const Params<K, T>& params, const Parts<V, K, T>& widths,
                         const Parts<V, K, T>& heights, const Ends<T>& e, const SplineConstants<T>& c, T value) {
  int k = 0;
  T from0 = e.low, from1 = e.high, to0 = e.low, to1 = e.high;
  (Inverse ? heights : widths).for_each_knot(e, c, [&](int j, T knot) {
    search<V>(value, e, k, from0, from1, j, knot);
  });
  (Inverse ? widths : heights).for_each_knot(e, c, [&](int j, T knot) {
    to0 = j < k ? knot : to0;
    to1 = j == k ? knot : to1;
  });
  const int bins = params.bins(), last = bins - 1, shift = a.tails == SplineTails::linear ? -1 : 0;
  const bool wraps = a.tails != SplineTails::none;
  Found<T> f;
  f.k = k;
  f.at0 = k == 0 && e.linear ? -1 : 2 * bins + k + shift;
  f.at1 = k == last && e.linear ? -1 : 2 * bins + (k == last && wraps ? 0 : k + 1 + shift);
  const T d0 = f.at0 < 0 ? T(1) : spline_slope<V>(params[f.at0], c);
  const T d1 = f.at1 < 0 ? T(1) : spline_slope<V>(params[f.at1], c);
  f.bin = Inverse ? SplineBin<T>{to0, to1 - to0, from0, from1 - from0, d0, d1}
                  : SplineBin<T>{from0, from1 - from0, to0, to1 - to0, d0, d1};
  return f;
}

// whether the spline transforms an element; `nan`: it has no result, outside a domain without tails
struct Use {
  bool used, nan;
};

template <SplineVariant V, class T>
__device__ Use use_of(const SplineArgs& a, const Ends<T>& e, T value, bool passes) {
  const bool tails = a.tails != SplineTails::none;
  const bool inside = spline_inside(value, e.low, e.high, V != SplineVariant::zuko || !tails);
  return {inside && !passes, !inside && !passes && !tails};
}

template <class T>
__device__ T nan_or(bool nan, T value) {
  return nan ? T(__builtin_nanf("")) : value;
}

template <SplineVariant V, bool Inverse, int K, class T>
__global__ void __launch_bounds__(kThreads, 2) forward(const __grid_constant__ SplineForward a) {
  Group<T, kEach> acc{};
  const SplineConstants<T> c = constants_of<T>(a);
  for_each_group<1>(a, [&](const Spot& p, int at) {
    if (!p.inside) return;
    const T x = load<1, T>(a.space, a.x, p).v[0];
    const Ends<T> e = ends_of<T>(a, p);
    const Use use = use_of<V>(a, e, x, load_mask<1>(a.space, a.mask, p));
    const Params<K, T> params{a, row_offset(a.space, a.params, p.row) + col_offset(a.space, a.params, p.col)};
    const Parts<V, K, T> widths(params, 0, c), heights(params, params.bins(), c);
    const Found<T> f = find<V, Inverse>(a, params, widths, heights, e, c, x);
    const SplinePlace<T> place = spline_place<Inverse>(x, f.bin);
    const T y = spline_value<Inverse>(place, f.bin), g = log_(spline_rise(place));
    store(a.space, a.y, p, Group<T, 1>{use.used ? y : nan_or(use.nan, x)});
    add_terms(p, at, Group<T, 1>{use.used ? (Inverse ? -g : g) : nan_or(use.nan, T(0))}, acc);
  });
  write_row_sum(a, a.logdet, 0, fold(acc, int(a.plan.tile_cols)));
}

// the gradients of the parameters of an element
template <int K, class T>
struct ParamGrads {
  const SplineBackward& a;
  int64_t at;
  Use use;

  __device__ void write(int64_t j, T value) const {
    value = use.used ? value : nan_or(use.nan, T(0));
    if constexpr (K == kAnyBins) {
      cuda::write(a.gparams, at + j * a.gstep, value);
    } else {
      ((T*)a.gparams.data)[at + j] = value;
    }
  }
};

// from the gradients of the knots at both ends of bin k: knot j moves with part i for all i < j
template <SplineVariant V, int K, class T>
__device__ void write_logit_gradients(const Parts<V, K, T>& parts, const ParamGrads<K, T>& grads, const Ends<T>& e,
                                      const SplineConstants<T>& c, int k, T left, T right) {
  const int bins = parts.params.bins();
  // the outer knots are fixed
  right = k + 1 < bins ? right : T(0);
  const T both = (k > 0 ? left : T(0)) + right;
  T mean = T(0);
#pragma unroll(K == kAnyBins ? 1 : K)
  for (int j = 0; j < bins; ++j) mean = fma_(parts.exp(j, c), j < k ? both : j == k ? right : T(0), mean);
  mean /= parts.total;
  const T factor = c.rest * (e.high - e.low) / parts.total;
#pragma unroll(K == kAnyBins ? 1 : K)
  for (int j = 0; j < bins; ++j) {
    const T grad = (j < k ? both : j == k ? right : T(0)) - mean;
    const T rate = spline_logit_rate<V>(V == SplineVariant::zuko ? parts.params[parts.first + j] : T(0), c);
    grads.write(parts.first + j, parts.exp(j, c) * factor * grad * rate);
  }
}

template <SplineVariant V, bool Inverse, int K, class T>
__global__ void __launch_bounds__(kThreads, 2) backward(const __grid_constant__ SplineBackward a) {
  const SplineConstants<T> c = constants_of<T>(a);
  for_each_group<1>(a, [&](const Spot& p, int) {
    if (!p.inside) return;
    const T x = load<1, T>(a.space, a.x, p).v[0];
    const T gy = a.gy.data ? load<1, T>(a.space, a.gy, p).v[0] : T(0);
    const T gl = a.gl.data ? read<T>(a.gl, row_offset(a.space, a.gl, p.row)) : T(0);
    const Ends<T> e = ends_of<T>(a, p);
    const Use use = use_of<V>(a, e, x, load_mask<1>(a.space, a.mask, p));
    const Params<K, T> params{a, row_offset(a.space, a.params, p.row) + col_offset(a.space, a.params, p.col)};
    const Parts<V, K, T> widths(params, 0, c), heights(params, params.bins(), c);
    const Found<T> f = find<V, Inverse>(a, params, widths, heights, e, c, x);
    const SplineGrad<T> g = spline_gradient<Inverse>(gy, gl, spline_place<Inverse>(x, f.bin), f.bin);
    store(a.space, a.gx, p, Group<T, 1>{use.used ? g.value : nan_or(use.nan, gy)});
    const int64_t at = row_offset(a.space, a.gparams, p.row) + col_offset(a.space, a.gparams, p.col);
    const ParamGrads<K, T> grads{a, at, use};
    write_logit_gradients(widths, grads, e, c, f.k, g.x0, g.x1);
    write_logit_gradients(heights, grads, e, c, f.k, g.y0, g.y1);
    const T d0 = f.at0 < 0 ? T(0) : g.d0 * spline_slope_rate<V>(params[f.at0], c);
    const T d1 = f.at1 < 0 ? T(0) : g.d1 * spline_slope_rate<V>(params[f.at1], c);
    const int count = spline_params(params.bins(), a.tails);
    for (int j = 2 * params.bins(); j < count; ++j) grads.write(j, j == f.at0 ? d0 : j == f.at1 ? d1 : T(0));
  });
}

bool dense(const View& params, int64_t step) { return params.dtype == DType::f32 && step == 1; }

// calls f with the variant, the direction, the bins known to the kernel, and a 0 of the compute type
template <class F>
void with_form(const SplineArgs& a, bool usual, F f) {
  const auto of_type = [&](auto variant, auto inverse) {
    if (a.f64) {
      f(variant, inverse, std::integral_constant<int, kAnyBins>(), double());
    } else if (usual && a.bins == kUsualBins) {
      f(variant, inverse, std::integral_constant<int, kUsualBins>(), float());
    } else {
      f(variant, inverse, std::integral_constant<int, kAnyBins>(), float());
    }
  };
  const auto of_direction = [&](auto variant) {
    a.inverse ? of_type(variant, std::true_type()) : of_type(variant, std::false_type());
  };
  // normflows computes what nflows does
  if (a.variant == SplineVariant::zuko) {
    of_direction(std::integral_constant<SplineVariant, SplineVariant::zuko>());
  } else {
    of_direction(std::integral_constant<SplineVariant, SplineVariant::nflows>());
  }
}

}  // namespace

void spline_forward(const SplineForward& a, Stream stream) {
  with_form(a, dense(a.params, a.step), [&](auto variant, auto inverse, auto bins, auto zero) {
    launch(forward<variant.value, inverse.value, bins.value, decltype(zero)>, a.plan.units, stream, a);
  });
}

void spline_backward(const SplineBackward& a, Stream stream) {
  with_form(a, dense(a.params, a.step) && dense(a.gparams, a.gstep),
            [&](auto variant, auto inverse, auto bins, auto zero) {
              launch(backward<variant.value, inverse.value, bins.value, decltype(zero)>, a.plan.units, stream, a);
            });
}

}  // namespace pyflow::cuda
