// MALA: sums of the log-ratio of proposal densities, accept decisions, selection of old or new rows; row sums of
// squares. A unit is a block of whole short rows or one segment of a long row.
#include "energy.h"

#include "../ops/energy.h"
#include "draw.h"

namespace pyflow::PYFLOW_ISA {

template <class T>
T value_of(const View& v, int64_t row) {
  T value;
  read_typed(v, row * v.stride[0], 1, 1, &value);
  return value;
}

template <class T>
double transition_row(const T* __restrict z, const T* __restrict z_new, const T* __restrict grad,
                      const T* __restrict grad_new, T alpha, int64_t n) {
  alignas(64) T term[kChunk];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    term[i] = transition(z[i], z_new[i], grad[i], grad_new[i], alpha);
  }
  return double(lane_sum(term, n));
}

template <class T>
double square_row(const T* __restrict x, int64_t n) {
  alignas(64) T term[kChunk];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    term[i] = x[i] * x[i];
  }
  return double(lane_sum(term, n));
}

template <class T>
void copy_row(const T* __restrict from, T* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// calls work(tile, next tile) for every chunk of a unit
template <class F>
PYFLOW_FN void each_chunk(const Tile& unit, F work) {
  for (int64_t c = 0; c < unit.cols; c += kChunk) {
    const Tile t{unit.row, unit.rows, unit.col + c, unit.cols - c < kChunk ? unit.cols - c : kChunk};
    work(t, after(unit, t));
  }
}

template <class T>
void sum_unit(const MalaArgs& a, const Tile& unit, double* sums) {
  alignas(64) T zs[kChunk], zs_new[kChunk], grads[kChunk], grads_new[kChunk];
  const Space& s = a.space;
  for (int64_t r = 0; r < unit.rows; ++r) sums[r * a.plan.segments] = -0.0;
  each_chunk(unit, [&](const Tile& t, const Tile& next) {
    const View* const inputs[] = {&a.z, &a.z_new, &a.grad, &a.grad_new};
    for (const View* v : inputs) prefetch(s, *v, next);
    const T* z = load(s, a.z, t, zs);
    const T* z_new = load(s, a.z_new, t, zs_new);
    const T* grad = load(s, a.grad, t, grads);
    const T* grad_new = load(s, a.grad_new, t, grads_new);
    for (int64_t r = 0; r < t.rows; ++r) {
      const int64_t at = r * t.cols;
      sums[r * a.plan.segments] +=
          transition_row(z + at, z_new + at, grad + at, grad_new + at, value_of<T>(a.alpha, t.row + r), t.cols);
    }
  });
}

// accept decision for every row of the unit; the first segment of a row also writes its energy and its flag
template <class T>
void decide(const MalaArgs& a, const Tile& unit, DrawBuffer& draws, bool* accepted) {
  alignas(64) float uniforms[kChunk];
  Space column = a.space;
  column.cols = 1;
  draw<NoiseKind::uniform>(a.stream, column, {unit.row, unit.rows, 0, 1}, draws, uniforms);
  for (int64_t r = 0; r < unit.rows; ++r) {
    const int64_t row = unit.row + r;
    const double* sums = a.sums + row * a.plan.segments;
    double ratio = a.space.cols > 0 ? sums[0] : 0.0;
    for (int64_t i = 1; i < a.plan.segments; ++i) ratio += sums[i];
    const T u = value_of<T>(a.u, row), u_new = value_of<T>(a.u_new, row);
    accepted[r] = accepts(u, u_new, T(ratio), uniforms[r]);
    if (unit.col > 0) continue;
    a.accepted[row] = accepted[r];
    write_typed(a.u_out, row * a.u_out.stride[0], 1, 1, accepted[r] ? &u_new : &u);
  }
}

template <class T>
void select_unit(const MalaArgs& a, const Tile& unit, const bool* accepted) {
  alignas(64) T olds[kChunk], news[kChunk], outs[kChunk];
  const Space& s = a.space;
  const auto select = [&](const View& old, const View& fresh, const View& out, const Tile& t) {
    bool any = false, all = true;
    for (int64_t r = 0; r < t.rows; ++r) {
      any |= accepted[r];
      all &= accepted[r];
    }
    // a view from which no row is selected is not read
    const T* from_old = all ? nullptr : load(s, old, t, olds);
    const T* from_new = any ? load(s, fresh, t, news) : nullptr;
    T* to = target(s, out, t, outs);
    for (int64_t r = 0; r < t.rows; ++r) {
      copy_row((accepted[r] ? from_new : from_old) + r * t.cols, to + r * t.cols, t.cols);
    }
    store(s, out, t, to);
  };
  each_chunk(unit, [&](const Tile& t, const Tile&) {
    select(a.z, a.z_new, a.z_out, t);
    select(a.grad, a.grad_new, a.grad_out, t);
  });
}

template <class T>
void accept_unit(const MalaArgs& a, const Tile& unit, DrawBuffer& draws) {
  bool accepted[kChunk];
  // rows of one segment are summed here and selected while they are in the cache
  if (a.plan.segments == 1) sum_unit<T>(a, unit, a.sums + unit.row);
  decide<T>(a, unit, draws, accepted);
  select_unit<T>(a, unit, accepted);
}

void mala_sums(const MalaArgs& a, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) {
    const Tile t = unit_tile(a.space, a.plan, u);
    double* sums = a.sums + t.row * a.plan.segments + u % a.plan.segments;
    a.f64 ? sum_unit<double>(a, t, sums) : sum_unit<float>(a, t, sums);
  }
}

void mala_accept(const MalaArgs& a, int64_t begin, int64_t end) {
  DrawBuffer draws;
  for (int64_t u = begin; u < end; ++u) {
    const Tile t = unit_tile(a.space, a.plan, u);
    a.f64 ? accept_unit<double>(a, t, draws) : accept_unit<float>(a, t, draws);
  }
  stream_fence();
}

template <class T>
void squares_unit(const SquaresArgs& a, const Tile& unit, double* sums) {
  alignas(64) T xs[kChunk];
  for (int64_t r = 0; r < unit.rows; ++r) sums[r * a.plan.segments] = -0.0;
  each_chunk(unit, [&](const Tile& t, const Tile& next) {
    prefetch(a.space, a.x, next);
    const T* x = load(a.space, a.x, t, xs);
    for (int64_t r = 0; r < t.rows; ++r) sums[r * a.plan.segments] += square_row(x + r * t.cols, t.cols);
  });
}

void row_squares(const SquaresArgs& a, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) {
    const Tile t = unit_tile(a.space, a.plan, u);
    double* sums = a.sums + t.row * a.plan.segments + u % a.plan.segments;
    a.f64 ? squares_unit<double>(a, t, sums) : squares_unit<float>(a, t, sums);
  }
}

}  // namespace pyflow::PYFLOW_ISA
