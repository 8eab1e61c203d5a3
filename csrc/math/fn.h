// PYFLOW_FN declares scalar functions that C++ and CUDA sources share; basic float helpers.
// static and always inlined: on a CPU each instruction set gets its own copy. A weak symbol shared between translation
// units could carry AVX-512 code into a program that runs on an older CPU.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define PYFLOW_FN static __host__ __device__ __forceinline__
#else
#define PYFLOW_FN static inline __attribute__((always_inline))
#endif

namespace pyflow {

PYFLOW_FN uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t u;
  __builtin_memcpy(&u, &x, sizeof u);
  return u;
#endif
}

PYFLOW_FN float float_of(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float x;
  __builtin_memcpy(&x, &u, sizeof x);
  return x;
#endif
}

PYFLOW_FN float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
PYFLOW_FN double fma_(double a, double b, double c) { return __builtin_fma(a, b, c); }
// a * b + c with one rounding (Fused) or two. A function without fma has the same bits on every backend, including
// Triton's interpreter.
template <bool Fused>
PYFLOW_FN float mul_add(float a, float b, float c) {
  return Fused ? fma_(a, b, c) : a * b + c;
}
PYFLOW_FN float floor_(float x) { return __builtin_floorf(x); }
PYFLOW_FN double floor_(double x) { return __builtin_floor(x); }
PYFLOW_FN float abs_(float x) { return float_of(bits_of(x) & 0x7fffffffu); }
PYFLOW_FN double abs_(double x) { return __builtin_fabs(x); }

// correctly rounded on every backend
PYFLOW_FN float sqrt_(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}
PYFLOW_FN double sqrt_(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

// x >= 0 with the sign of s
PYFLOW_FN float with_sign(float x, float s) { return float_of(bits_of(x) | (bits_of(s) & 0x80000000u)); }

// min(x, limit) for x >= 0, compared as integers: one instruction, where a float minimum that keeps NaN takes several.
// NaN becomes the limit.
PYFLOW_FN float at_most(float x, float limit) {
  const int32_t u = int32_t(bits_of(x)), top = int32_t(bits_of(limit));
  return float_of(uint32_t(u < top ? u : top));
}

}  // namespace pyflow
