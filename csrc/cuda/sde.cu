// SDE steps on an NVIDIA GPU: each thread handles four neighbours, whose noise takes one Philox block, or two.
#include "../args/sde.h"
#include "random.h"

namespace pyflow::cuda {
namespace {

template <int N, class T>
__device__ Group<T, kEach> noise_four(const SdeArgs& a, const Spot& p) {
  if (a.noise.data) return load_four<N, T>(a.space, a.noise, p);
  const Four z = draw<NoiseKind::normal>(a.stream, a.space, p.row, p.col);
  return {{T(z.v[0]), T(z.v[1]), T(z.v[2]), T(z.v[3])}};
}

// columns outside the row add 0
template <class T>
__device__ void add_products(const SdeArgs& a, const Spot& p, const Group<T, kEach>& u, const Group<T, kEach>& v,
                             Group<T, kEach>& acc) {
#pragma unroll
  for (int i = 0; i < kEach; ++i) acc.v[i] += p.inside && p.col + i < a.space.cols ? u.v[i] * v.v[i] : T(0);
}

// a sum of the row over the block's segment
template <class T>
__device__ void put(const SdeArgs& a, int which, const Group<T, kEach>& acc) {
  write_row_sum(a, a.sums, which, fold(acc, int(a.plan.tile_cols)));
  __syncthreads();  // the next fold reuses the shared memory
}

template <int N, class T>
__global__ void __launch_bounds__(kThreads, 2) step_kernel(const __grid_constant__ SdeArgs a) {
  for_each_tile(a, [&](const Spot& p) {
    if (!p.inside) return;
    const T of_x = row_value<T>(a.a, p.row), of_z = row_value<T>(a.c, p.row);
    const auto x = load_four<N, T>(a.space, a.x, p);
    Group<T, kEach> mean, y;
    if (a.score.data) {
      const T of_score = row_value<T>(a.b, p.row);
      const auto score = load_four<N, T>(a.space, a.score, p);
#pragma unroll
      for (int i = 0; i < kEach; ++i) mean.v[i] = drift(x.v[i], score.v[i], of_x, of_score);
    } else {
#pragma unroll
      for (int i = 0; i < kEach; ++i) mean.v[i] = of_x * x.v[i];
    }
    const auto z = noise_four<N, T>(a, p);
#pragma unroll
    for (int i = 0; i < kEach; ++i) y.v[i] = diffuse(mean.v[i], of_z, z.v[i]);
    if (a.mean.data) store_four<N>(a.space, a.mean, p, mean);
    store_four<N>(a.space, a.y, p, y);
  });
}

template <class T>
__device__ Group<T, kEach> scaled(const Group<T, kEach>& v, T by) {
  return {{by * v.v[0], by * v.v[1], by * v.v[2], by * v.v[3]}};
}

template <int N, class T>
__global__ void __launch_bounds__(kThreads, 2) step_backward_kernel(const __grid_constant__ SdeArgs a) {
  Group<T, kEach> of_a{}, of_b{}, of_c{};
  for_each_tile(a, [&](const Spot& p) {
    if (!p.inside) return;
    Group<T, kEach> gy{}, total{};
    if (a.gy.data) total = gy = load_four<N, T>(a.space, a.gy, p);
    if (a.gmean.data) {
      const auto gmean = load_four<N, T>(a.space, a.gmean, p);
#pragma unroll
      for (int i = 0; i < kEach; ++i) total.v[i] += gmean.v[i];
    }
    if (a.gx.data) store_four<N>(a.space, a.gx, p, scaled(total, row_value<T>(a.a, p.row)));
    if (a.gscore.data) store_four<N>(a.space, a.gscore, p, scaled(total, row_value<T>(a.b, p.row)));
    if (a.gnoise.data) store_four<N>(a.space, a.gnoise, p, scaled(gy, row_value<T>(a.c, p.row)));
    if (!a.sums.out) return;
    add_products(a, p, total, load_four<N, T>(a.space, a.x, p), of_a);
    if (a.score.data) add_products(a, p, total, load_four<N, T>(a.space, a.score, p), of_b);
    if (a.gy.data) add_products(a, p, gy, noise_four<N, T>(a, p), of_c);
  });
  if (!a.sums.out) return;
  put(a, 0, of_a);
  put(a, 1, of_b);
  put(a, 2, of_c);
}

// loss; with gx its backward, where the sums are the gradient of std
template <int N, class T>
__global__ void __launch_bounds__(kThreads, 2) loss_kernel(const __grid_constant__ SdeArgs a) {
  Group<T, kEach> acc{};
  for_each_tile(a, [&](const Spot& p) {
    if (!p.inside) return;
    const auto pred = load_four<N, T>(a.space, a.x, p);
    const Four z = draw<NoiseKind::normal>(a.stream, a.space, p.row, p.col);
    const T std = a.score_given ? row_value<T>(a.c, p.row) : T(1);
    Group<T, kEach> r;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      r.v[i] = a.score_given ? residual<true>(pred.v[i], std, T(z.v[i])) : residual<false>(pred.v[i], std, T(z.v[i]));
    }
    if (!a.gx.data) return add_products(a, p, scaled(r, T(0.5)), r, acc);
    const T grad = row_value<T>(a.a, p.row);
    store_four<N>(a.space, a.gx, p, scaled(r, grad * std));
    add_products(a, p, scaled(pred, grad), r, acc);
  });
  put(a, 0, acc);
}

template <int N, class T>
__global__ void __launch_bounds__(kThreads, 2) squares_kernel(const __grid_constant__ SdeArgs a) {
  Group<T, kEach> of_score{}, of_noise{};
  for_each_tile(a, [&](const Spot& p) {
    if (!p.inside) return;
    const auto score = load_four<N, T>(a.space, a.score, p);
    const auto z = noise_four<N, T>(a, p);
    add_products(a, p, score, score, of_score);
    add_products(a, p, z, z, of_noise);
  });
  put(a, 0, of_score);
  put(a, 1, of_noise);
}

bool whole_vectors(const SdeArgs& a) {
  return cuda::whole_vectors(a.space, a.x, a.score, a.noise, a.y, a.mean, a.gy, a.gmean, a.gx, a.gscore, a.gnoise);
}

}  // namespace

void sde_step(const SdeArgs& a, Stream stream) {
  with_types(a, whole_vectors(a),
             [&](auto n, auto zero) { launch(step_kernel<n.value, decltype(zero)>, a.plan.units, stream, a); });
}

void sde_step_backward(const SdeArgs& a, Stream stream) {
  with_types(a, whole_vectors(a), [&](auto n, auto zero) {
    launch(step_backward_kernel<n.value, decltype(zero)>, a.plan.units, stream, a);
  });
}

// forward; backward if gx is present
void denoising_loss(const SdeArgs& a, Stream stream) {
  with_types(a, whole_vectors(a),
             [&](auto n, auto zero) { launch(loss_kernel<n.value, decltype(zero)>, a.plan.units, stream, a); });
}

void langevin_squares(const SdeArgs& a, Stream stream) {
  with_types(a, whole_vectors(a),
             [&](auto n, auto zero) { launch(squares_kernel<n.value, decltype(zero)>, a.plan.units, stream, a); });
}

}  // namespace pyflow::cuda
