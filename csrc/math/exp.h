// e^x and e^x - shift. float below; double: libm.
//   exp_, exp_unfused   all floats: max 1.1 ulp with and without fma, denormal results included. exp(NaN) = NaN,
//                       overflow to inf above 88.7228, underflow to 0 below -103.9721
//   exp_less            x <= 0, shift 0 or 1: max 1.1 ulp down to x = -87, the value at -87 below; NaN stays NaN
#pragma once

#include "fn.h"

namespace pyflow {

constexpr float kLog2e = 1.44269504f;
constexpr float kLn2Hi = 0.693145752f;  // 17 bits: k * kLn2Hi is exact
constexpr float kLn2Lo = 1.42860677e-6f;
constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even

// splits x = k ln2 + r with |r| <= ln2 / 2; returns expm1(r) and sets k
template <bool Fused = true>
PYFLOW_FN float expm1_reduced(float x, int32_t& k) {
  const float shifted = mul_add<Fused>(x, kLog2e, kRound);
  const float kf = shifted - kRound;
  k = int32_t(bits_of(shifted) - bits_of(kRound));
  float r = mul_add<Fused>(kf, -kLn2Hi, x);
  r = mul_add<Fused>(kf, -kLn2Lo, r);
  float q = 0.0013946447288617492f;
  q = mul_add<Fused>(q, r, 0.008366581983864307f);
  q = mul_add<Fused>(q, r, 0.04166628047823906f);
  q = mul_add<Fused>(q, r, 0.1666654348373413f);
  q = mul_add<Fused>(q, r, 0.5f);
  return mul_add<Fused>(r * r, q, r);
}

// 2^k, -126 <= k <= 127
PYFLOW_FN float pow2(int32_t k) { return float_of(uint32_t(k + 127) << 23); }

template <bool Fused>
PYFLOW_FN float exp_as(float x) {
  int32_t k;
  const float p = 1.f + expm1_reduced<Fused>(with_sign(at_most(abs_(x), 104.f), x), k);
  // two power-of-two factors: neither overflows, and a denormal result is rounded once
  const int32_t half = k >> 1;
  const float y = p * pow2(half) * pow2(k - half);
  return x == x ? y : x;
}

PYFLOW_FN float exp_(float x) { return exp_as<true>(x); }
PYFLOW_FN float exp_unfused(float x) { return exp_as<false>(x); }

// e^x - shift for x <= 0: the value of an rbf or laplacian kernel K (shift 0) or K - 1 (shift 1).
// x < -87 is clamped to -87, where e^x = 1.6e-38, so 2^k stays a normal number.
PYFLOW_FN float exp_less(float x, float shift) {
  int32_t k;
  const float p = expm1_reduced(x < -87.f ? -87.f : x, k);
  const float scale = pow2(k);
  return fma_(scale, p, scale - shift);
}

PYFLOW_FN double exp_less(double x, double shift) { return shift != 0 ? __builtin_expm1(x) : __builtin_exp(x); }

PYFLOW_FN double exp_(double x) { return __builtin_exp(x); }
PYFLOW_FN double exp_unfused(double x) { return __builtin_exp(x); }

}  // namespace pyflow
