// Uniform and normal floats from random 32-bit words. No fma and a correctly rounded square root: plain torch, the
// Triton interpreter and every binary give the same bits.
//   log_plain   max 0.9 ulp, positive normal floats only
//   radius      sqrt(-2 ln u), max 1.0 ulp for the float u made from the word
//   box_muller  tails to 6.66 standard deviations
#pragma once

#include "philox.h"
#include "sincos.h"

namespace pyflow {

// a multiple of 2^-24 in [0, 1)
PYFLOW_FN float uniform(uint32_t word) { return float(int32_t(word >> 8)) * 5.9604644775390625e-8f; }

PYFLOW_FN float log_plain(float x) {
  const int32_t i = int32_t(bits_of(x) - 0x3f3504f3u);  // 0x3f3504f3 = sqrt(1/2)
  const float k = float(i >> 23);
  const float f = float_of((uint32_t(i) & 0x007fffffu) + 0x3f3504f3u) - 1.f;
  float p = f * -0.07857371121644974f + 0.1288098394870758f;
  p = p * f + -0.13129225373268127f;
  p = p * f + 0.14181305468082428f;
  p = p * f + -0.1662452220916748f;
  p = p * f + 0.20002280175685883f;
  p = p * f + -0.25000810623168945f;
  p = p * f + 0.33333316445350647f;
  const float f2 = f * f;
  const float tail = f2 * f * p + -0.5f * f2;
  // k * 0.693145752 is exact
  return k * 0.693145752f + (f + (k * 1.42860677e-6f + tail));
}

// uses all 32 bits of the word: with 24 bits the tail would end at 5.77 standard deviations
PYFLOW_FN float radius(uint32_t word) {
  return sqrt_(-2.f * log_plain((float(word) + 1.f) * 2.3283064365386963e-10f));  // 2^-32
}

struct Pair {
  float even, odd;
};

PYFLOW_FN Pair box_muller(uint32_t even, uint32_t odd) {
  const float r = radius(even);
  const SinCos t = sincos_turns(odd >> 8);
  return {r * t.cos, r * t.sin};
}

}  // namespace pyflow
