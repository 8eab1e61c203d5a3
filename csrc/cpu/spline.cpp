// Rational-quadratic splines, forward and inverse.
#include "spline_bins.h"

namespace pyflow::PYFLOW_ISA {
namespace {

// y and log-determinants of a group
template <bool Inverse, class T>
void transform(const Bins<T>& b, const Used<T>& u, const T* __restrict x, T* __restrict y, T* __restrict g) {
#pragma omp simd
  for (int i = 0; i < kGroup; ++i) {
    const SplineBin<T> bin{b.x0[i], b.x1[i] - b.x0[i], b.y0[i], b.y1[i] - b.y0[i], b.d0[i], b.d1[i]};
    const SplinePlace<T> place = spline_place<Inverse>(x[i], bin);
    const T value = spline_value<Inverse>(place, bin), rise = log_(spline_rise(place));
    const bool used = u.used[i] != T(0), nan = u.passed[i] != T(0);
    const T kept = nan ? u.passed[i] : x[i];
    y[i] = used ? value : kept;
    g[i] = used ? (Inverse ? -rise : rise) : u.passed[i];
  }
}

template <SplineVariant V, bool Inverse, class T>
void forward_unit(const SplineForward& a, const Tile& unit, int64_t segment) {
  alignas(64) T p[kMostParams][kGroup], total_w[kGroup], total_h[kGroup];
  alignas(64) T x[kChunk], mask[kChunk], g[kChunk], y[kChunk], xs[kGroup], ms[kGroup], ys[kGroup], gs[kGroup];
  const Space& s = a.space;
  const SplineConstants<T> c = constants_of<T>(a);
  const int64_t count = spline_params(a.bins, a.tails);
  Ends<T> e;
  Bins<T> b;
  Used<T> u;
  set_ends(a, e);
  fill(ms, T(0), kGroup);
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
      copy_group(tx + first, n, xs, T(0));
      if (tm) copy_group(tm + first, n, ms, T(0));
      set_used(a, e, xs, ms, u);
      Ahead ahead = ahead_of(s, a.params, a.step, count, t, first, 4 * a.bins - 2);
      find_bins<V, Inverse>(a, c, e, xs, p, p + 2 * a.bins, p, ahead, total_w, total_h, b);
      set_slopes<V>(b, c);
      transform<Inverse>(b, u, xs, ys, gs);
      for (int64_t i = 0; i < n; ++i) {
        ty[first + i] = ys[i];
        g[first + i] = gs[i];
      }
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
