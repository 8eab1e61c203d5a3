// The error function. float: max 1.5 ulp, all floats; NaN stays NaN, +-0 stay +-0. double: libm.
#pragma once

#include "exp.h"

namespace pyflow {

PYFLOW_FN float erf_(float x) {
  const float a = abs_(x), s = a * a;
  // a < 0.93: a + a p(a^2)
  float p = 8.34521561046131e-05f;
  p = fma_(p, s, -0.0008137435070239007f);
  p = fma_(p, s, 0.005200634244829416f);
  p = fma_(p, s, -0.02685927040874958f);
  p = fma_(p, s, 0.11283694207668304f);
  p = fma_(p, s, -0.37612634897232056f);
  p = fma_(p, s, 0.12837916612625122f);
  const float small = fma_(p, a, a);
  // a >= 0.93: 1 - e^{-q(a)}, which is 1 from 4 on
  const float t = at_most(a, 4.f);
  float q = 2.116211544489488e-05f;
  q = fma_(q, t, -0.0004352211835794151f);
  q = fma_(q, t, 0.0041746534407138824f);
  q = fma_(q, t, -0.025128651410341263f);
  q = fma_(q, t, 0.10829398781061172f);
  q = fma_(q, t, 0.6333346366882324f);
  q = fma_(q, t, 1.1295208930969238f);
  q = fma_(q, t, -0.000175877648871392f);
  return with_sign(a >= 0.93f ? 1.f - exp_(-q) : small, x);  // NaN propagates through the polynomial
}

PYFLOW_FN double erf_(double x) { return __builtin_erf(x); }

}  // namespace pyflow
