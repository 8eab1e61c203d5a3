// sin and cos of a random angle. float, no fma: max error 1.6 ulp over all 2^24 angles, also near the zeros; exact at
// multiples of a quarter turn.
#pragma once

#include "fn.h"

namespace pyflow {

struct SinCos {
  float sin, cos;
};

// sin and cos of 2 pi turn / 2^24, turn < 2^24
PYFLOW_FN SinCos sincos_turns(uint32_t turn) {
  // nearest quarter turn, and the exact remainder in [-1/8, 1/8] of a turn
  const uint32_t quarter = (turn + 0x200000u) >> 22;
  const float r = float(int32_t(turn - (quarter << 22))) * 5.9604644775390625e-8f;  // 2^-24
  const float s = r * r;
  float p = s * -75.87133026123047f + 81.6053695678711f;
  p = s * p + -41.34176254272461f;
  p = s * p + 6.2831854820251465f;
  const float sine = r * p;
  float q = s * 58.07190704345703f + -85.41180419921875f;
  q = s * q + 64.93907928466797f;
  q = s * q + -19.739208221435547f;
  const float cosine = s * q + 1.f;
  const bool swapped = (quarter & 1u) != 0;
  const float a = swapped ? cosine : sine, b = swapped ? sine : cosine;
  return {float_of(bits_of(a) ^ ((quarter & 2u) << 30)), float_of(bits_of(b) ^ (((quarter + 1u) & 2u) << 30))};
}

}  // namespace pyflow
