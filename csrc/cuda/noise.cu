// Counter-based noise on an NVIDIA GPU: each thread draws four neighbouring elements.
#include "random.h"

namespace pyflow::cuda {
namespace {

template <NoiseKind K, int N>
__global__ void __launch_bounds__(kThreads, 2) noise_kernel(const __grid_constant__ NoiseArgs a) {
  for_each_group<kEach>(a, [&](const Spot& p, int) {
    if (!p.inside) return;
    const Four z = draw<K>(a.stream, a.space, p.row, p.col);
    store_four<N>(a.space, a.out, p, Group<float, kEach>{{z.v[0], z.v[1], z.v[2], z.v[3]}});
  });
}

__global__ void __launch_bounds__(kThreads, 2) philox_kernel(const __grid_constant__ PhiloxArgs a) {
  const int64_t i = global_thread();
  if (i >= a.plan.units) return;
  const int64_t* c = a.counter + 4 * i;
  const Words w = philox4x32({{uint32_t(c[0]), uint32_t(c[1]), uint32_t(c[2]), uint32_t(c[3])}}, uint32_t(a.key[2 * i]),
                             uint32_t(a.key[2 * i + 1]));
#pragma unroll
  for (int j = 0; j < 4; ++j) a.out[4 * i + j] = int64_t(w.v[j]);
}

}  // namespace

void noise(const NoiseArgs& a, Stream stream) {
  const bool whole = whole_vectors(a.space, a.out);
  as_constant(a.kind, [&](auto kind) {
    launch(whole ? noise_kernel<kind.value, kEach> : noise_kernel<kind.value, 1>, a.plan.units, stream, a);
  });
}

// one thread per counter
void philox(const PhiloxArgs& a, Stream stream) { launch(philox_kernel, ceil_div(a.plan.units, kThreads), stream, a); }

}  // namespace pyflow::cuda
