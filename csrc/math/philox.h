// Philox4x32-10 (Salmon et al. 2011, Random123): four words from a 128-bit counter and a 64-bit key. Integer
// arithmetic only: the same words on every backend.
#pragma once

#include "fn.h"

namespace pyflow {

struct Words {
  uint32_t v[4];
};

// Ten rounds, on single words (Lane has 32 bits) or on vectors (64-bit elements, with the word in the low half).
// `product` multiplies the low 32 bits of each element to 64 bits.
template <class Lane, class Key, class Product>
PYFLOW_FN void philox_rounds(Lane& c0, Lane& c1, Lane& c2, Lane& c3, Key key0, Key key1, Product product) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#elif !defined(__CUDACC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const auto p0 = product(c0, 0xD2511F53u), p1 = product(c2, 0xCD9E8D57u);
    c0 = Lane(p1 >> 32) ^ c1 ^ key0;
    c1 = Lane(p1);
    c2 = Lane(p0 >> 32) ^ c3 ^ key1;
    c3 = Lane(p0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

PYFLOW_FN Words philox4x32(const Words& counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.v[0], c1 = counter.v[1], c2 = counter.v[2], c3 = counter.v[3];
  philox_rounds(c0, c1, c2, c3, key0, key1, [](uint32_t word, uint32_t by) { return uint64_t(word) * by; });
  return {{c0, c1, c2, c3}};
}

// the random words of stream elements 4 * block to 4 * block + 3; `step_high` comes from high_of_step
PYFLOW_FN Words block_words(uint32_t block_low, uint32_t block_high, uint32_t step_low, uint32_t step_high,
                            uint32_t seed_low, uint32_t seed_high) {
  return philox4x32({{block_low, block_high, step_low, step_high}}, seed_low, seed_high);
}

// high word of step < 2^56, with the purpose in the top byte: draws for different purposes never share a word
PYFLOW_FN uint32_t high_of_step(uint64_t step, int purpose) {
  return (uint32_t(step >> 32) & 0x00ffffffu) | uint32_t(purpose) << 24;
}

}  // namespace pyflow
