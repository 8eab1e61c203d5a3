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
typedef uint64_t Vector __attribute__((vector_size(64)));
#else
typedef uint64_t Vector __attribute__((vector_size(32)));
#endif
constexpr int kHalf = sizeof(Vector) / 8;
typedef uint32_t Narrow __attribute__((vector_size(4 * kHalf)));

// two vectors, so that one chain of rounds fills the waits of the other
struct Lanes {
  Vector a, b;
};
constexpr int kLanes = 2 * kHalf;

PYFLOW_FN Lanes operator^(const Lanes& x, const Lanes& y) { return {x.a ^ y.a, x.b ^ y.b}; }
PYFLOW_FN Lanes operator^(const Lanes& x, uint64_t y) { return {x.a ^ y, x.b ^ y}; }
PYFLOW_FN Lanes operator>>(const Lanes& x, int bits) { return {x.a >> bits, x.b >> bits}; }
PYFLOW_FN Lanes& operator+=(Lanes& x, uint64_t y) { return x = {x.a + y, x.b + y}; }

PYFLOW_FN Vector vector_of(uint64_t first, uint64_t step) {
  Vector v{};
  for (int i = 0; i < kHalf; ++i) v[i] = first + uint64_t(i) * step;
  return v;
}

PYFLOW_FN Lanes lanes_of(uint64_t first, uint64_t step) {
  return {vector_of(first, step), vector_of(first + kHalf * step, step)};
}

// of the low halves
PYFLOW_FN Vector product(const Vector& words, uint32_t by) {
#if defined(__AVX512F__)
  // masked: gcc 12 warns of its own header otherwise
  return (Vector)_mm512_maskz_mul_epu32(0xff, (__m512i)words, (__m512i)vector_of(by, 0));
#else
  return (Vector)_mm256_mul_epu32((__m256i)words, (__m256i)vector_of(by, 0));
#endif
}

PYFLOW_FN Lanes product(const Lanes& words, uint32_t by) { return {product(words.a, by), product(words.b, by)}; }

PYFLOW_FN Vector widen_half(const uint32_t* from) {
  Narrow v;
  __builtin_memcpy(&v, from, sizeof v);
  return __builtin_convertvector(v, Vector);
}

PYFLOW_FN Lanes widen(const uint32_t* from) { return {widen_half(from), widen_half(from + kHalf)}; }

PYFLOW_FN void narrow(const Lanes& from, uint32_t* to) {
  const Narrow a = __builtin_convertvector(from.a, Narrow), b = __builtin_convertvector(from.b, Narrow);
  __builtin_memcpy(to, &a, sizeof a);
  __builtin_memcpy(to + kHalf, &b, sizeof b);
}
#endif

}  // namespace pyflow::PYFLOW_ISA
