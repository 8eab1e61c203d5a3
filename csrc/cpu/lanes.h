// Philox on vectors. Its product of two 32-bit words is one instruction on 64-bit lanes, which gcc does not find: it
// multiplies all 64 bits by several (a quarter more time for a normal on a core of a Xeon, with AVX2 as with
// AVX-512). Besides stream.h the one place with intrinsics; without them the compiler vectorises words.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../math/philox.h"

#if !defined(PYFLOW_ISA)
#error "compiled once per instruction set: PYFLOW_ISA names it"
#endif

namespace pyflow::PYFLOW_ISA {

#if defined(__AVX2__)
#define PYFLOW_LANES 1

#if defined(__AVX512F__)
typedef uint64_t Lanes __attribute__((vector_size(64)));
#else
typedef uint64_t Lanes __attribute__((vector_size(32)));
#endif
constexpr int kLanes = sizeof(Lanes) / 8;
typedef uint32_t Narrow __attribute__((vector_size(4 * kLanes)));

PYFLOW_FN Lanes lanes_of(uint64_t first, uint64_t step) {
  Lanes v{};
  for (int i = 0; i < kLanes; ++i) v[i] = first + uint64_t(i) * step;
  return v;
}

// of the low halves
PYFLOW_FN Lanes product(const Lanes& words, uint32_t by) {
#if defined(__AVX512F__)
  // masked: gcc 12 warns of its own header otherwise
  return (Lanes)_mm512_maskz_mul_epu32(0xff, (__m512i)words, (__m512i)lanes_of(by, 0));
#else
  return (Lanes)_mm256_mul_epu32((__m256i)words, (__m256i)lanes_of(by, 0));
#endif
}

PYFLOW_FN Lanes widen(const uint32_t* from) {
  Narrow v;
  __builtin_memcpy(&v, from, sizeof v);
  return __builtin_convertvector(v, Lanes);
}

PYFLOW_FN void narrow(const Lanes& from, uint32_t* to) {
  const Narrow v = __builtin_convertvector(from, Narrow);
  __builtin_memcpy(to, &v, sizeof v);
}
#endif

}  // namespace pyflow::PYFLOW_ISA
