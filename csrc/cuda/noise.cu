// Counter-based noise on an NVIDIA GPU: each thread draws four neighbouring elements.
#include <vector>

#include "../ops/noise.h"
#include "random.h"

namespace pyflow::cuda {
namespace {

struct Args {
  Space space;
  Cut cut;
  Stream stream;
  View out;
};

template <NoiseKind K, int N>
__global__ void __launch_bounds__(kThreads, 2) noise_kernel(const __grid_constant__ Args a) {
  const int64_t row_block = blockIdx.x / a.cut.segments, first = blockIdx.x % a.cut.segments * a.cut.segment;
  for (int64_t c = 0; c < a.cut.segment; c += a.cut.cols) {
    const Spot whole = spot(a.space, a.cut, row_block, first + c, 0);
    if (!whole.inside) continue;
    const Four z = draw<K>(a.stream, a.space, whole.row, whole.col);
    if constexpr (N == kEach) {
      store(a.space, a.out, whole, Group<float, kEach>{{z.v[0], z.v[1], z.v[2], z.v[3]}});
    } else {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        store(a.space, a.out, spot(a.space, a.cut, row_block, first + c, i), Group<float, 1>{{z.v[i]}});
      }
    }
  }
}

template <NoiseKind K>
void launch_noise(const Args& a, const Tensor& out) {
  launch(whole_vectors(a.space, a.out) ? noise_kernel<K, kEach> : noise_kernel<K, 1>, a.cut.blocks, out, a);
}

__global__ void __launch_bounds__(kThreads, 2)
    philox_kernel(const int64_t* counter, const int64_t* key, int64_t* out, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t* c = counter + 4 * i;
  const Words w = philox4x32({{uint32_t(c[0]), uint32_t(c[1]), uint32_t(c[2]), uint32_t(c[3])}}, uint32_t(key[2 * i]),
                             uint32_t(key[2 * i + 1]));
#pragma unroll
  for (int j = 0; j < 4; ++j) out[4 * i + j] = int64_t(w.v[j]);
}

Tensor noise(std::vector<int64_t> size, Tensor seed, Tensor step, int64_t kind, int64_t purpose, ScalarType dtype) {
  Args a{};
  Tensor out = new_empty(seed, size.data(), int64_t(size.size()), dtype);
  if (out.numel() == 0) return out;
  a.stream = stream_of(seed, step, purpose);
  // one shared stream: a single row; one stream per sample: the sample is the row
  Layout layout(out, a.stream.per_row ? out.dim() - 1 : out.dim());
  layout.add(a.out, out);
  a.space = layout.merge();
  a.cut = cut(a.space);
  NoiseKind(kind) == NoiseKind::normal ? launch_noise<NoiseKind::normal>(a, out)
                                       : launch_noise<NoiseKind::uniform>(a, out);
  return out;
}

Tensor philox(Tensor counter, Tensor key) {
  const Tensor c = torch::stable::contiguous(counter), k = torch::stable::contiguous(key);
  const auto sizes = counter.sizes();
  Tensor out = new_empty(counter, sizes.data(), counter.dim(), ScalarType::Long);
  const int64_t count = counter.numel() / 4;
  if (count == 0) return out;
  launch(philox_kernel, ceil_div(count, kThreads), out, (const int64_t*)c.data_ptr(), (const int64_t*)k.data_ptr(),
         (int64_t*)out.data_ptr(), count);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyflow_cuda, CUDA, m) {
  m.impl("noise", TORCH_BOX(&noise));
  m.impl("philox", TORCH_BOX(&philox));
}

}  // namespace pyflow::cuda
