// Double-double arithmetic: a value is the unevaluated sum of two doubles (about 106 bits). Scaled adds a separate
// integer exponent, so powers neither overflow nor underflow.
//   mul, div, add   max relative error 2^-102 (add: with opposite signs, relative to the sum of the magnitudes)
//   power           max relative error n * 2^-101
#pragma once

#include "fn.h"

namespace pyflow {

struct DoubleDouble {
  double hi, lo;
};

PYFLOW_FN DoubleDouble two_sum(double a, double b) {
  const double s = a + b, t = s - a;
  return {s, (a - (s - t)) + (b - t)};
}

PYFLOW_FN DoubleDouble negated(const DoubleDouble& a) { return {-a.hi, -a.lo}; }

PYFLOW_FN DoubleDouble add(const DoubleDouble& a, const DoubleDouble& b) {
  const DoubleDouble high = two_sum(a.hi, b.hi), low = two_sum(a.lo, b.lo);
  const DoubleDouble sum = two_sum(high.hi, high.lo + low.hi);
  return two_sum(sum.hi, sum.lo + low.lo);
}

PYFLOW_FN DoubleDouble mul(const DoubleDouble& a, const DoubleDouble& b) {
  const double p = a.hi * b.hi, error = fma_(a.hi, b.hi, -p);
  return two_sum(p, error + (a.hi * b.lo + a.lo * b.hi));
}

PYFLOW_FN DoubleDouble div(const DoubleDouble& a, const DoubleDouble& b) {
  const double q = a.hi / b.hi;
  DoubleDouble rest = add(a, negated(mul(b, {q, 0})));
  const double next = rest.hi / b.hi;
  rest = add(rest, negated(mul(b, {next, 0})));
  return add(two_sum(q, next), {rest.hi / b.hi, 0});
}

// 2^e; 0 for e < -1022, infinity for e > 1023
PYFLOW_FN double power_of_two(int64_t e) {
  const uint64_t bits = e < -1022 ? 0 : uint64_t((e > 1023 ? 1024 : e) + 1023) << 52;
  double x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// returns e with 2^(e - 1) <= |x| < 2^e, for finite x; for 0 some e <= -1022
PYFLOW_FN int64_t exponent_of(double x) {
  const bool tiny = abs_(x) < 2.2250738585072014e-308;
  const double normal = tiny ? x * 18014398509481984.0 : x;
  uint64_t bits;
  __builtin_memcpy(&bits, &normal, sizeof bits);
  return int64_t(bits >> 52 & 0x7ff) - 1022 - (tiny ? 54 : 0);
}

// value * 2^exponent
struct Scaled {
  DoubleDouble value;
  int64_t exponent;
};

// x * 2^e in three factors: 2^e alone may overflow or underflow
PYFLOW_FN double times_two_to(double x, int64_t e) {
  const int64_t bounded = e < -2100 ? -2100 : e > 2100 ? 2100 : e, half = bounded / 2;
  const int64_t first = half < -1000 ? -1000 : half > 1000 ? 1000 : half, rest = bounded - first;
  const int64_t second = rest < -1000 ? -1000 : rest > 1000 ? 1000 : rest;
  return x * power_of_two(first) * power_of_two(second) * power_of_two(rest - second);
}

// a * 2^exponent, normalised to |value| in [1/2, 1)
PYFLOW_FN Scaled scaled(const DoubleDouble& a, int64_t exponent) {
  const int64_t e = exponent_of(a.hi);
  return {{times_two_to(a.hi, -e), times_two_to(a.lo, -e)}, exponent + e};
}

PYFLOW_FN Scaled mul(const Scaled& a, const Scaled& b) {
  return scaled(mul(a.value, b.value), a.exponent + b.exponent);
}

PYFLOW_FN Scaled power(const DoubleDouble& base, int64_t n) {
  Scaled square = scaled(base, 0), result = scaled({1, 0}, 0);
  for (;;) {
    if (n & 1) result = mul(result, square);
    n >>= 1;
    if (n == 0) return result;
    square = mul(square, square);
  }
}

PYFLOW_FN double rounded(const Scaled& a) { return times_two_to(a.value.hi, a.exponent); }

}  // namespace pyflow
