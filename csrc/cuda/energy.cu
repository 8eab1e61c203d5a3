// The accept step of a Metropolis-adjusted Langevin chain and squared norms on an NVIDIA GPU.
#include "../args/energy.h"
#include "random.h"

namespace pyflow::cuda {
namespace {

// log-ratio terms summed over the block's segment; every thread of the row gets the sum
template <int N, class T>
__device__ T transition_sum(const MalaArgs& a) {
  const int64_t row = row_of(a);
  const T alpha = row < a.space.rows ? row_value<T>(a.alpha, row) : T(0);
  Group<T, kEach> acc{};
  for_each_group<N>(a, [&](const Spot& p, int at) {
    const auto z = load<N, T>(a.space, a.z, p);
    const auto z_new = load<N, T>(a.space, a.z_new, p);
    const auto grad = load<N, T>(a.space, a.grad, p);
    const auto grad_new = load<N, T>(a.space, a.grad_new, p);
    Group<T, N> terms;
#pragma unroll
    for (int i = 0; i < N; ++i) terms.v[i] = transition(z.v[i], z_new.v[i], grad.v[i], grad_new.v[i], alpha);
    add_terms(p, at, terms, acc);
  });
  return fold(acc, int(a.plan.tile_cols));
}

template <int N, class T>
__global__ void __launch_bounds__(kThreads, 2) sums_kernel(const __grid_constant__ MalaArgs a) {
  write_row_sum(a, a.log_ratio, 0, transition_sum<N, T>(a));
}

template <int N, class T>
__global__ void __launch_bounds__(kThreads, 2) squares_kernel(const __grid_constant__ SquaresArgs a) {
  Group<T, kEach> acc{};
  for_each_group<N>(a, [&](const Spot& p, int at) {
    auto x = load<N, T>(a.space, a.x, p);
#pragma unroll
    for (int i = 0; i < N; ++i) x.v[i] *= x.v[i];
    add_terms(p, at, x, acc);
  });
  write_row_sum(a, a.squares, 0, fold(acc, int(a.plan.tile_cols)));
}

// element `row` of the shared stream, or element 0 of the row's own stream
__device__ float uniform_of(const RandomStream& s, int64_t row) {
  const uint64_t k = s.per_row ? 0 : uint64_t(row);
  const Words w = words_of(s, row, k / 4);
  const unsigned which = unsigned(k % 4);
  return uniform(which == 0 ? w.v[0] : which == 1 ? w.v[1] : which == 2 ? w.v[2] : w.v[3]);
}

template <int N, class T>
__global__ void __launch_bounds__(kThreads, 2) accept_kernel(const __grid_constant__ MalaArgs a) {
  T ratio = a.log_ratio.out ? T(0) : transition_sum<N, T>(a);
  const int64_t row = row_of(a);
  if (row >= a.space.rows) return;
  if (a.log_ratio.out) ratio = ((const T*)a.log_ratio.out)[row];
  const T u = row_value<T>(a.u, row), u_new = row_value<T>(a.u_new, row);
  const bool accepted = accepts(u, u_new, ratio, uniform_of(a.stream, row));
  if (blockIdx.x % a.plan.segments == 0 && threadIdx.x % (int(a.plan.tile_cols) / kEach) == 0) {
    a.accepted[row] = accepted;
    write_row_value(a.u_out, row, accepted ? u_new : u);
  }
  const View &z = accepted ? a.z_new : a.z, &grad = accepted ? a.grad_new : a.grad;
  for_each_group<N>(a, [&](const Spot& p, int) {
    store(a.space, a.z_out, p, load<N, T>(a.space, z, p));
    store(a.space, a.grad_out, p, load<N, T>(a.space, grad, p));
  });
}

bool whole_vectors(const MalaArgs& a) {
  return cuda::whole_vectors(a.space, a.z, a.z_new, a.grad, a.grad_new, a.z_out, a.grad_out);
}

}  // namespace

// rows of several segments
void mala_sums(const MalaArgs& a, Stream stream) {
  with_types(a, whole_vectors(a),
             [&](auto n, auto zero) { launch(sums_kernel<n.value, decltype(zero)>, a.plan.units, stream, a); });
}

void mala_accept(const MalaArgs& a, Stream stream) {
  with_types(a, whole_vectors(a),
             [&](auto n, auto zero) { launch(accept_kernel<n.value, decltype(zero)>, a.plan.units, stream, a); });
}

void row_squares(const SquaresArgs& a, Stream stream) {
  with_types(a, whole_vectors(a.space, a.x),
             [&](auto n, auto zero) { launch(squares_kernel<n.value, decltype(zero)>, a.plan.units, stream, a); });
}

}  // namespace pyflow::cuda
