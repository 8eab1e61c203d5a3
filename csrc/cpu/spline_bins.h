// The bins of spline elements. A unit is processed in chunks, a chunk in groups of kGroup elements, whose parameters
// are transposed: a row per parameter, a column per element. Bins are found by counting knots; of the slopes, only the
// two at the ends of an element's bin are computed.
#pragma once

#include "../args/spline.h"
#include "transpose.h"

namespace pyflow::PYFLOW_ISA {

template <class T>
using Rows = T (*)[kGroup];

// of the elements of a group
template <class T>
struct Ends {
  alignas(64) T low[kGroup], high[kGroup];  // of the domain and the range
  alignas(64) int32_t linear[kGroup];       // whether tails are linear
};

// the bins of the elements of a group, first with the logits of d0 and d1
template <class T>
struct Bins {
  alignas(64) T x0[kGroup], x1[kGroup], y0[kGroup], y1[kGroup], d0[kGroup], d1[kGroup];
  alignas(64) int32_t k[kGroup], at0[kGroup], at1[kGroup];  // the rows of d0 and d1, -1 for a slope of 1
};

// what is transformed, by group; NaN: x is outside a domain without tails
template <class T>
struct Used {
  alignas(64) T used[kGroup], passed[kGroup];  // 0 or 1; 0 or NaN
};

template <class T>
SplineConstants<T> constants_of(const SplineArgs& a) {
  const SplineConstants<double>& c = a.constants;
  return {T(c.scale), T(c.limit), T(c.least), T(c.rest), T(c.min_slope)};
}

template <class T>
void set_ends(const SplineArgs& a, Ends<T>& e) {
  fill(e.low, T(a.low), kGroup);
  fill(e.high, T(a.high), kGroup);
  fill(e.linear, int32_t(a.tails == SplineTails::linear), kGroup);
}

// what differs by feature, for n elements of a tile
template <class T>
void set_features(const SplineArgs& a, const Tile& t, int64_t first, int64_t n, Ends<T>& e) {
  if (!a.bounds.data && a.tails != SplineTails::mixed) return;
  int64_t f = ((t.row + first / t.cols) * a.space.cols + t.col + first % t.cols) % a.features;
  for (int64_t i = 0; i < n; ++i) {
    if (a.bounds.data) {
      e.high[i] = ((const T*)a.bounds.data)[f * a.bounds.stride[0]];
      e.low[i] = -e.high[i];
    }
    if (a.tails == SplineTails::mixed) e.linear[i] = int32_t(a.linear[f / 32] >> (f % 32) & 1);
    f = f + 1 == a.features ? 0 : f + 1;
  }
}

template <class T>
void set_used(const SplineArgs& a, const Ends<T>& e, const T* __restrict x, const T* __restrict mask, Used<T>& u) {
  const bool tails = a.tails != SplineTails::none, closed = a.variant != SplineVariant::zuko || !tails;
  const T outside = tails ? T(0) : T(__builtin_nan(""));
  for (int i = 0; i < kGroup; ++i) {
    const bool inside = spline_inside(x[i], e.low[i], e.high[i], closed), open = mask[i] == T(0);
    u.used[i] = inside && open ? T(1) : T(0);
    u.passed[i] = !inside && open ? outside : T(0);
  }
}

// logits -> e^(logit - largest) and their sum
template <SplineVariant V, class T>
void softmax(Rows<T> p, int bins, const SplineConstants<T>& c, Ahead& ahead, T* __restrict total) {
  alignas(64) T most[kGroup];
#pragma omp simd
  for (int i = 0; i < kGroup; ++i) most[i] = p[0][i] = spline_logit<V>(p[0][i], c);
  for (int j = 1; j < bins; ++j) {
    T* __restrict v = p[j];
    ahead.prefetch();
#pragma omp simd
    for (int i = 0; i < kGroup; ++i) {
      v[i] = spline_logit<V>(v[i], c);
      most[i] = v[i] > most[i] ? v[i] : most[i];
    }
  }
  fill(total, T(0), kGroup);
  for (int j = 0; j < bins; ++j) {
    T* __restrict v = p[j];
    ahead.prefetch();
#pragma omp simd
    for (int i = 0; i < kGroup; ++i) {
      v[i] = spline_exp(v[i], most[i]);
      total[i] += v[i];
    }
  }
}

// the right ends of bins to `knots`, which may be p; Count: also the bin of every x
template <SplineVariant V, bool Count, class T>
void add_bins(Rows<T> p, int bins, const SplineConstants<T>& c, const T* __restrict total, const Ends<T>& e,
              const T* __restrict x, Rows<T> knots, int32_t* __restrict k) {
  alignas(64) T sum[kGroup], factor[kGroup];
#pragma omp simd
  for (int i = 0; i < kGroup; ++i) factor[i] = c.rest / total[i];
  fill(sum, T(0), kGroup);
  for (int j = 0; j < bins - 1; ++j) {
    const T* v = p[j];
    T* knot = knots[j];
#pragma omp simd
    for (int i = 0; i < kGroup; ++i) {
      sum[i] += fma_(v[i], factor[i], c.least);
      const T end = fma_(e.high[i] - e.low[i], sum[i], e.low[i]);
      knot[i] = end;
      if constexpr (Count) k[i] += right_of<V>(x[i], end) ? 1 : 0;
    }
  }
  __builtin_memcpy(knots[bins - 1], e.high, sizeof e.high);
}

template <class T>
void set_slope_rows(const SplineArgs& a, const Ends<T>& e, Bins<T>& b) {
  const int32_t last = a.bins - 1, shift = a.tails == SplineTails::linear ? -1 : 0;
  const int32_t wraps = a.tails != SplineTails::none;
#pragma omp simd
  for (int i = 0; i < kGroup; ++i) {
    const int32_t k = b.k[i], linear = e.linear[i];
    const int32_t right = k == last && wraps ? 0 : k + 1 + shift;
    b.at0[i] = k == 0 && linear ? -1 : k + shift;
    b.at1[i] = k == last && linear ? -1 : right;
  }
}

template <class T>
void gather(Rows<T> xs, Rows<T> ys, Rows<T> slopes, const Ends<T>& e, Bins<T>& b) {
  for (int i = 0; i < kGroup; ++i) {
    const int32_t k = b.k[i], left = k > 0 ? k - 1 : 0;
    b.x0[i] = k > 0 ? xs[left][i] : e.low[i];
    b.x1[i] = xs[k][i];
    b.y0[i] = k > 0 ? ys[left][i] : e.low[i];
    b.y1[i] = ys[k][i];
    b.d0[i] = slopes[b.at0[i] < 0 ? 0 : b.at0[i]][i];
    b.d1[i] = slopes[b.at1[i] < 0 ? 0 : b.at1[i]][i];
  }
}

// widths and heights -> bins, with knots in their place or apart
template <SplineVariant V, bool Inverse, class T>
void find_bins(const SplineArgs& a, const SplineConstants<T>& c, const Ends<T>& e, const T* x, Rows<T> parts,
               Rows<T> slopes, Rows<T> knots, Ahead& ahead, T* total_w, T* total_h, Bins<T>& b) {
  const Rows<T> xs = knots, ys = knots + a.bins;
  softmax<V>(parts, a.bins, c, ahead, total_w);
  softmax<V>(parts + a.bins, a.bins, c, ahead, total_h);
  fill(b.k, 0, kGroup);
  add_bins<V, !Inverse>(parts, a.bins, c, total_w, e, x, xs, b.k);
  add_bins<V, Inverse>(parts + a.bins, a.bins, c, total_h, e, x, ys, b.k);
  set_slope_rows(a, e, b);
  gather(xs, ys, slopes, e, b);
}

// logits -> slopes. The selection after the computation, not around it: gcc would branch.
template <SplineVariant V, class T>
void set_slopes(Bins<T>& b, const SplineConstants<T>& c) {
#pragma omp simd
  for (int i = 0; i < kGroup; ++i) {
    const T d0 = spline_slope<V>(b.d0[i], c), d1 = spline_slope<V>(b.d1[i], c);
    b.d0[i] = b.at0[i] < 0 ? T(1) : d0;
    b.d1[i] = b.at1[i] < 0 ? T(1) : d1;
  }
}

// copies n values and fills up the group
template <class T>
PYFLOW_FN void copy_group(const T* from, int64_t n, T* to, T rest) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  fill(to + n, rest, kGroup - n);
}

template <class F>
PYFLOW_FN void with_form(const SplineArgs& a, F f) {
  using Nflows = std::integral_constant<SplineVariant, SplineVariant::nflows>;
  using Zuko = std::integral_constant<SplineVariant, SplineVariant::zuko>;
  // normflows computes what nflows does
  if (a.variant == SplineVariant::zuko) {
    a.inverse ? f(Zuko(), std::true_type()) : f(Zuko(), std::false_type());
  } else {
    a.inverse ? f(Nflows(), std::true_type()) : f(Nflows(), std::false_type());
  }
}

}  // namespace pyflow::PYFLOW_ISA
