#include "../args/noise.h"

#include <vector>

#include "random.h"

namespace pyflow {
namespace {

Number number_of(const Tensor& t) {
  const auto* data = (const int64_t*)t.data_ptr();
  if (is_host_number(t)) return {nullptr, *data};
  return {data, 0};
}

}  // namespace

RandomStream random_stream(const Tensor& seed, const Tensor& step, Purpose purpose) {
  const bool per_row = seed.dim() > 0;
  return {number_of(seed), number_of(step), per_row ? seed.stride(0) : 0, per_row, int(purpose)};
}

namespace {

Tensor noise(std::vector<int64_t> size, Tensor seed, Tensor step, int64_t kind, int64_t purpose, ScalarType dtype) {
  NoiseArgs a{};
  Tensor out = new_empty(seed, size.data(), int64_t(size.size()), dtype);
  a.kind = NoiseKind(kind);
  a.stream = random_stream(seed, step, Purpose(purpose));
  // one shared stream: a single row; one stream per sample: the sample is the row
  Layout layout(out, a.stream.per_row ? out.dim() - 1 : out.dim());
  layout.add_output(a.out, out);
  plan(a, layout);
  if (out.numel() > 0) PYFLOW_RUN(noise, a, out);
  return out;
}

Tensor philox(Tensor counter, Tensor key) {
  const Tensor c = torch::stable::contiguous(counter), k = torch::stable::contiguous(key);
  const auto sizes = counter.sizes();
  Tensor out = new_empty(counter, sizes.data(), counter.dim(), ScalarType::Long);
  PhiloxArgs a{};
  a.plan.units = counter.numel() / 4;
  a.plan.grain = grain_of(4);
  a.counter = (const int64_t*)c.data_ptr();
  a.key = (const int64_t*)k.data_ptr();
  a.out = (int64_t*)out.data_ptr();
  if (a.plan.units > 0) PYFLOW_RUN(philox, a, out);
  return out;
}

}  // namespace

PYFLOW_OPERATORS(m) {
  m.impl("noise", TORCH_BOX(&noise));
  m.impl("philox", TORCH_BOX(&philox));
}

}  // namespace pyflow
