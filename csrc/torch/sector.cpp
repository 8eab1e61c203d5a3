#include "../args/sector.h"

#include <vector>

#include "random.h"

namespace pyflow {
namespace {

// CPU: every range of trials has its own counts, which are then added
void run_trials(const SectorTrials& shared) {
  torch::stable::parallel_for(0, shared.trials, grain_of(shared.points), [&](int64_t begin, int64_t end) {
    std::vector<int64_t> own(shared.count);
    SectorTrials a = shared;
    a.counts = own.data();
    cpu::sector_trials(a, begin, end);
    // integer sums: the order of the threads does not matter
    for (int64_t k = 0; k < a.count; ++k) __atomic_fetch_add(shared.counts + k, own[k], __ATOMIC_RELAXED);
  });
}

Tensor sector_counts(Tensor thresholds, int64_t points, int64_t trials, Tensor seed, Tensor step, int64_t purpose) {
  const Tensor x = torch::stable::contiguous(thresholds);
  const auto sizes = thresholds.sizes();
  Tensor out = new_empty(thresholds, sizes.data(), thresholds.dim(), ScalarType::Long);
  const SectorTrials a{
      (const double*)x.data_ptr(), out.numel(), points, trials, random_stream(seed, step, Purpose(purpose)),
      (int64_t*)out.data_ptr()};
  if (a.count == 0) return out;
  torch::stable::zero_(out);
  if constexpr (kCuda) {
    launch(out, [&](cuda::Stream stream) { cuda::sector_trials(a, stream); });
  } else {
    run_trials(a);
  }
  return out;
}

}  // namespace

PYFLOW_OPERATORS(m) { m.impl("sector_counts", TORCH_BOX(&sector_counts)); }

}  // namespace pyflow
