// Probability P that n random points of a circle lie inside one sector of angle theta: the scalar parts of the formula,
// and a Monte-Carlo trial.
//
// With x = 1 - theta / 2 pi, the points lie inside such a sector if their largest gap is at least x. Stevens 1939:
// P = sum over k >= 1, k x < 1, of (-1)^(k-1) C(n, k) (1 - k x)^(n-1). The sum cancels where its first term is large.
// There, 1 - P = g_n(s) / s^(n-1) with s = 1 / x, g_1 = 1 on [0, 1), g_m(t) = t g_(m-1)(t) + (m - t) g_(m-1)(t - 1).
// g_m is (m - 1)! times the density of a sum of m uniform variables: 0 outside (0, m), symmetric, and every term of the
// recurrence is positive.
#pragma once

#include "../math/double_double.h"
#include "../math/normal.h"

namespace pyflow {

constexpr DoubleDouble kTwoPi = {6.283185307179586, 2.4492935982947064e-16};

struct Sector {
  DoubleDouble share, x;  // theta / 2 pi, and 1 - share
  Scaled first;           // first term of the sum
};

// 0 < theta < 2 pi
PYFLOW_FN Sector sector_of(int64_t n, double theta) {
  Sector s;
  s.x = div(add(two_sum(kTwoPi.hi, -theta), {kTwoPi.lo, 0}), kTwoPi);
  s.share = div({theta, 0}, kTwoPi);
  s.first = mul(power(s.share, n - 1), scaled({double(n), 0}, 0));
  return s;
}

// Whether the sum is safe from cancellation. Term k + 1 is at most first^k / (k + 1)! times the first term: with
// first <= 1/2 nothing cancels and 1 - P is at least 1/2. Otherwise P is at least 3/8.
PYFLOW_FN bool sums_safely(const Sector& s) { return rounded(s.first) <= 0.5; }

// the sum divided by its first term
PYFLOW_FN double leading_sum(const Sector& s, int64_t n) {
  double sum = 1, choices = 1;
  for (int64_t k = 2; k <= n; ++k) {
    const DoubleDouble rest = add(s.share, negated(mul(s.x, {double(k - 1), 0})));
    if (rest.hi <= 0) break;
    choices *= -double(n - k + 1) / double(k);
    const double term = choices * rounded(power(div(rest, s.share), n - 1));
    sum += term;
    if (abs_(term) < 1e-18) break;
  }
  return sum;
}

// The recurrence runs over t - j, j = J to 0, J = floor(t), t <= n / 2. The terms that matter for (n, 0) pass level m
// near j = J - centre(m), where log g_m has slope slope * m / n in t (characteristics of its large deviations). Terms
// more than nine standard deviations away are negligible: a window of about sqrt(n) terms is enough. Within the window,
// powers of two cancel the slope.
struct Path {
  double n, slope;
};

// mean of the density proportional to exp(-slope u) on [0, 1]
PYFLOW_FN double tilted_mean(double slope) { return 1 / slope - __builtin_exp(-slope) / -__builtin_expm1(-slope); }

// the window of level m is centre(m) +- half_width(m)
PYFLOW_FN double centre(const Path& p, double m) { return m * tilted_mean(p.slope * m / p.n); }

PYFLOW_FN double half_width(const Path& p, double m) {
  const double slope = p.slope * m / p.n, left = (p.n - m) / 4;
  const double variance = m / (slope * slope > 12 ? slope * slope : 12);
  return 9.3 * __builtin_sqrt(variance < left ? variance : left) + 16;
}

// doubles of memory for the window of any t
PYFLOW_FN int64_t path_room(int64_t n) { return int64_t(2 * 9.3 * 0.25 * __builtin_sqrt(double(n))) + 128; }

// the path to (n, t): solves tilted_mean(slope) = t / n <= 1/2 by Newton's method
PYFLOW_FN Path path_to(int64_t n, double t) {
  const double mean = t / double(n), y = 1 - 2 * mean;
  constexpr double kLeast = 1e-5;  // tilted_mean divides by the slope
  double slope = 2 * y * (3 - y * y) / (1 - y * y);
  slope = slope > kLeast ? slope : kLeast;
  for (int i = 0; i < 4; ++i) {
    const double e = __builtin_exp(-slope), d = -__builtin_expm1(-slope);
    slope -= (tilted_mean(slope) - mean) / (e / (d * d) - 1 / (slope * slope));
    slope = slope > kLeast ? slope : kLeast;
  }
  return {double(n), slope};
}

// P and 1 - P, each with full relative accuracy
struct Probabilities {
  Scaled inside, outside;
};

// P, its complement, or the logarithm of either
PYFLOW_FN double sector_value(const Probabilities& p, bool complement, bool log) {
  const Scaled &asked = complement ? p.outside : p.inside, &other = complement ? p.inside : p.outside;
  const double value = rounded(asked);
  if (!log) return value;
  if (value > 0.5) return __builtin_log1p(-rounded(other));
  if (asked.value.hi == 0) return -__builtin_inf();
  return __builtin_log(asked.value.hi) + double(asked.exponent) * 0.6931471805599453;
}

// Monte-Carlo trial: the gaps are exponential variables divided by their sum. Block b of trial i uses the words of
// block i * ceil(n / 4) + b of the stream. No fma: the same integers on every backend.

// uniform in (0, 1]
PYFLOW_FN float positive_uniform(uint32_t word) { return (float(word) + 1.f) * 2.3283064365386963e-10f; }

// -log(u) in units of 2^-24, as an integer: a sum does not depend on its order
PYFLOW_FN int32_t fixed_log(float u) { return int32_t(-log_plain(u) * 16777216.f); }

// sum of four exponential variables: one logarithm of the product, clamped to the normal floats
PYFLOW_FN int32_t block_sum(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3) {
  const float p = positive_uniform(w0) * positive_uniform(w1) * (positive_uniform(w2) * positive_uniform(w3));
  return fixed_log(p > 1.17549435e-38f ? p : 1.17549435e-38f);
}

// padding word: adds 0 to the sum and never is the smallest word
constexpr uint32_t kNoWord = 0xffffffffu;

PYFLOW_FN bool gap_reaches(double largest, double sum, double x) { return largest >= x * sum; }

}  // namespace pyflow
