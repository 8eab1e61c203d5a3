// GAN-QP critic: partial sums of the distance per row (units of the plan), then distance, loss and gradients (a unit is
// a row).
#include "../args/gan_qp.h"

#include "tile.h"

namespace pyflow::PYFLOW_ISA {
namespace {

// two AVX-512 accumulators hide the latency of an addition; every instruction set adds in the order of these lanes
constexpr int kLanes = 32;

// adds n <= kChunk deviations to the lanes of a row
template <Distance D, class T>
void add_deviations(const T* __restrict real, const T* __restrict fake, int64_t n, double* __restrict lanes) {
  T lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      lane[j] += deviation<D>(real[i + j], fake[i + j]);
    }
  }
  for (int j = 0; i + j < n; ++j) lane[j] += deviation<D>(real[i + j], fake[i + j]);
  for (int j = 0; j < kLanes; ++j) lanes[j] += double(lane[j]);
}

template <Distance D, class T>
void sums_unit(const GanQpSums& a, const Tile& unit, int64_t segment) {
  alignas(64) T reals[kChunk], fakes[kChunk];
  alignas(64) double lanes[kLanes];
  for_each_chunk(unit, [&](const Tile& t, const Tile&) {
    const T* real = load(a.space, a.real, t, reals);
    const T* fake = load(a.space, a.fake, t, fakes);
    // a unit of several rows has one chunk
    for (int64_t r = 0; r < t.rows; ++r) {
      if (t.col == unit.col) fill(lanes, 0.0, kLanes);
      add_deviations<D>(real + r * t.cols, fake + r * t.cols, t.cols, lanes);
      if (t.col + t.cols < unit.col + unit.cols) continue;
      write_row_sum<double>(a.sums, a.plan, t.row + r, segment, fold<kLanes>(lanes));
    }
  });
}

double distance_of(const GanQpDistance& of, Distance distance, int64_t row) {
  return mean_distance(distance, ((const double*)of.sums)[row], of.count);
}

template <class T>
void loss_rows(const T* __restrict real, const T* __restrict fake, const T* __restrict d, T lam2, T eps,
               T* __restrict loss, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    loss[i] = quadratic_loss(real[i] - fake[i], width_of(d[i], lam2, eps));
  }
}

template <class T>
void slope_rows(const T* __restrict real, const T* __restrict fake, const T* __restrict d, const T* __restrict grad,
                T lam2, T eps, T* __restrict g_real, T* __restrict g_fake, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T g = grad[i] * quadratic_slope(real[i] - fake[i], width_of(d[i], lam2, eps));
    g_real[i] = g;
    g_fake[i] = -g;
  }
}

template <class T>
void read_rows(const RowView& v, int64_t begin, int64_t n, T* to) {
  read_typed(v.view, begin * v.view.stride[0], v.view.stride[0], n, to);
}

template <class T>
void write_rows(const RowView& v, int64_t begin, int64_t n, const T* from) {
  write_typed(v.view, begin * v.view.stride[0], v.view.stride[0], n, from);
}

template <class T>
void loss_chunk(const GanQpLoss& a, int64_t begin, int64_t n) {
  alignas(64) T real[kChunk], fake[kChunk];
  T* d = (T*)a.d + begin;
  read_rows(a.t_real, begin, n, real);
  read_rows(a.t_fake, begin, n, fake);
  for (int64_t i = 0; i < n; ++i) {
    const double of_x = distance_of(a.x, a.distance, begin + i);
    d[i] = T(a.z.sums ? of_x + distance_of(a.z, a.distance, begin + i) : of_x);
  }
  loss_rows(real, fake, d, T(a.lam2), T(a.eps), (T*)a.loss + begin, n);
}

template <class T>
void backward_chunk(const GanQpLossBackward& a, int64_t begin, int64_t n) {
  alignas(64) T real[kChunk], fake[kChunk], d[kChunk], grad[kChunk], g_real[kChunk], g_fake[kChunk];
  read_rows(a.t_real, begin, n, real);
  read_rows(a.t_fake, begin, n, fake);
  read_rows(a.d, begin, n, d);
  read_rows(a.grad, begin, n, grad);
  slope_rows(real, fake, d, grad, T(a.lam2), T(a.eps), g_real, g_fake, n);
  write_rows(a.g_real, begin, n, g_real);
  write_rows(a.g_fake, begin, n, g_fake);
}

}  // namespace

void gan_qp_sums(const GanQpSums& a, int64_t begin, int64_t end) {
  for_each_unit(a, begin, end, [&](const Tile& unit, int64_t segment, auto zero) {
    as_constant(a.distance, [&](auto distance) { sums_unit<distance.value, decltype(zero)>(a, unit, segment); });
  });
}

void gan_qp_loss(const GanQpLoss& a, int64_t begin, int64_t end) {
  for_each_chunk(begin, end,
                 [&](int64_t row, int64_t n) { a.f64 ? loss_chunk<double>(a, row, n) : loss_chunk<float>(a, row, n); });
}

void gan_qp_loss_backward(const GanQpLossBackward& a, int64_t begin, int64_t end) {
  for_each_chunk(begin, end, [&](int64_t row, int64_t n) {
    a.f64 ? backward_chunk<double>(a, row, n) : backward_chunk<float>(a, row, n);
  });
}

}  // namespace pyflow::PYFLOW_ISA
