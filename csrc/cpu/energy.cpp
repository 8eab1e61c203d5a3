// MALA: sums of the log-ratio of proposal densities, accept decisions, selection of old or new rows; row sums of
// squares. A unit is a block of whole short rows or one segment of a long row.
#include "../args/energy.h"

#include "draw.h"

namespace pyflow::PYFLOW_ISA {
namespace {

// the terms of each row of a tile, summed
template <class T>
void transition_rows(const Tile& t, const T* __restrict z, const T* __restrict z_new, const T* __restrict grad,
                     const T* __restrict grad_new, const T* __restrict alpha, T* sums) {
  alignas(64) T term[kChunk];
#pragma omp simd
  for (int64_t i = 0; i < t.count(); ++i) {
    term[i] = transition(z[i], z_new[i], grad[i], grad_new[i], alpha[i]);
  }
  row_sums(t, term, T(1), sums);
}

template <class T>
void copy_row(const T* __restrict from, T* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// the sums of the log-ratio over the columns of a unit, for each of its rows
template <class T>
void sum_unit(const MalaArgs& a, const Tile& unit, double* sums) {
  alignas(64) T zs[kChunk], zs_new[kChunk], grads[kChunk], grads_new[kChunk], alpha[kChunk], part[kChunk];
  const Space& s = a.space;
  fill(sums, -0.0, unit.rows);
  for_each_chunk(unit, [&](const Tile& t, const Tile& next) {
    const View* const inputs[] = {&a.z, &a.z_new, &a.grad, &a.grad_new};
    for (const View* v : inputs) prefetch(s, *v, next);
    const T* z = load(s, a.z, t, zs);
    const T* z_new = load(s, a.z_new, t, zs_new);
    const T* grad = load(s, a.grad, t, grads);
    const T* grad_new = load(s, a.grad_new, t, grads_new);
    load_rows(a.alpha, t, alpha);
    transition_rows(t, z, z_new, grad, grad_new, alpha, part);
    for (int64_t r = 0; r < t.rows; ++r) sums[r] += double(part[r]);
  });
}

// accept decision for every row of the unit, given the log-ratios; the first segment of a row also writes its energy
// and its flag
template <class T>
void decide(const MalaArgs& a, const Tile& unit, const T* ratios, DrawBuffer& draws, bool* accepted) {
  alignas(64) float uniforms[kChunk];
  Space column = a.space;
  column.cols = 1;
  draw<NoiseKind::uniform>(a.stream, column, {unit.row, unit.rows, 0, 1}, draws, uniforms);
  for (int64_t r = 0; r < unit.rows; ++r) {
    const int64_t row = unit.row + r;
    const T u = row_value<T>(a.u, row), u_new = row_value<T>(a.u_new, row);
    accepted[r] = accepts(u, u_new, ratios[r], uniforms[r]);
    if (unit.col > 0) continue;
    a.accepted[row] = accepted[r];
    write_row_value(a.u_out, row, accepted[r] ? u_new : u);
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
  for_each_chunk(unit, [&](const Tile& t, const Tile&) {
    select(a.z, a.z_new, a.z_out, t);
    select(a.grad, a.grad_new, a.grad_out, t);
  });
}

template <class T>
void accept_unit(const MalaArgs& a, const Tile& unit, DrawBuffer& draws) {
  bool accepted[kChunk];
  if (a.plan.segments > 1) {
    decide(a, unit, (const T*)a.log_ratio.out + unit.row, draws, accepted);
  } else {
    // rows of one segment are summed here and selected while they are in the cache
    double sums[kChunk];
    T ratios[kChunk];
    sum_unit<T>(a, unit, sums);
    for (int64_t r = 0; r < unit.rows; ++r) ratios[r] = T(sums[r]);
    decide(a, unit, ratios, draws, accepted);
  }
  select_unit<T>(a, unit, accepted);
}

template <class T>
void squares_unit(const SquaresArgs& a, const Tile& unit, int64_t segment) {
  alignas(64) T xs[kChunk];
  double sums[kChunk];
  fill(sums, -0.0, unit.rows);
  for_each_chunk(unit, [&](const Tile& t, const Tile& next) {
    prefetch(a.space, a.x, next);
    const T* x = load(a.space, a.x, t, xs);
    add_dot_rows(t, x, x, sums);
  });
  // + 0 makes an empty sum +0
  for (int64_t r = 0; r < unit.rows; ++r) write_row_sum<T>(a.squares, a.plan, unit.row + r, segment, sums[r] + 0.0);
}

}  // namespace

// rows of several segments
void mala_sums(const MalaArgs& a, int64_t begin, int64_t end) {
  for_each_unit(a, begin, end, [&](const Tile& unit, int64_t segment, auto zero) {
    double sum;  // the unit is one row
    sum_unit<decltype(zero)>(a, unit, &sum);
    write_row_sum<decltype(zero)>(a.log_ratio, a.plan, unit.row, segment, sum);
  });
}

void mala_accept(const MalaArgs& a, int64_t begin, int64_t end) {
  DrawBuffer draws;
  for_each_unit(a, begin, end,
                [&](const Tile& unit, int64_t, auto zero) { accept_unit<decltype(zero)>(a, unit, draws); });
}

void row_squares(const SquaresArgs& a, int64_t begin, int64_t end) {
  for_each_unit(a, begin, end,
                [&](const Tile& unit, int64_t segment, auto zero) { squares_unit<decltype(zero)>(a, unit, segment); });
}

}  // namespace pyflow::PYFLOW_ISA
