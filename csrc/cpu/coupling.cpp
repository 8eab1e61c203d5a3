// Affine and additive coupling layers, forward and backward. A unit is a block of whole short rows or one segment of a
// long row (see Plan); each is processed in chunks.
#include "coupling.h"

#include "tile.h"

namespace pyflow::PYFLOW_ISA {

// one chunk: pointers to n contiguous values each
template <class T>
struct Chunk {
  int64_t n;
  const T *x, *shift, *scale, *gy, *gl;
  T *g, *slope;
  T *y, *gx, *gshift, *gscale;
};

// s -> log-scale g; with Slope also dg/ds
template <bool Slope, ScaleMap M, class T>
void map_chunk(const Chunk<T>& c, T arg) {
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
  const T arg = T(a.map_arg);
  switch (a.scale_map) {
    case ScaleMap::exp: return map_chunk<Slope, ScaleMap::exp>(c, arg);
    case ScaleMap::sigmoid: return map_chunk<Slope, ScaleMap::sigmoid>(c, arg);
    case ScaleMap::sigmoid_inv: return map_chunk<Slope, ScaleMap::sigmoid_inv>(c, arg);
    case ScaleMap::softplus: return map_chunk<Slope, ScaleMap::softplus>(c, arg);
    case ScaleMap::tanh: return map_chunk<Slope, ScaleMap::tanh>(c, arg);
    case ScaleMap::atan: return map_chunk<Slope, ScaleMap::atan>(c, arg);
    case ScaleMap::softsign: return map_chunk<Slope, ScaleMap::softsign>(c, arg);
    case ScaleMap::softplus_clamp: return map_chunk<Slope, ScaleMap::softplus_clamp>(c, arg);
    case ScaleMap::sigmoid_eps: return map_chunk<Slope, ScaleMap::sigmoid_eps>(c, arg);
    case ScaleMap::softplus_eps: return map_chunk<Slope, ScaleMap::softplus_eps>(c, arg);
  }
}

// e = exp(+-g) has a loop apart from g: together with the constants of the map, the registers would run out
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

// c.gl holds one value for each of the tile's rows
template <bool Inverse, bool ShiftFirst, bool NeedShift, class T>
void couple_backward_chunk(const Chunk<T>& c, const Tile& t) {
  const T* __restrict gy = c.gy;
  const T* __restrict x = c.x;
  const T* __restrict shift = c.shift;
  const T* __restrict g = c.g;
  const T* __restrict slope = c.slope;
  T* __restrict gx = c.gx;
  T* __restrict gshift = c.gshift;
  T* __restrict gscale = c.gscale;
  for (int64_t r = 0; r < t.rows; ++r) {
    const T gl = c.gl[r];
#pragma omp simd
    for (int64_t i = r * t.cols; i < (r + 1) * t.cols; ++i) {
      const T e = exp_(Inverse ? -g[i] : g[i]);
      const auto d = couple_backward<Inverse, ShiftFirst>(gy[i], gl, x[i], shift[i], e, slope[i]);
      gx[i] = d.x;
      if constexpr (NeedShift) gshift[i] = d.shift;
      gscale[i] = d.scale;
    }
  }
}

template <bool NeedShift, class T>
void couple_backward_chunk(const Chunk<T>& c, const Tile& t, const CouplingArgs& a) {
  if (a.inverse) {
    a.shift_first ? couple_backward_chunk<true, true, NeedShift>(c, t)
                  : couple_backward_chunk<true, false, NeedShift>(c, t);
  } else {
    a.shift_first ? couple_backward_chunk<false, true, NeedShift>(c, t)
                  : couple_backward_chunk<false, false, NeedShift>(c, t);
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
void fill(T* dst, T value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = value;
}

template <class T>
void forward_unit(const CouplingForward& a, const Tile& unit, int64_t segment) {
  alignas(64) T x[kChunk], shift[kChunk], scale[kChunk], mask[kChunk], g[kChunk], y[kChunk];
  const Space& s = a.space;
  // sum of one row (a unit of several rows has one chunk); starts at -0, since -0 + v has the bits of v
  double total = -0.0;
  for (int64_t c0 = 0; c0 < unit.cols; c0 += kChunk) {
    const int64_t cols = unit.cols - c0 < kChunk ? unit.cols - c0 : kChunk;
    const Tile t{unit.row, unit.rows, unit.col + c0, cols};
    const Tile next = after(unit, t);
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
    if (!a.affine) continue;
    const T sign = a.inverse ? T(-1) : T(1);
    if (t.rows > 1) {
      for (int64_t r = 0; r < t.rows; ++r) {
        ((T*)a.logdet)[t.row + r] = sign * lane_sum(g + r * cols, cols);
      }
    } else {
      total += double(sign * lane_sum(g, cols));
    }
  }
  if (!a.affine || unit.rows > 1) return;
  if (a.partial) {
    a.partial[unit.row * a.plan.segments + segment] = total;
  } else {
    ((T*)a.logdet)[unit.row] = T(total);
  }
}

template <class T>
void backward_unit(const CouplingBackward& a, const Tile& unit) {
  alignas(64) T x[kChunk], shift[kChunk], scale[kChunk], mask[kChunk], g[kChunk], slope[kChunk];
  alignas(64) T gy[kChunk], gl[kChunk], gx[kChunk], gshift[kChunk], gscale[kChunk];
  const Space& s = a.space;
  if (!a.gy.data) fill(gy, T(0), kChunk);
  for (int64_t c0 = 0; c0 < unit.cols; c0 += kChunk) {
    const int64_t cols = unit.cols - c0 < kChunk ? unit.cols - c0 : kChunk;
    const Tile t{unit.row, unit.rows, unit.col + c0, cols};
    const Tile next = after(unit, t);
    const View* const inputs[] = {&a.x, &a.shift, &a.scale, &a.gy};
    const View* const outputs[] = {&a.gx, &a.gshift, &a.gscale};
    for (const View* v : inputs) prefetch(s, *v, next);
    for (const View* v : outputs) prefetch<true>(s, *v, next);
    Chunk<T> c{};
    c.n = t.count();
    // without gy only the gradient of logdet counts: zeros replace x and shift, which may hold inf or NaN
    c.gy = a.gy.data ? load(s, a.gy, t, gy) : gy;
    c.x = a.gy.data ? load(s, a.x, t, x) : gy;
    // shift is absent where the gradient does not need it; any valid pointer will do
    c.shift = a.gy.data && a.shift.data ? load(s, a.shift, t, shift) : c.x;
    c.scale = load(s, a.scale, t, scale);
    for (int64_t r = 0; r < t.rows; ++r) {
      gl[r] = T(0);
      if (a.gl.data) read_typed(a.gl, row_offset(s, a.gl, t.row + r), 1, 1, gl + r);
    }
    c.gl = gl;
    c.g = g;
    c.slope = slope;
    map_chunk<true>(c, a);
    if (!a.gy.data) fill(g, T(0), c.n);
    c.gx = target(s, a.gx, t, gx);
    c.gscale = target(s, a.gscale, t, gscale);
    if (a.gshift.data) c.gshift = target(s, a.gshift, t, gshift);
    a.gshift.data ? couple_backward_chunk<true>(c, t, a) : couple_backward_chunk<false>(c, t, a);
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
  }
}

void coupling_forward(const CouplingForward& a, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) {
    const Tile t = unit_tile(a.space, a.plan, u);
    const int64_t segment = u % a.plan.segments;
    a.f64 ? forward_unit<double>(a, t, segment) : forward_unit<float>(a, t, segment);
  }
  stream_fence();
}

void coupling_backward(const CouplingBackward& a, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) {
    const Tile t = unit_tile(a.space, a.plan, u);
    a.f64 ? backward_unit<double>(a, t) : backward_unit<float>(a, t);
  }
  stream_fence();
}

}  // namespace pyflow::PYFLOW_ISA
