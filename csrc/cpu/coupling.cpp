// Affine and additive coupling layers, forward and backward. A unit is a block of whole short rows or one segment of a
// long row (see Plan); each is processed in chunks.
#include "../args/coupling.h"

#include "tile.h"

namespace pyflow::PYFLOW_ISA {
namespace {

// one chunk: pointers to n contiguous values each
template <class T>
struct Chunk {
  int64_t n;
  const T *x, *shift, *scale, *gy, *gl;
  T *g, *slope;
  T *y, *gx, *gshift, *gscale;
};

// s -> log-scale g; with Slope also dg/ds. Not inlined, so that its instructions can be inspected map by map.
template <bool Slope, ScaleMap M, class T>
__attribute__((noinline)) void map_chunk(const Chunk<T>& c, T arg) {
  const T* __restrict s = c.scale;
  T* __restrict g = c.g;
  T* __restrict slope = c.slope;
#pragma omp simd
  for (int64_t i = 0; i < c.n; ++i) {
    if constexpr (Slope) {
      const LogScale<T> l = log_scale_slope<M>(s[i], arg);
      g[i] = l.g;
      slope[i] = l.slope;
    } else {
      g[i] = log_scale<M>(s[i], arg);
    }
  }
}

template <bool Slope, class T>
void map_chunk(const Chunk<T>& c, const CouplingArgs& a) {
  as_constant(a.scale_map, [&](auto map) { map_chunk<Slope, map.value>(c, T(a.map_arg)); });
}

// e = exp(+-g) is computed in a second loop: in one loop with g, the constants of both would not fit the registers
template <bool Inverse, bool ShiftFirst, class T>
void couple_chunk(const Chunk<T>& c) {
  const T* __restrict x = c.x;
  const T* __restrict shift = c.shift;
  const T* __restrict g = c.g;
  T* __restrict y = c.y;
#pragma omp simd
  for (int64_t i = 0; i < c.n; ++i) {
    y[i] = couple<Inverse, ShiftFirst>(x[i], shift[i], exp_(Inverse ? -g[i] : g[i]));
  }
}

template <class T>
void couple_chunk(const Chunk<T>& c, const CouplingArgs& a) {
  if (a.inverse) {
    a.shift_first ? couple_chunk<true, true>(c) : couple_chunk<true, false>(c);
  } else {
    a.shift_first ? couple_chunk<false, true>(c) : couple_chunk<false, false>(c);
  }
}

template <class T>
void add_chunk(const Chunk<T>& c, bool inverse) {
  const T* __restrict x = c.x;
  const T* __restrict shift = c.shift;
  T* __restrict y = c.y;
  const T sign = inverse ? T(-1) : T(1);
#pragma omp simd
  for (int64_t i = 0; i < c.n; ++i) y[i] = fma_(sign, shift[i], x[i]);
}

template <bool Inverse, bool ShiftFirst, bool NeedShift, class T>
void couple_backward_chunk(const Chunk<T>& c) {
  const T* __restrict gy = c.gy;
  const T* __restrict gl = c.gl;
  const T* __restrict x = c.x;
  const T* __restrict shift = c.shift;
  const T* __restrict g = c.g;
  const T* __restrict slope = c.slope;
  T* __restrict gx = c.gx;
  T* __restrict gshift = c.gshift;
  T* __restrict gscale = c.gscale;
#pragma omp simd
  for (int64_t i = 0; i < c.n; ++i) {
    const T e = exp_(Inverse ? -g[i] : g[i]);
    const auto d = couple_backward<Inverse, ShiftFirst>(gy[i], gl[i], x[i], shift[i], e, slope[i]);
    gx[i] = d.x;
    if constexpr (NeedShift) gshift[i] = d.shift;
    gscale[i] = d.scale;
  }
}

template <bool NeedShift, class T>
void couple_backward_chunk(const Chunk<T>& c, const CouplingArgs& a) {
  if (a.inverse) {
    a.shift_first ? couple_backward_chunk<true, true, NeedShift>(c) : couple_backward_chunk<true, false, NeedShift>(c);
  } else {
    a.shift_first ? couple_backward_chunk<false, true, NeedShift>(c)
                  : couple_backward_chunk<false, false, NeedShift>(c);
  }
}

// masks select instead of multiplying, so a masked NaN does not propagate
template <class T>
void pass_through(const T* mask, const T* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = mask[i] != T(0) ? from[i] : to[i];
}

template <class T>
void blank(const T* mask, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = mask[i] != T(0) ? T(0) : to[i];
}

template <class T>
void forward_unit(const CouplingForward& a, const Tile& unit, int64_t segment) {
  alignas(64) T x[kChunk], shift[kChunk], scale[kChunk], mask[kChunk], g[kChunk], y[kChunk];
  const Space& s = a.space;
  // sum of one row (a unit of several rows has one chunk); starts at -0, since -0 + v has the bits of v
  double total = -0.0;
  for_each_chunk(unit, [&](const Tile& t, const Tile& next) {
    const View* const inputs[] = {&a.x, &a.shift, &a.scale};
    for (const View* v : inputs) prefetch(s, *v, next);
    Chunk<T> c{};
    c.n = t.count();
    c.x = load(s, a.x, t, x);
    c.y = target(s, a.y, t, y);
    if (a.affine && interleaved<T>(s, a.shift, a.scale)) {
      load_pair(s, a.shift, t, shift, scale);
      c.shift = shift;
      c.scale = scale;
    } else {
      c.shift = load(s, a.shift, t, shift);
      if (a.affine) c.scale = load(s, a.scale, t, scale);
    }
    if (a.affine) {
      c.g = g;
      map_chunk<false>(c, a);
      couple_chunk(c, a);
    } else {
      add_chunk(c, a.inverse);
    }
    if (a.mask.data) {
      const T* m = load(s, a.mask, t, mask);
      pass_through(m, c.x, c.y, c.n);
      if (a.affine) blank(m, g, c.n);
    }
    store(s, a.y, t, c.y);
    if (!a.affine) return;
    const T sign = a.inverse ? T(-1) : T(1);
    if (t.rows > 1) {
      write_row_sums(a.logdet, t, g, sign);
    } else {
      total += double(sign * lane_sum(g, t.cols));
    }
  });
  if (a.affine && unit.rows == 1) write_row_sum<T>(a.logdet, a.plan, unit.row, segment, total);
}

template <class T>
void backward_unit(const CouplingBackward& a, const Tile& unit) {
  alignas(64) T x[kChunk], shift[kChunk], scale[kChunk], mask[kChunk], g[kChunk], slope[kChunk];
  alignas(64) T gy[kChunk], gl[kChunk], gx[kChunk], gshift[kChunk], gscale[kChunk];
  const Space& s = a.space;
  if (!a.gy.data) fill(gy, T(0), kChunk);
  // a unit has one chunk or one row
  load_rows(s, a.gl, unit, gl);
  for_each_chunk(unit, [&](const Tile& t, const Tile& next) {
    const View* const inputs[] = {&a.x, &a.shift, &a.scale, &a.gy};
    const View* const outputs[] = {&a.gx, &a.gshift, &a.gscale};
    for (const View* v : inputs) prefetch(s, *v, next);
    for (const View* v : outputs) prefetch<true>(s, *v, next);
    Chunk<T> c{};
    c.n = t.count();
    // without gy only the gradient of logdet counts: zeros replace x and shift, which may hold inf or NaN
    c.gy = a.gy.data ? load(s, a.gy, t, gy) : gy;
    c.x = a.gy.data ? load(s, a.x, t, x) : gy;
    // shift is absent where the gradient does not need it: its values do not matter then
    c.shift = a.gy.data && a.shift.data ? load(s, a.shift, t, shift) : c.x;
    c.scale = load(s, a.scale, t, scale);
    c.gl = gl;
    c.g = g;
    c.slope = slope;
    map_chunk<true>(c, a);
    if (!a.gy.data) fill(g, T(0), c.n);
    c.gx = target(s, a.gx, t, gx);
    c.gscale = target(s, a.gscale, t, gscale);
    if (a.gshift.data) c.gshift = target(s, a.gshift, t, gshift);
    a.gshift.data ? couple_backward_chunk<true>(c, a) : couple_backward_chunk<false>(c, a);
    if (a.mask.data) {
      const T* m = load(s, a.mask, t, mask);
      pass_through(m, c.gy, c.gx, c.n);
      if (a.gshift.data) blank(m, c.gshift, c.n);
      blank(m, c.gscale, c.n);
    }
    store(s, a.gx, t, c.gx);
    if (a.gshift.data && interleaved<T>(s, a.gshift, a.gscale)) {
      store_pair(s, a.gshift, t, c.gshift, c.gscale);
    } else {
      if (a.gshift.data) store(s, a.gshift, t, c.gshift);
      store(s, a.gscale, t, c.gscale);
    }
  });
}

}  // namespace

void coupling_forward(const CouplingForward& a, int64_t begin, int64_t end) {
  for_each_unit(a, begin, end,
                [&](const Tile& unit, int64_t segment, auto zero) { forward_unit<decltype(zero)>(a, unit, segment); });
}

void coupling_backward(const CouplingBackward& a, int64_t begin, int64_t end) {
  for_each_unit(a, begin, end, [&](const Tile& unit, int64_t, auto zero) { backward_unit<decltype(zero)>(a, unit); });
}

}  // namespace pyflow::PYFLOW_ISA
