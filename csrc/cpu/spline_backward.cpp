// Rational-quadratic splines, backward. Everything is computed again from x and the parameters.
#include "spline_bins.h"

namespace pyflow::PYFLOW_ISA {
namespace {

template <SplineVariant V, bool Inverse, class T>
void backward_unit(const SplineBackward& a, const Tile& unit) {
  alignas(64) T p[kMostParams][kGroup], parts[2 * kMostBins][kGroup];
  Totals<T, kGroup> total;
  alignas(64) T x[kChunk], mask[kChunk], gy[kChunk], gl[kChunk], gx[kChunk], xs[kGroup], gls[kGroup], gxs[kGroup];
  alignas(64) T ms[kGroup] = {}, gys[kGroup] = {};
  const Space& s = a.space;
  const SplineConstants<T> c = constants_of<T>(a);
  const int64_t count = spline_params(a.bins, a.tails);
  const Rows<T, kGroup> slopes = p + 2 * a.bins;
  Ends<T, kGroup> e;
  Bins<T, kGroup> b;
  Used<T, kGroup> u;
  BinGrads<T, kGroup> d;
  set_ends(a.low, a.high, a.tails == SplineTails::linear, e);
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
      softmaxes<V>(a, c, parts, ahead, total);
      find_bins<V, Inverse>(a, c, e, px, parts, slopes, total, b);
      set_slope_rates<V>(b, c, d.d0, d.d1);
      set_slopes<V>(b, c);
      Ahead written = ahead_of(s, a.gparams, a.gstep, count, t, first, 4 * a.bins);
      bin_gradients<Inverse>(b, a.bins, u, px, pgy, pgl, d, gxs);
      logit_gradients<V>(p, parts, a.bins, c, total.w, e, u, b.k, d.x0, d.x1, written);
      logit_gradients<V>(p + a.bins, parts + a.bins, a.bins, c, total.h, e, u, b.k, d.y0, d.y1, written);
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
