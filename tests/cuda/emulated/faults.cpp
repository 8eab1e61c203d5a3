// Kernels with one fault each: what the emulator says of them.
#include <cstdio>

#include "cuda_runtime.h"

namespace {

constexpr unsigned kBlocks = 3, kThreads = 64;
unsigned out[kThreads];

void good() {
  __shared__ unsigned sums[2];
  unsigned sum = threadIdx.x;
  for (int d = 1; d < 32; d *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  out[threadIdx.x] =
      sums[0] + sums[1] + blockIdx.x + gridDim.x * __popc(__ballot_sync(0xffffffffu, threadIdx.x % 4 == 0));
}

void barrier_that_some_never_reach() {
  if (threadIdx.x < 40) __syncthreads();
}

void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void collective_of_half_a_warp() {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __ballot_sync(0xffffffffu, true);
}

void two_collectives() {
  if (threadIdx.x % 2 == 0) {
    out[threadIdx.x] = __ballot_sync(0xffffffffu, true);
  } else {
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1u, 1);
  }
}

void barrier_and_collective() {
  if (threadIdx.x % 2 == 0) __syncthreads();
  out[threadIdx.x] = __ballot_sync(0xffffffffu, true);
}

void small_mask() { out[threadIdx.x] = __ballot_sync(0xffffu, true); }

// correct in the orders in which the reader comes last
template <unsigned Reader>
void race() {
  __shared__ unsigned shared[kThreads];
  shared[threadIdx.x] = threadIdx.x;
  if (threadIdx.x == Reader) out[0] = shared[kThreads - 1 - Reader];
}

void unwritten_shared_memory() {
  __shared__ volatile float unwritten[kThreads];
  out[threadIdx.x] = unwritten[threadIdx.x] != unwritten[threadIdx.x];
}

void report(const char* name, void (*kernel)()) {
  emulated::launch(kernel, kBlocks, kThreads);
  const cudaError_t error = cudaGetLastError();
  std::printf("%s: %s, %u\n", name, error == cudaSuccess ? "no fault" : cudaGetErrorString(error), out[0]);
  out[0] = 0;
}

}  // namespace

int main() {
  report("good", good);
  report("barrier that some never reach", barrier_that_some_never_reach);
  report("two barriers", two_barriers);
  report("collective of half a warp", collective_of_half_a_warp);
  report("two collectives", two_collectives);
  report("barrier and collective", barrier_and_collective);
  report("small mask", small_mask);
  report("race with later threads", race<0>);
  report("race with earlier threads", race<kThreads - 1>);
  report("unwritten shared memory", unwritten_shared_memory);
  report("good after faults", good);
}
