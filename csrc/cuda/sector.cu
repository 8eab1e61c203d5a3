// Largest gaps of random points on a circle on an NVIDIA GPU: one trial per thread.
#include "../args/sector.h"
#include "random.h"

namespace pyflow::cuda {
namespace {

constexpr int kThresholds = 256;       // per launch, counted in shared memory
constexpr int64_t kMostBlocks = 4096;  // at most; blocks stride over the trials

__global__ void __launch_bounds__(kThreads, 2) counts_kernel(const __grid_constant__ SectorTrials a) {
  __shared__ unsigned long long counts[kThresholds];
  for (int k = threadIdx.x; k < a.count; k += kThreads) counts[k] = 0;
  __syncthreads();
  const int64_t blocks = (a.points + 3) / 4, stride = int64_t(gridDim.x) * kThreads;
  // no early exit: __ballot_sync needs all threads of a warp
  for (int64_t first = int64_t(blockIdx.x) * kThreads; first < a.trials; first += stride) {
    const int64_t trial = first + threadIdx.x;
    uint32_t low = kNoWord;
    int64_t total = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      Words w = words_of(a.stream, 0, uint64_t(trial * blocks + block));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (4 * block + i >= a.points) w.v[i] = kNoWord;
        low = w.v[i] < low ? w.v[i] : low;
      }
      total += block_sum(w.v[0], w.v[1], w.v[2], w.v[3]);
    }
    const double largest = double(fixed_log(positive_uniform(low))), sum = double(total);
    for (int k = 0; k < a.count; ++k) {
      const bool reached = trial < a.trials && gap_reaches(largest, sum, a.thresholds[k]);
      const int hits = __popc(__ballot_sync(0xffffffffu, reached));
      if (threadIdx.x % 32 == 0 && hits > 0) atomicAdd(counts + k, (unsigned long long)hits);
    }
  }
  __syncthreads();
  for (int k = threadIdx.x; k < a.count; k += kThreads) atomicAdd((unsigned long long*)a.counts + k, counts[k]);
}

}  // namespace

void sector_trials(const SectorTrials& all, Stream stream) {
  for (int64_t k = 0; k < all.count; k += kThresholds) {
    SectorTrials a = all;
    a.thresholds += k;
    a.counts += k;
    a.count = a.count - k < kThresholds ? a.count - k : kThresholds;
    const int64_t blocks = ceil_div(a.trials, kThreads);
    launch(counts_kernel, blocks < kMostBlocks ? blocks : kMostBlocks, stream, a);
  }
}

}  // namespace pyflow::cuda
