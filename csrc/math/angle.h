// sin and cos of any angle. float: max error 1.6 ulp for |x| <= 1e5, absolute error |x| 1e-16 beyond that, up to 1e9;
// always within [-1, 1]; NaN for infinity. double: libm.
#pragma once

#include "fn.h"

namespace pyflow {

template <class T>
struct Angle {
  T sin, cos;
};

PYFLOW_FN Angle<float> angle(float x) {
  // the nearest multiple of pi / 2, by an addition that leaves no fraction, and the rest in [-pi/4, pi/4]
  const double turn = fma_(double(x), 0.63661977236758134308, 6755399441055744.0), k = turn - 6755399441055744.0;
  uint64_t word;
  __builtin_memcpy(&word, &turn, sizeof word);
  const uint32_t quarter = uint32_t(word);
  const float rest = float(fma_(k, -1.57079632679489661923, double(x)));
  const float r = with_sign(rest == rest ? at_most(abs_(rest), 0.8f) : rest, rest), s = r * r;
  float p = -0.00019515296f;
  p = fma_(p, s, 0.0083321608736f);
  p = fma_(p, s, -0.16666654611f);
  const float sine = fma_(r * s, p, r);
  float q = 2.443315711809948e-5f;
  q = fma_(q, s, -0.001388731625493765f);
  q = fma_(q, s, 0.04166664568298827f);
  q = fma_(q, s, -0.5f);
  const float cosine = fma_(q, s, 1.f);
  const bool swapped = (quarter & 1u) != 0;
  const float a = swapped ? cosine : sine, b = swapped ? sine : cosine;
  return {float_of(bits_of(a) ^ ((quarter & 2u) << 30)), float_of(bits_of(b) ^ (((quarter + 1u) & 2u) << 30))};
}

PYFLOW_FN Angle<double> angle(double x) { return {__builtin_sin(x), __builtin_cos(x)}; }

}  // namespace pyflow
