// tanh. float, over all floats: tanh_ max 1.5 ulp, tanh_unfused max 2.6 ulp; NaN stays NaN, +-0 stay +-0.
// double: libm.
#pragma once

#include "exp.h"

namespace pyflow {

PYFLOW_FN float tanh_(float x) {
  const float a = abs_(x);
  // a >= 0.55: 1 - 2 / (e^{2a} + 1) is at least 1/2, so the error of e^{2a} counts at most once
  int32_t k;
  const float e = (1.f + expm1_reduced(at_most(2.f * a, 20.f), k)) * pow2(k);
  const float large = 1.f - 2.f / (e + 1.f);
  // a < 0.55: a + a^3 p(a^2)
  const float z = a * a;
  float p = 0.016454307362437248f;
  p = fma_(p, z, -0.05268188938498497f);
  p = fma_(p, z, 0.13320907950401306f);
  p = fma_(p, z, -0.33332955837249756f);
  const float small = fma_(z * a, p, a);
  return with_sign(a >= 0.55f ? large : small, x);  // NaN propagates through the polynomial
}

PYFLOW_FN double tanh_(double x) { return __builtin_tanh(x); }

// without fma: t / (t + 2), t = expm1(2a); fewer operations
PYFLOW_FN float tanh_unfused(float x) {
  const float a = abs_(x);
  int32_t k;
  const float m = expm1_reduced<false>(at_most(2.f * a, 20.f), k);
  const float p = pow2(k);
  const float t = m * p + (p - 1.f);
  return with_sign(a == a ? t / (t + 2.f) : a, x);
}

PYFLOW_FN double tanh_unfused(double x) { return __builtin_tanh(x); }

}  // namespace pyflow
