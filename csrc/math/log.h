// Logarithms and sigmoid. float: max error over the stated range; double: libm.
//   log_      max 0.9 ulp, all positive floats; log(0) = -inf, log(<0) = NaN, NaN stays NaN
//   log1p01   log(1 + e) for 0 <= e <= 1, max 1.5 ulp
//   softplus  log(1 + exp(x)), max 1.7 ulp, all floats
//   sigmoid   1 / (1 + exp(-x)), max 2.4 ulp, all floats
#pragma once

#include "exp.h"

namespace pyflow {

// log(1 + f) - f for sqrt(1/2) - 1 <= f <= sqrt(2) - 1
PYFLOW_FN float log1p_tail(float f) {
  float p = -0.07857371121644974f;
  p = fma_(p, f, 0.1288098394870758f);
  p = fma_(p, f, -0.13129225373268127f);
  p = fma_(p, f, 0.14181305468082428f);
  p = fma_(p, f, -0.1662452220916748f);
  p = fma_(p, f, 0.20002280175685883f);
  p = fma_(p, f, -0.25000810623168945f);
  p = fma_(p, f, 0.33333316445350647f);
  const float f2 = f * f;
  return fma_(f2 * f, p, -0.5f * f2);
}

PYFLOW_FN float log_(float x) {
  const float inf = float_of(0x7f800000u);
  const bool denormal = x < 1.17549435e-38f;
  const float scaled = denormal ? x * 8388608.f : x;
  const int32_t i = int32_t(bits_of(scaled) - 0x3f3504f3u);  // 0x3f3504f3 = sqrt(1/2)
  const float k = float(i >> 23) - (denormal ? 23.f : 0.f);
  const float f = float_of((uint32_t(i) & 0x007fffffu) + 0x3f3504f3u) - 1.f;
  const float tail = fma_(k, kLn2Lo, log1p_tail(f));
  float y = fma_(k, kLn2Hi, f + tail);
  y = x == 0.f ? -inf : y;
  y = x < inf ? y : x;  // inf and NaN pass through
  return x < 0.f ? float_of(0x7fc00000u) : y;
}

PYFLOW_FN double log_(double x) { return __builtin_log(x); }

PYFLOW_FN float log1p01(float e) {
  const bool big = e > 0.41421356f;
  const float f = big ? 0.5f * (e - 1.f) : e;  // (1 + e) / 2 - 1, exact
  const float k = big ? 1.f : 0.f;
  const float tail = fma_(k, kLn2Lo, log1p_tail(f));
  return fma_(k, kLn2Hi, f + tail);
}

PYFLOW_FN double log1p01(double e) { return __builtin_log1p(e); }

template <class T>
PYFLOW_FN T softplus(T x) {
  return (x > T(0) ? x : T(0)) + log1p01(exp_(-abs_(x)));  // NaN propagates through exp
}

template <class T>
PYFLOW_FN T sigmoid(T x) {
  const T e = exp_(-abs_(x));
  return (x < T(0) ? e : T(1)) / (T(1) + e);
}

}  // namespace pyflow
