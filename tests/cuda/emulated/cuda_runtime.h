// CUDA's words for a C++ compiler, found by csrc/cuda in place of the header of that name: each kernel runs on a CPU, a
// block's threads as fibers of one thread (emulator.cpp). A fiber runs until its next barrier or warp collective, so
// a missing barrier gives wrong results in one order of the threads or another.
// Shared memory starts as 0xff bytes, which are NaN. Not seen here: the memory model (every store is seen at once, and
// any update is atomic), addresses that are not aligned, limits of registers and of shared memory, streams. Masks other
// than all 32 lanes are refused.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
// Blocks run one after another. Thread-local because a module's thread-local variables lie side by side, where the
// emulator fills them before each block; gcc ignores a section attribute inside a template.
#define __shared__ static thread_local

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
// change with each switch of fibers
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
cudaError_t cudaGetLastError();
// the text of the fault that the last cudaGetLastError returned
const char* cudaGetErrorString(cudaError_t);

namespace emulated {

constexpr int kWarp = 32;

// where a thread waits
struct Site {
  const char *what, *file;
  int line;
};

// runs the body once per thread of each block. A fault ends the launch and is kept for cudaGetLastError.
void run(unsigned blocks, unsigned threads, const std::function<void()>& body);
// returns when all threads of the block have called it from the same line
void block_barrier(Site);
// returns the words of the 32 lanes when all of them have called it from the same line
const uint64_t* exchange(Site, unsigned mask, uint64_t word);

template <class Kernel, class... Args>
void launch(Kernel kernel, unsigned blocks, unsigned threads, const Args&... args) {
  run(blocks, threads, [&] { kernel(args...); });
}

}  // namespace emulated

// the default arguments are the place of the call
#define EMULATED_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATED_PLACE) { emulated::block_barrier({"__syncthreads", file, line}); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, EMULATED_PLACE) {
  uint64_t word = 0;
  static_assert(sizeof value <= sizeof word);
  std::memcpy(&word, &value, sizeof value);
  const uint64_t* words = emulated::exchange({"__shfl_xor_sync", file, line}, mask, word);
  std::memcpy(&value, words + (threadIdx.x % emulated::kWarp ^ unsigned(lanes)), sizeof value);
  return value;
}

inline unsigned __ballot_sync(unsigned mask, bool vote, EMULATED_PLACE) {
  const uint64_t* words = emulated::exchange({"__ballot_sync", file, line}, mask, vote);
  unsigned votes = 0;
  for (int lane = 0; lane < emulated::kWarp; ++lane) votes |= unsigned(words[lane]) << lane;
  return votes;
}

#undef EMULATED_PLACE

// threads are switched at collectives only
template <class T>
T atomicAdd(T* to, T value) {
  const T old = *to;
  *to += value;
  return old;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }
