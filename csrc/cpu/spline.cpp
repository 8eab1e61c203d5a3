// Rational-quadratic splines, forward and inverse.
#include "spline_bins.h"

namespace pyflow::PYFLOW_ISA {
namespace {

template <SplineVariant V, bool Inverse, class T>
void forward_unit(const SplineForward& a, const Tile& unit, int64_t segment) {
  alignas(64) T p[kMostParams][kGroup];
  alignas(64) T x[kChunk], mask[kChunk], g[kChunk], y[kChunk], xs[kGroup], ms[kGroup] = {}, ys[kGroup];
  const Space& s = a.space;
  const SplineConstants<T> c = constants_of<T>(a);
  const int64_t count = spline_params(a.bins, a.tails);
  Ends<T, kGroup> e;
  Bins<T, kGroup> b;
  Used<T, kGroup> u;
  Totals<T, kGroup> totals;
  set_ends(a.low, a.high, a.tails == SplineTails::linear, e);
  // sum of one row; starts at -0, since -0 + v has the bits of v
  double total = -0.0;
  for_each_chunk(unit, [&](const Tile& t, const Tile&) {
    const T* tx = load(s, a.x, t, x);
    const T* tm = a.mask.data ? load(s, a.mask, t, mask) : nullptr;
    T* ty = target(s, a.y, t, y);
    for (int64_t first = 0; first < t.count(); first += kGroup) {
      const int64_t n = smaller(t.count() - first, kGroup);
      load_params(s, a.params, a.step, count, t, first, n, p);
      set_features(a, t, first, n, e);
      const T* px = whole_group(tx + first, n, xs);
      set_used(a, e, px, tm ? whole_group(tm + first, n, ms) : ms, u);
      Ahead ahead = ahead_of(s, a.params, a.step, count, t, first, 4 * a.bins - 2);
      softmaxes<V>(a, c, p, ahead, totals);
      find_bins<V, Inverse>(a, c, e, px, p, p + 2 * a.bins, totals, b);
      set_slopes<V>(b, c);
      T* py = n == kGroup ? ty + first : ys;
      transform<Inverse>(b, u, px, py, g + first);
      for (int64_t i = 0; py == ys && i < n; ++i) ty[first + i] = ys[i];
    }
    store(s, a.y, t, ty);
    if (t.rows > 1) {
      write_row_sums(a.logdet, t, g, T(1));
    } else {
      total += double(lane_sum(g, t.cols));
    }
  });
  if (unit.rows == 1) write_row_sum<T>(a.logdet, a.plan, unit.row, segment, total);
}

}  // namespace

void spline_forward(const SplineForward& a, int64_t begin, int64_t end) {
  with_form(a, [&](auto variant, auto inverse) {
    for_each_unit(a, begin, end, [&](const Tile& unit, int64_t segment, auto zero) {
      forward_unit<variant.value, inverse.value, decltype(zero)>(a, unit, segment);
    });
  });
}

}  // namespace pyflow::PYFLOW_ISA
