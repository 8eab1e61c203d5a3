#include "../cpu/sector.h"

#include <vector>

#include "../cpu/dispatch.h"
#include "noise.h"

namespace pyflow {
namespace {

Tensor sector_counts(Tensor thresholds, int64_t points, int64_t trials, Tensor seed, Tensor step, int64_t purpose) {
  const Tensor x = torch::stable::contiguous(thresholds);
  const auto sizes = thresholds.sizes();
  Tensor out = new_empty(thresholds, sizes.data(), thresholds.dim(), ScalarType::Long);
  auto* counts = (int64_t*)out.data_ptr();
  const int64_t count = out.numel();
  for (int64_t k = 0; k < count; ++k) counts[k] = 0;
  const SectorTrials shared{(const double*)x.data_ptr(), count, points, stream_of(seed, step, purpose), nullptr};
  const auto kernel = cpu_table()->sector_trials;
  torch::stable::parallel_for(0, trials, grain_of(points), [&](int64_t begin, int64_t end) {
    std::vector<int64_t> own(count);
    SectorTrials a = shared;
    a.counts = own.data();
    kernel(a, begin, end);
    // integer sums: the order of the threads does not matter
    for (int64_t k = 0; k < count; ++k) __atomic_fetch_add(counts + k, own[k], __ATOMIC_RELAXED);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyflow, CPU, m) { m.impl("sector_counts", TORCH_BOX(&sector_counts)); }

}  // namespace pyflow
