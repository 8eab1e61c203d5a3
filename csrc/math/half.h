// bfloat16 and float16 to and from float by integer operations, rounding to nearest even
// (gcc 12 does not vectorise _Float16). NaN stays NaN; denormals are kept.
#pragma once

#include "fn.h"

namespace pyflow {

PYFLOW_FN float bf16_to_float(uint16_t h) { return float_of(uint32_t(h) << 16); }

PYFLOW_FN uint16_t float_to_bf16(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u | ((u >> 16) & 0x8000u) : rounded);
}

PYFLOW_FN float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(h & 0x7fffu) << 13;
  // normal: re-bias by 112; denormal: the multiplication renormalises; inf and NaN: set the whole exponent
  const float scaled = float_of(magnitude) * float_of(0x77800000u);  // 2^112
  const uint32_t u = bits_of(scaled);
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u | magnitude : u;
  return float_of(sign | special);
}

PYFLOW_FN uint16_t float_to_half(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  // below 2^-14: adding 0.5 aligns the mantissa, and the addition rounds
  const uint32_t small = bits_of(float_of(a) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (a - 0x38000000u + 0x0fffu + ((a >> 13) & 1u)) >> 13;
  uint32_t h = a < 0x38800000u ? small : normal;
  h = a >= 0x477ff000u ? 0x7c00u : h;
  h = a > 0x7f800000u ? 0x7e00u : h;
  return uint16_t(sign | h);
}

}  // namespace pyflow
