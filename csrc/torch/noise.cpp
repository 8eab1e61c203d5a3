#include "noise.h"

#include <vector>

#include "../cpu/dispatch.h"

namespace pyflow {

Stream stream_of(const Tensor& seed, const Tensor& step, int64_t purpose) {
  const bool per_row = seed.dim() > 0;
  return {(const int64_t*)seed.data_ptr(), per_row ? seed.stride(0) : 0, per_row,
          uint64_t(*(const int64_t*)step.data_ptr()), int(purpose)};
}

namespace {

Tensor noise(std::vector<int64_t> size, Tensor seed, Tensor step, int64_t kind, int64_t purpose, ScalarType dtype) {
  NoiseArgs a{};
  Tensor out = new_empty(seed, size.data(), int64_t(size.size()), dtype);
  a.kind = NoiseKind(kind);
  a.stream = stream_of(seed, step, purpose);
  // one shared stream: a single row; one stream per sample: the sample is the row
  Layout layout(out, a.stream.per_row ? out.dim() - 1 : out.dim());
  layout.add(a.out, out);
  a.out.stream = streams(out);
  a.space = layout.merge();
  a.plan = plan_of(a.space, layout.flat());
  const auto kernel = cpu_table()->noise;
  if (out.numel() > 0) {
    torch::stable::parallel_for(0, a.plan.units, a.plan.grain,
                                [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  }
  return out;
}

Tensor philox(Tensor counter, Tensor key) {
  const Tensor c = torch::stable::contiguous(counter), k = torch::stable::contiguous(key);
  const auto sizes = counter.sizes();
  Tensor out = new_empty(counter, sizes.data(), counter.dim(), ScalarType::Long);
  const PhiloxArgs a{(const int64_t*)c.data_ptr(), (const int64_t*)k.data_ptr(), (int64_t*)out.data_ptr()};
  const auto kernel = cpu_table()->philox_words;
  torch::stable::parallel_for(0, counter.numel() / 4, grain_of(4),
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyflow, CPU, m) {
  m.impl("noise", TORCH_BOX(&noise));
  m.impl("philox", TORCH_BOX(&philox));
}

}  // namespace pyflow
