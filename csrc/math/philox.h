// Philox4x32-10 (Salmon et al. 2011, Random123): four words from a 128-bit counter and a 64-bit key. Integers
// only, so every backend gives the same.
#pragma once

#include "fn.h"

namespace pyflow {

struct Words {
  uint32_t v[4];
};

// a word between rounds: as wide as its product where that spares the vectoriser the shuffles (twice as fast
// on AVX-512), and only its low half counts
#if defined(__AVX512DQ__)
using PhiloxLane = uint64_t;
#else
using PhiloxLane = uint32_t;
#endif

PYFLOW_FN Words philox4x32(const Words& counter, uint32_t key0, uint32_t key1) {
  PhiloxLane c0 = counter.v[0], c1 = counter.v[1], c2 = counter.v[2], c3 = counter.v[3];
#if defined(__CUDA_ARCH__)
#pragma unroll
#elif !defined(__CUDACC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * uint32_t(c0);
    const uint64_t p1 = uint64_t(0xCD9E8D57u) * uint32_t(c2);
    c0 = PhiloxLane(p1 >> 32) ^ c1 ^ key0;
    c1 = PhiloxLane(p1);
    c2 = PhiloxLane(p0 >> 32) ^ c3 ^ key1;
    c3 = PhiloxLane(p0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{uint32_t(c0), uint32_t(c1), uint32_t(c2), uint32_t(c3)}};
}

// the words of elements 4 * block to 4 * block + 3 of a stream; `step_high` comes from the function below
PYFLOW_FN Words block_words(uint32_t block_low, uint32_t block_high, uint32_t step_low, uint32_t step_high,
                            uint32_t seed_low, uint32_t seed_high) {
  return philox4x32({{block_low, block_high, step_low, step_high}}, seed_low, seed_high);
}

// step < 2^56, and in the top byte what the draw is for, so that draws for different ends never share a word
PYFLOW_FN uint32_t high_of_step(uint64_t step, int purpose) {
  return (uint32_t(step >> 32) & 0x00ffffffu) | uint32_t(purpose) << 24;
}

}  // namespace pyflow
