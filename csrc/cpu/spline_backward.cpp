// Rational-quadratic splines, backward. Everything is computed again from x and the parameters.
#include "spline_bins.h"

namespace pyflow::PYFLOW_ISA {
namespace {

// the derivatives of the slopes by their logits, before set_slopes overwrites these
template <SplineVariant V, class T>
void set_slope_rates(const Bins<T>& b, const SplineConstants<T>& c, T* __restrict rate0, T* __restrict rate1) {
#pragma omp simd
  for (int i = 0; i < kGroup; ++i) {
    rate0[i] = spline_slope_rate<V>(b.d0[i], c);
    rate1[i] = spline_slope_rate<V>(b.d1[i], c);
  }
}

// gradients of the knots at both ends of the bins, and of the logits of the slopes there
template <class T>
struct BinGrads {
  alignas(64) T x0[kGroup], x1[kGroup], y0[kGroup], y1[kGroup], d0[kGroup], d1[kGroup];
};

// d: in, the derivatives of the slopes
template <bool Inverse, class T>
void bin_gradients(const Bins<T>& b, int bins, const Used<T>& u, const T* __restrict x, const T* __restrict gy,
                   const T* __restrict gl, BinGrads<T>& d, T* __restrict gx) {
  alignas(64) T s[kGroup], theta[kGroup];
  set_places<Inverse>(b, x, s, theta);
#pragma omp simd
  for (int i = 0; i < kGroup; ++i) {
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
template <SplineVariant V, class T>
void logit_gradients(Rows<T> p, Rows<T> parts, int bins, const SplineConstants<T>& c, const T* __restrict total,
                     const Ends<T>& e, const Used<T>& u, const int32_t* __restrict k, const T* __restrict left,
                     const T* __restrict right, Ahead& ahead) {
  alignas(64) T mean[kGroup], factor[kGroup];
  fill(mean, T(0), kGroup);
  for (int j = 0; j < bins; ++j) {
    const T* __restrict v = parts[j];
    ahead.prefetch<true>();
#pragma omp simd
    for (int i = 0; i < kGroup; ++i) {
      const T both = left[i] + right[i], of_right = j == k[i] ? right[i] : T(0);
      mean[i] = fma_(v[i], j < k[i] ? both : of_right, mean[i]);
    }
  }
#pragma omp simd
  for (int i = 0; i < kGroup; ++i) {
    mean[i] /= total[i];
    factor[i] = c.rest * (e.high[i] - e.low[i]) / total[i];
  }
  for (int j = 0; j < bins; ++j) {
    const T* __restrict v = parts[j];
    ahead.prefetch<true>();
    T* __restrict out = p[j];
#pragma omp simd
    for (int i = 0; i < kGroup; ++i) {
      const T both = left[i] + right[i], of_right = j == k[i] ? right[i] : T(0);
      const T grad = (j < k[i] ? both : of_right) - mean[i];
      const T value = v[i] * factor[i] * grad * spline_logit_rate<V>(out[i], c);
      out[i] = u.used[i] != T(0) ? value : u.passed[i];
    }
  }
}

template <class T>
void slope_gradients(Rows<T> p, int64_t count, const Used<T>& u, const Bins<T>& b, const BinGrads<T>& d) {
  for (int64_t j = 0; j < count; ++j) {
    const int32_t row = int32_t(j);
    T* __restrict out = p[j];
#pragma omp simd
    for (int i = 0; i < kGroup; ++i) {
      const T right = row == b.at1[i] ? d.d1[i] : T(0), value = row == b.at0[i] ? d.d0[i] : right;
      out[i] = u.used[i] != T(0) ? value : u.passed[i];
    }
  }
}

template <SplineVariant V, bool Inverse, class T>
void backward_unit(const SplineBackward& a, const Tile& unit) {
  alignas(64) T p[kMostParams][kGroup], parts[2 * kMostBins][kGroup];
  alignas(64) T total_w[kGroup], total_h[kGroup];
  alignas(64) T x[kChunk], mask[kChunk], gy[kChunk], gl[kChunk], gx[kChunk], xs[kGroup], gls[kGroup], gxs[kGroup];
  alignas(64) T ms[kGroup] = {}, gys[kGroup] = {};
  const Space& s = a.space;
  const SplineConstants<T> c = constants_of<T>(a);
  const int64_t count = spline_params(a.bins, a.tails);
  const Rows<T> slopes = p + 2 * a.bins;
  Ends<T> e;
  Bins<T> b;
  Used<T> u;
  BinGrads<T> d;
  set_ends(a, e);
  // a unit has one chunk or one row
  load_rows(s, a.gl, unit, gl);
  for_each_chunk(unit, [&](const Tile& t, const Tile&) {
    const T* tx = load(s, a.x, t, x);
    const T* tm = a.mask.data ? load(s, a.mask, t, mask) : nullptr;
    const T* tgy = a.gy.data ? load(s, a.gy, t, gy) : nullptr;
    T* tgx = target(s, a.gx, t, gx);
    for (int64_t first = 0; first < t.count(); first += kGroup) {
      const int64_t n = smaller(t.count() - first, kGroup);
      load_params(s, a.params, a.step, count, t, first, n, p);
      set_features(a, t, first, n, e);
      const T* px = whole_group(tx + first, n, xs);
      const T* pgy = tgy ? whole_group(tgy + first, n, gys) : gys;
      const T* pgl = whole_group(gl + first, n, gls);
      set_used(a, e, px, tm ? whole_group(tm + first, n, ms) : ms, u);
      __builtin_memcpy(parts, p, sizeof p[0] * size_t(2 * a.bins));
      Ahead ahead = ahead_of(s, a.params, a.step, count, t, first, 4 * a.bins - 2);
      find_bins<V, Inverse>(a, c, e, px, parts, slopes, ahead, total_w, total_h, b);
      set_slope_rates<V>(b, c, d.d0, d.d1);
      set_slopes<V>(b, c);
      Ahead written = ahead_of(s, a.gparams, a.gstep, count, t, first, 4 * a.bins);
      bin_gradients<Inverse>(b, a.bins, u, px, pgy, pgl, d, gxs);
      logit_gradients<V>(p, parts, a.bins, c, total_w, e, u, b.k, d.x0, d.x1, written);
      logit_gradients<V>(p + a.bins, parts + a.bins, a.bins, c, total_h, e, u, b.k, d.y0, d.y1, written);
      slope_gradients(slopes, count - 2 * a.bins, u, b, d);
      store_params(s, a.gparams, a.gstep, count, t, first, n, p);
      for (int64_t i = 0; i < n; ++i) tgx[first + i] = gxs[i];
    }
    store(s, a.gx, t, tgx);
  });
}

}  // namespace

void spline_backward(const SplineBackward& a, int64_t begin, int64_t end) {
  with_form(a, [&](auto variant, auto inverse) {
    for_each_unit(a, begin, end, [&](const Tile& unit, int64_t, auto zero) {
      backward_unit<variant.value, inverse.value, decltype(zero)>(a, unit);
    });
  });
}

}  // namespace pyflow::PYFLOW_ISA
