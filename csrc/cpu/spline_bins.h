// The bins of spline elements. A unit is processed in chunks, a chunk in groups of kGroup elements, whose parameters
// are transposed: a row per parameter, a column per element. Bins are found by counting knots; of the slopes, only the
// two at the ends of an element's bin are computed.
#pragma once

#include <type_traits>

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

template <class T>
PYFLOW_FN SplineBin<T> bin_of(const Bins<T>& b, int i) {
  return {b.x0[i], b.x1[i] - b.x0[i], b.y0[i], b.y1[i] - b.y0[i], b.d0[i], b.d1[i]};
}

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
#pragma omp simd
  for (int i = 0; i < kGroup; ++i) {
    const T open = mask[i] == T(0) ? T(1) : T(0);
    const T inside = spline_inside(x[i], e.low[i], e.high[i], closed) ? open : T(0);
    u.used[i] = inside;
    u.passed[i] = inside < open ? outside : T(0);
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

constexpr int kPart = 16;  // elements whose values stay in registers from bin to bin

// the knots at both ends of the bin of every element; Count: of x, whose bin is counted to k, which is given otherwise
template <SplineVariant V, bool Count, class T>
void set_bin_ends(Rows<T> p, int bins, const SplineConstants<T>& c, const T* __restrict total, const Ends<T>& e,
                  const T* __restrict x, int32_t* __restrict k, T* __restrict left, T* __restrict right) {
  for (int at = 0; at < kGroup; at += kPart) {
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

template <class T>
void set_slope_rows(const SplineArgs& a, const Ends<T>& e, Bins<T>& b) {
  const int32_t last = a.bins - 1, shift = a.tails == SplineTails::linear ? -1 : 0;
  const bool wraps = a.tails != SplineTails::none;
#pragma omp simd
  for (int i = 0; i < kGroup; ++i) {
    const int32_t k = b.k[i], left = k + shift, right = left + 1;
    const int32_t first = e.linear[i] ? -1 : shift, end = e.linear[i] ? -1 : wraps ? 0 : right;
    b.at0[i] = k == 0 ? first : left;
    b.at1[i] = k == last ? end : right;
  }
}

// the logits of the slopes at both ends, 0 for a slope of 1
template <class T>
void set_slope_logits(Rows<T> slopes, int64_t count, Bins<T>& b) {
  for (int at = 0; at < kGroup; at += kPart) {
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

// widths and heights -> bins
template <SplineVariant V, bool Inverse, class T>
void find_bins(const SplineArgs& a, const SplineConstants<T>& c, const Ends<T>& e, const T* x, Rows<T> parts,
               Rows<T> slopes, Ahead& ahead, T* total_w, T* total_h, Bins<T>& b) {
  const Rows<T> heights = parts + a.bins;
  softmax<V>(parts, a.bins, c, ahead, total_w);
  softmax<V>(heights, a.bins, c, ahead, total_h);
  // first the axis of x
  if (Inverse) set_bin_ends<V, true>(heights, a.bins, c, total_h, e, x, b.k, b.y0, b.y1);
  set_bin_ends<V, !Inverse>(parts, a.bins, c, total_w, e, x, b.k, b.x0, b.x1);
  if (!Inverse) set_bin_ends<V, false>(heights, a.bins, c, total_h, e, x, b.k, b.y0, b.y1);
  set_slope_rows(a, e, b);
  set_slope_logits(slopes, spline_params(a.bins, a.tails) - 2 * a.bins, b);
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

// the places of x in the bins, in a loop of their own: the steps of one element depend on each other, and in a long
// loop few elements overlap
template <bool Inverse, class T>
void set_places(const Bins<T>& b, const T* __restrict x, T* __restrict s, T* __restrict theta) {
#pragma omp simd
  for (int i = 0; i < kGroup; ++i) {
    const T value = x[i];
    const SplineBin<T> bin = bin_of(b, i);
    s[i] = bin.h / bin.w;
    theta[i] = spline_theta<Inverse>(value, s[i], bin);
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
