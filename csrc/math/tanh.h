// tanh. float: max error 1.5 ulp over all floats; NaN stays NaN, +-0 stay +-0. double: libm.
#pragma once

#include "exp.h"

namespace pyflow {

// tanh(x) = m / (m + 2) with m = expm1(2|x|): near 0 the reduction is empty (k = 0) and m is a
// polynomial without constant term, so no second branch is needed for small x
PYFLOW_FN float tanh_(float x) {
  float y = 2.f * abs_(x);
  y = y > 20.f ? 20.f : y;
  int32_t k;
  const float p = expm1_reduced(y, k);
  const float s = pow2(k);
  const float m = fma_(s, p, s - 1.f);
  return copysign_(m / (m + 2.f), x);
}

PYFLOW_FN double tanh_(double x) { return __builtin_tanh(x); }

}  // namespace pyflow
