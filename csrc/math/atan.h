// atan. float: max error 1.6 ulp over all floats; NaN stays NaN, atan(+-inf) = +-pi/2. double: libm.
#pragma once

#include "fn.h"

namespace pyflow {

PYFLOW_FN float atan_(float x) {
  const float a = abs_(x);
  const bool large = a > 1.f;
  const float z = large ? -1.f / a : a;  // atan(a) = pi/2 + atan(-1/a)
  const float z2 = z * z;
  float p = -0.0018272094892200563f;
  p = fma_(p, z2, 0.01106442604213953f);
  p = fma_(p, z2, -0.03145567327737808f);
  p = fma_(p, z2, 0.058234523981809616f);
  p = fma_(p, z2, -0.08419457823038101f);
  p = fma_(p, z2, 0.10957575589418411f);
  p = fma_(p, z2, -0.1426524519920349f);
  p = fma_(p, z2, 0.19998638331890106f);
  p = fma_(p, z2, -0.33333301544189453f);
  const float y = fma_(z2 * z, p, z);
  // pi/2 as the sum of two floats
  return with_sign(large ? 1.57079637f + (y - 4.37113883e-8f) : y, x);
}

PYFLOW_FN double atan_(double x) { return __builtin_atan(x); }

}  // namespace pyflow
