// GAN-QP critic on an NVIDIA GPU: sums of deviations of each sample, then one thread per sample.
#include "../args/gan_qp.h"
#include "tile.h"

namespace pyflow::cuda {
namespace {

template <Distance D, int N, class T>
__global__ void __launch_bounds__(kThreads, 2) sums(const __grid_constant__ GanQpSums a) {
  Group<T, kEach> acc{};
  for_each_group<N>(a, [&](const Spot& p, int at) {
    const auto real = load<N, T>(a.space, a.real, p), fake = load<N, T>(a.space, a.fake, p);
    Group<T, N> terms;
#pragma unroll
    for (int i = 0; i < N; ++i) terms.v[i] = deviation<D>(real.v[i], fake.v[i]);
    add_terms(p, at, terms, acc);
  });
  write_row_sum(a, a.sums, 0, fold(acc, int(a.plan.tile_cols)));
}

template <class T>
__device__ T row_distance(const GanQpDistance& d, Distance distance, int64_t row) {
  return mean_distance(distance, ((const T*)d.sums)[row], d.count);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) loss(const __grid_constant__ GanQpLoss a) {
  const int64_t row = global_thread();
  if (row >= a.plan.units) return;
  T d = row_distance<T>(a.x, a.distance, row);
  if (a.z.sums) d += row_distance<T>(a.z, a.distance, row);
  const T delta = row_value<T>(a.t_real, row) - row_value<T>(a.t_fake, row);
  ((T*)a.loss)[row] = quadratic_loss(delta, width_of(d, T(a.lam2), T(a.eps)));
  ((T*)a.d)[row] = d;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) loss_backward(const __grid_constant__ GanQpLossBackward a) {
  const int64_t row = global_thread();
  if (row >= a.plan.units) return;
  const T delta = row_value<T>(a.t_real, row) - row_value<T>(a.t_fake, row);
  const T slope = quadratic_slope(delta, width_of(row_value<T>(a.d, row), T(a.lam2), T(a.eps)));
  const T grad = row_value<T>(a.grad, row) * slope;
  write_row_value(a.g_real, row, grad);
  write_row_value(a.g_fake, row, -grad);
}

}  // namespace

void gan_qp_sums(const GanQpSums& a, Stream stream) {
  as_constant(a.distance, [&](auto distance) {
    with_types(a, whole_vectors(a.space, a.real, a.fake), [&](auto n, auto zero) {
      launch(sums<distance.value, n.value, decltype(zero)>, a.plan.units, stream, a);
    });
  });
}

// one thread per row
void gan_qp_loss(const GanQpLoss& a, Stream stream) {
  launch(a.f64 ? loss<double> : loss<float>, ceil_div(a.plan.units, kThreads), stream, a);
}

void gan_qp_loss_backward(const GanQpLossBackward& a, Stream stream) {
  launch(a.f64 ? loss_backward<double> : loss_backward<float>, ceil_div(a.plan.units, kThreads), stream, a);
}

}  // namespace pyflow::cuda
