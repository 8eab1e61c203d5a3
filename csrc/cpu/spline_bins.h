// Splines of groups of N elements, whose parameters lie in a row per parameter, a column per element. Bins are found by
// counting knots; of the slopes, only the two at the ends of an element's bin are computed. The operator's units are
// processed in chunks, a chunk in groups of kGroup elements, whose parameters are transposed.
#pragma once

#include "../args/spline.h"
#include "transpose.h"

namespace pyflow::PYFLOW_ISA {

template <class T, int N>
using Rows = T (*)[N];

// of the elements of a group
template <class T, int N>
struct Ends {
  alignas(64) T low[N], high[N];  // of the domain and the range
  alignas(64) int32_t linear[N];  // whether tails are linear
};

// the bins of the elements of a group, first with the logits of d0 and d1
template <class T, int N>
struct Bins {
  alignas(64) T x0[N], x1[N], y0[N], y1[N], d0[N], d1[N];
  alignas(64) int32_t k[N], at0[N], at1[N];  // the rows of d0 and d1, -1 for a slope of 1
};

template <class T, int N>
PYFLOW_FN SplineBin<T> bin_of(const Bins<T, N>& b, int i) {
  return {b.x0[i], b.x1[i] - b.x0[i], b.y0[i], b.y1[i] - b.y0[i], b.d0[i], b.d1[i]};
}

// what is transformed, by group; NaN: x is outside a domain without tails
template <class T, int N>
struct Used {
  alignas(64) T used[N], passed[N];  // 0 or 1; 0 or NaN
};

template <class T>
SplineConstants<T> constants_of(const SplineForm& a) {
  const SplineConstants<double>& c = a.constants;
  return {T(c.scale), T(c.limit), T(c.least), T(c.rest), T(c.min_slope)};
}

template <class T, int N>
void set_ends(double low, double high, bool linear, Ends<T, N>& e) {
  fill(e.low, T(low), N);
  fill(e.high, T(high), N);
  fill(e.linear, int32_t(linear), N);
}

// what differs by feature, for n elements of a tile
template <class T>
void set_features(const SplineArgs& a, const Tile& t, int64_t first, int64_t n, Ends<T, kGroup>& e) {
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

template <class T, int N>
void set_used(const SplineForm& a, const Ends<T, N>& e, const T* __restrict x, const T* __restrict mask,
              Used<T, N>& u) {
  const bool tails = a.tails != SplineTails::none, closed = a.variant != SplineVariant::zuko || !tails;
  const T outside = tails ? T(0) : T(__builtin_nan(""));
#pragma omp simd
  for (int i = 0; i < N; ++i) {
    const T open = mask[i] == T(0) ? T(1) : T(0);
    const T inside = spline_inside(x[i], e.low[i], e.high[i], closed) ? open : T(0);
    u.used[i] = inside;
    u.passed[i] = inside < open ? outside : T(0);
  }
}

// logits -> e^(logit - largest) and their sum
template <SplineVariant V, class T, int N>
void softmax(Rows<T, N> p, int bins, const SplineConstants<T>& c, Ahead& ahead, T* __restrict total) {
  alignas(64) T most[N];
#pragma omp simd
  for (int i = 0; i < N; ++i) most[i] = p[0][i] = spline_logit<V>(p[0][i], c);
  for (int j = 1; j < bins; ++j) {
    T* __restrict v = p[j];
    ahead.prefetch();
#pragma omp simd
    for (int i = 0; i < N; ++i) {
      v[i] = spline_logit<V>(v[i], c);
      most[i] = v[i] > most[i] ? v[i] : most[i];
    }
  }
  fill(total, T(0), N);
  for (int j = 0; j < bins; ++j) {
    T* __restrict v = p[j];
    ahead.prefetch();
#pragma omp simd
    for (int i = 0; i < N; ++i) {
      v[i] = spline_exp(v[i], most[i]);
      total[i] += v[i];
    }
  }
}

// elements whose values stay in registers from bin to bin
template <int N>
constexpr int part_of = N < 16 ? N : 16;

// the knots at both ends of the bin of every element; Count: of x, whose bin is counted to k, which is given otherwise
template <SplineVariant V, bool Count, class T, int N>
void set_bin_ends(Rows<T, N> p, int bins, const SplineConstants<T>& c, const T* __restrict total, const Ends<T, N>& e,
                  const T* __restrict x, int32_t* __restrict k, T* __restrict left, T* __restrict right) {
  constexpr int kPart = part_of<N>;
  for (int at = 0; at < N; at += kPart) {
    // n: 1 + the number of knots passed; own: what the bin takes; before: the sum of the parts left of it
    alignas(64) T factor[kPart], span[kPart], sum[kPart], before[kPart], own[kPart];
    alignas(64) int32_t n[kPart];
    const T *low = e.low + at, *high = e.high + at;
#pragma omp simd
    for (int i = 0; i < kPart; ++i) {
      factor[i] = c.rest / total[at + i];
      span[i] = high[i] - low[i];
      sum[i] = before[i] = own[i] = T(0);
      n[i] = Count ? 1 : k[at + i] + 1;
    }
    for (int j = 0; j < bins - 1; ++j) {
      const T* v = p[j] + at;
      // both selections compare j with n: of one that tests the knot gcc makes a branch
#pragma omp simd
      for (int i = 0; i < kPart; ++i) {
        const T value = v[i], to = sum[i];
        own[i] = j < n[i] ? value : own[i];
        before[i] = j < n[i] ? to : before[i];
        sum[i] = to + fma_(value, factor[i], c.least);
        if constexpr (Count) n[i] += right_of<V>(x[at + i], fma_(span[i], sum[i], low[i])) ? 1 : 0;
      }
    }
#pragma omp simd
    for (int i = 0; i < kPart; ++i) {
      const T first = low[i], last = high[i], some = before[i], to = n[i] < bins ? some : sum[i];
      const T x0 = fma_(span[i], to, first), x1 = fma_(span[i], some + fma_(own[i], factor[i], c.least), first);
      left[at + i] = n[i] > 1 ? x0 : first;
      right[at + i] = n[i] < bins ? x1 : last;
      if constexpr (Count) k[at + i] = n[i] - 1;
    }
  }
}

template <class T, int N>
void set_slope_rows(const SplineForm& a, const Ends<T, N>& e, Bins<T, N>& b) {
  const int32_t last = a.bins - 1, shift = a.tails == SplineTails::linear ? -1 : 0;
  const bool wraps = a.tails != SplineTails::none;
#pragma omp simd
  for (int i = 0; i < N; ++i) {
    const int32_t k = b.k[i], left = k + shift, right = left + 1;
    const int32_t first = e.linear[i] ? -1 : shift, end = e.linear[i] ? -1 : wraps ? 0 : right;
    b.at0[i] = k == 0 ? first : left;
    b.at1[i] = k == last ? end : right;
  }
}

// the logits of the slopes at both ends, 0 for a slope of 1
template <class T, int N>
void set_slope_logits(Rows<T, N> slopes, int64_t count, Bins<T, N>& b) {
  constexpr int kPart = part_of<N>;
  for (int at = 0; at < N; at += kPart) {
    alignas(64) T d0[kPart] = {}, d1[kPart] = {};
    const int32_t *at0 = b.at0 + at, *at1 = b.at1 + at;
    for (int32_t j = 0; j < int32_t(count); ++j) {
      const T* v = slopes[j] + at;
#pragma omp simd
      for (int i = 0; i < kPart; ++i) {
        const T value = v[i];
        d0[i] = j == at0[i] ? value : d0[i];
        d1[i] = j == at1[i] ? value : d1[i];
      }
    }
    __builtin_memcpy(b.d0 + at, d0, sizeof d0);
    __builtin_memcpy(b.d1 + at, d1, sizeof d1);
  }
}

// the sums of what the softmax of widths and of heights divides
template <class T, int N>
struct Totals {
  alignas(64) T w[N], h[N];
};

// widths and heights -> what their softmax divides
template <SplineVariant V, class T, int N>
void softmaxes(const SplineForm& a, const SplineConstants<T>& c, Rows<T, N> parts, Ahead& ahead, Totals<T, N>& total) {
  softmax<V>(parts, a.bins, c, ahead, total.w);
  softmax<V>(parts + a.bins, a.bins, c, ahead, total.h);
}

// these -> bins
template <SplineVariant V, bool Inverse, class T, int N>
void find_bins(const SplineForm& a, const SplineConstants<T>& c, const Ends<T, N>& e, const T* x, Rows<T, N> parts,
               Rows<T, N> slopes, const Totals<T, N>& total, Bins<T, N>& b) {
  const Rows<T, N> heights = parts + a.bins;
  // first the axis of x
  if (Inverse) set_bin_ends<V, true>(heights, a.bins, c, total.h, e, x, b.k, b.y0, b.y1);
  set_bin_ends<V, !Inverse>(parts, a.bins, c, total.w, e, x, b.k, b.x0, b.x1);
  if (!Inverse) set_bin_ends<V, false>(heights, a.bins, c, total.h, e, x, b.k, b.y0, b.y1);
  set_slope_rows(a, e, b);
  set_slope_logits(slopes, spline_params(a.bins, a.tails) - 2 * a.bins, b);
}

// logits -> slopes. The selection after the computation, not around it: gcc would branch.
template <SplineVariant V, class T, int N>
void set_slopes(Bins<T, N>& b, const SplineConstants<T>& c) {
#pragma omp simd
  for (int i = 0; i < N; ++i) {
    const T d0 = spline_slope<V>(b.d0[i], c), d1 = spline_slope<V>(b.d1[i], c);
    b.d0[i] = b.at0[i] < 0 ? T(1) : d0;
    b.d1[i] = b.at1[i] < 0 ? T(1) : d1;
  }
}

// the places of x in the bins, in a loop of their own: the steps of one element depend on each other, and in a long
// loop few elements overlap
template <bool Inverse, class T, int N>
void set_places(const Bins<T, N>& b, const T* __restrict x, T* __restrict s, T* __restrict theta) {
#pragma omp simd
  for (int i = 0; i < N; ++i) {
    const T value = x[i];
    const SplineBin<T> bin = bin_of(b, i);
    s[i] = bin.h / bin.w;
    theta[i] = spline_theta<Inverse>(value, s[i], bin);
  }
}

// y and log-determinants of a group
template <bool Inverse, class T, int N>
void transform(const Bins<T, N>& b, const Used<T, N>& u, const T* __restrict x, T* __restrict y, T* __restrict g) {
  alignas(64) T s[N], theta[N], rise[N];
  set_places<Inverse>(b, x, s, theta);
#pragma omp simd
  for (int i = 0; i < N; ++i) {
    // read before they are selected: a selected read is a branch where reads have no mask
    const T passed = u.passed[i], from = x[i];
    const bool used = u.used[i] != T(0), nan = passed != T(0);
    const SplineBin<T> bin = bin_of(b, i);
    const SplinePlace<T> place = spline_place(theta[i], s[i], bin);
    const T value = spline_value<Inverse>(place, bin);
    rise[i] = spline_rise(place);
    y[i] = used ? value : nan ? passed : from;
  }
#pragma omp simd
  for (int i = 0; i < N; ++i) {
    const T value = log_(rise[i]), passed = u.passed[i];
    g[i] = u.used[i] != T(0) ? (Inverse ? -value : value) : passed;
  }
}

// the derivatives of the slopes by their logits, before set_slopes overwrites these
template <SplineVariant V, class T, int N>
void set_slope_rates(const Bins<T, N>& b, const SplineConstants<T>& c, T* __restrict rate0, T* __restrict rate1) {
#pragma omp simd
  for (int i = 0; i < N; ++i) {
    rate0[i] = spline_slope_rate<V>(b.d0[i], c);
    rate1[i] = spline_slope_rate<V>(b.d1[i], c);
  }
}

// gradients of the knots at both ends of the bins, and of the logits of the slopes there
template <class T, int N>
struct BinGrads {
  alignas(64) T x0[N], x1[N], y0[N], y1[N], d0[N], d1[N];
};

// d: in, the derivatives of the slopes
template <bool Inverse, class T, int N>
void bin_gradients(const Bins<T, N>& b, int bins, const Used<T, N>& u, const T* __restrict x, const T* __restrict gy,
                   const T* __restrict gl, BinGrads<T, N>& d, T* __restrict gx) {
  alignas(64) T s[N], theta[N];
  set_places<Inverse>(b, x, s, theta);
#pragma omp simd
  for (int i = 0; i < N; ++i) {
    const bool used = u.used[i] != T(0), nan = u.passed[i] != T(0);
    const SplineBin<T> bin = bin_of(b, i);
    const SplineGrad<T> grad = spline_gradient<Inverse>(gy[i], gl[i], spline_place(theta[i], s[i], bin), bin);
    const T kept = nan ? u.passed[i] : gy[i];
    gx[i] = used ? grad.value : kept;
    // the outer knots are fixed
    const bool left = b.k[i] > 0, right = b.k[i] + 1 < bins;
    d.x0[i] = left ? grad.x0 : T(0);
    d.x1[i] = right ? grad.x1 : T(0);
    d.y0[i] = left ? grad.y0 : T(0);
    d.y1[i] = right ? grad.y1 : T(0);
    d.d0[i] *= grad.d0;
    d.d1[i] *= grad.d1;
  }
}

// logits -> their gradients, from those of the knots at both ends: knot j moves with part i for all i < j
template <SplineVariant V, class T, int N>
void logit_gradients(Rows<T, N> p, Rows<T, N> parts, int bins, const SplineConstants<T>& c, const T* __restrict total,
                     const Ends<T, N>& e, const Used<T, N>& u, const int32_t* __restrict k, const T* __restrict left,
                     const T* __restrict right, Ahead& ahead) {
  alignas(64) T mean[N], factor[N];
  fill(mean, T(0), N);
  for (int j = 0; j < bins; ++j) {
    const T* __restrict v = parts[j];
    ahead.prefetch<true>();
#pragma omp simd
    for (int i = 0; i < N; ++i) {
      const T both = left[i] + right[i], of_right = j == k[i] ? right[i] : T(0);
      mean[i] = fma_(v[i], j < k[i] ? both : of_right, mean[i]);
    }
  }
#pragma omp simd
  for (int i = 0; i < N; ++i) {
    mean[i] /= total[i];
    factor[i] = c.rest * (e.high[i] - e.low[i]) / total[i];
  }
  for (int j = 0; j < bins; ++j) {
    const T* __restrict v = parts[j];
    ahead.prefetch<true>();
    T* __restrict out = p[j];
#pragma omp simd
    for (int i = 0; i < N; ++i) {
      const T both = left[i] + right[i], of_right = j == k[i] ? right[i] : T(0);
      const T grad = (j < k[i] ? both : of_right) - mean[i];
      const T value = v[i] * factor[i] * grad * spline_logit_rate<V>(out[i], c);
      out[i] = u.used[i] != T(0) ? value : u.passed[i];
    }
  }
}

template <class T, int N>
void slope_gradients(Rows<T, N> p, int64_t count, const Used<T, N>& u, const Bins<T, N>& b, const BinGrads<T, N>& d) {
  for (int64_t j = 0; j < count; ++j) {
    const int32_t row = int32_t(j);
    T* __restrict out = p[j];
#pragma omp simd
    for (int i = 0; i < N; ++i) {
      const T right = row == b.at1[i] ? d.d1[i] : T(0), value = row == b.at0[i] ? d.d0[i] : right;
      out[i] = u.used[i] != T(0) ? value : u.passed[i];
    }
  }
}

// n values filled up to a group, in place if they are one
template <class T>
PYFLOW_FN const T* whole_group(const T* from, int64_t n, T* buffer) {
  if (n == kGroup) return from;
  for (int64_t i = 0; i < n; ++i) buffer[i] = from[i];
  fill(buffer + n, T(0), kGroup - n);
  return buffer;
}

template <class F>
PYFLOW_FN void with_form(const SplineForm& a, F f) {
  using Nflows = Constant<SplineVariant, SplineVariant::nflows>;
  using Zuko = Constant<SplineVariant, SplineVariant::zuko>;
  using Forward = Constant<bool, false>;
  using Inverse = Constant<bool, true>;
  // normflows computes what nflows does
  if (a.variant == SplineVariant::zuko) {
    a.inverse ? f(Zuko(), Inverse()) : f(Zuko(), Forward());
  } else {
    a.inverse ? f(Nflows(), Inverse()) : f(Nflows(), Forward());
  }
}

}  // namespace pyflow::PYFLOW_ISA
