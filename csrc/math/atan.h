// atan. float: max error 1.5 ulp over all floats; NaN stays NaN, atan(+-inf) = +-pi/2. double: libm.
#pragma once

#include "fn.h"

namespace pyflow {

PYFLOW_FN float atan_(float x) {
  const float a = abs_(x);
  const bool large = a > 2.41421356f;   // tan(3 pi / 8)
  const bool middle = a > 0.41421356f;  // tan(pi / 8)
  // atan(a) = base + atan(z) with |z| <= tan(pi / 8)
  const float num = large ? -1.f : (middle ? a - 1.f : a);
  const float den = large ? a : (middle ? a + 1.f : 1.f);
  const float z = num / den;
  const float base = large ? 1.57079637f : (middle ? 0.785398185f : 0.f);
  const float base_lo = large ? -4.37113883e-8f : (middle ? -2.18556941e-8f : 0.f);
  const float z2 = z * z;
  float p = -0.06083450838923454f;
  p = fma_(p, z2, 0.10596000403165817f);
  p = fma_(p, z2, -0.14243848621845245f);
  p = fma_(p, z2, 0.19998489320278168f);
  p = fma_(p, z2, -0.33333316445350647f);
  return copysign_(base + (fma_(z2 * z, p, z) + base_lo), x);
}

PYFLOW_FN double atan_(double x) { return __builtin_atan(x); }

}  // namespace pyflow
