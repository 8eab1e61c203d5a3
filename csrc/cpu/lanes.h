// Philox on vectors of 64-bit elements. One instruction multiplies the low 32 bits of each element to 64 bits; gcc does
// not find it and multiplies all 64 bits with several (normal floats take a quarter longer on a core of a Xeon, with
// AVX2 and with AVX-512). Intrinsics are used only here and in stream.h; without AVX2 gcc vectorises 32-bit words.
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
constexpr int kHalf = sizeof(Vector) / 8;  // elements of a Vector
typedef uint32_t Narrow __attribute__((vector_size(4 * kHalf)));

// two independent vectors: the rounds of one hide the latency of the other
struct Lanes {
  Vector a, b;
};
constexpr int kLanes = 2 * kHalf;

PYFLOW_FN Lanes operator^(const Lanes& x, const Lanes& y) { return {x.a ^ y.a, x.b ^ y.b}; }
PYFLOW_FN Lanes operator^(const Lanes& x, uint64_t y) { return {x.a ^ y, x.b ^ y}; }
PYFLOW_FN Lanes operator>>(const Lanes& x, int bits) { return {x.a >> bits, x.b >> bits}; }
PYFLOW_FN Lanes& operator+=(Lanes& x, uint64_t y) { return x = {x.a + y, x.b + y}; }

// element i is first + i * step
PYFLOW_FN Vector vector_of(uint64_t first, uint64_t step) {
  Vector v{};
  for (int i = 0; i < kHalf; ++i) v[i] = first + uint64_t(i) * step;
  return v;
}

PYFLOW_FN Lanes lanes_of(uint64_t first, uint64_t step) {
  return {vector_of(first, step), vector_of(first + kHalf * step, step)};
}

// products of the low 32 bits of every element with `by`
PYFLOW_FN Vector product(const Vector& words, uint32_t by) {
#if defined(__AVX512F__)
  // masked, because the plain intrinsic triggers a warning inside gcc 12's header
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

// kLanes words, zero-extended
PYFLOW_FN Lanes widen(const uint32_t* from) { return {widen_half(from), widen_half(from + kHalf)}; }

// stores the low 32 bits of every element
PYFLOW_FN void narrow(const Lanes& from, uint32_t* to) {
  const Narrow a = __builtin_convertvector(from.a, Narrow), b = __builtin_convertvector(from.b, Narrow);
  __builtin_memcpy(to, &a, sizeof a);
  __builtin_memcpy(to + kHalf, &b, sizeof b);
}
#endif

}  // namespace pyflow::PYFLOW_ISA
