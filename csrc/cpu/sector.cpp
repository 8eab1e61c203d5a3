// Sector probability: the formula of ops/sector.h (a unit is one n and theta), and Monte-Carlo trials (a unit is a
// trial).
#include "../args/sector.h"

#include "draw.h"

namespace pyflow::PYFLOW_ISA {
namespace {

PYFLOW_FN double largest_of(const double* a, int64_t n) {
  double top = 0;
  for (int64_t i = 0; i < n; ++i) top = a[i] > top ? a[i] : top;
  return top;
}

// one level of the recurrence in place: a[i] holds g(t - first - i), and a[i + 1] that of an argument one less
PYFLOW_FN void spline_level(double* __restrict a, int64_t n, double t, int64_t first, double m, double scale) {
  const double top = t - double(first);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const double at = top - double(int32_t(i));
    a[i] = at * a[i] + (m - at) * (scale * a[i + 1]);
  }
}

// g_n(t) of ops/sector.h for 1 <= t <= n / 2
inline Scaled spline(int64_t n, const DoubleDouble& t, double* a) {
  constexpr int64_t kLevels = 8;  // levels per update of the window; g grows by less than a factor n per level
  const Path path = path_to(n, t.hi);
  const int64_t last = int64_t(t.hi);
  int64_t first = last, end = last + 1, exponent = 0, tilt = 0;
  double before = 0;
  a[0] = 1;
  a[1] = 0;
  for (int64_t m = 2; m <= n;) {
    const int64_t stop = smaller(m + kLevels, n + 1);
    const double here = centre(path, double(m)), width = half_width(path, double(m));
    // the window moves towards j = 0
    const int64_t high = int64_t(centre(path, double(stop)) + width) + 1, low = int64_t(here - width);
    const int64_t to = last - high < 0 ? 0 : last - high, moved = to < first ? first - to : 0;
    if (moved > 0) {
      __builtin_memmove(a + moved, a, size_t(end - first) * sizeof(double));
      for (int64_t i = 0; i < moved; ++i) a[i] = 0;
      first = to;
    }
    if (low > 0 && last - low + 1 < end) end = last - low + 1;
    const int64_t size = end - first, middle = last - int64_t(here + 0.5) - first;
    const int64_t wanted = int64_t(path.slope * double(m) / double(n) * 1.4426950408889634 + 0.5);
    if (wanted != tilt) {
      for (int64_t i = 0; i < size; ++i) a[i] = times_two_to(a[i], (wanted - tilt) * (i - middle));
      exponent += (wanted - tilt) * (first + middle);
      tilt = wanted;
    }
    const int64_t top = exponent_of(largest_of(a, size));
    const double down = power_of_two(-top), scale = power_of_two(-tilt);
    for (int64_t i = 0; i < size; ++i) a[i] *= down;
    a[size] = 0;
    exponent += top;
    for (; m < stop; ++m) {
      before = m == n ? a[0] - scale * a[1] : 0;
      spline_level(a, size, t.hi, first, double(m), scale);
    }
  }
  // first-order correction for t.lo
  return scaled({a[0] * (1 + double(n - 1) * before / a[0] * t.lo), 0}, exponent);
}

inline Probabilities probabilities(int64_t n, double theta, double* work) {
  const Scaled zero{{0, 0}, 0}, one{{1, 0}, 0};
  if (theta <= 0) return {zero, one};
  if (theta > kTwoPi.hi) return {one, zero};
  const Sector s = sector_of(n, theta);
  if (sums_safely(s)) {
    const Scaled inside{{s.first.value.hi * leading_sum(s, n), 0}, s.first.exponent};
    return {inside, {{1 - rounded(inside), 0}, 0}};
  }
  const DoubleDouble inverse = div({1, 0}, s.x), rest = add({double(n), 0}, negated(inverse));
  if (rest.hi <= 0) return {one, zero};
  const DoubleDouble t = inverse.hi < rest.hi ? inverse : rest;
  const Scaled g = t.hi < 1 ? power(t, n - 1) : spline(n, t, work), whole = power(inverse, n - 1);
  const Scaled outside{{g.value.hi / whole.value.hi, 0}, g.exponent - whole.exponent};
  return {{{1 - rounded(outside), 0}, 0}, outside};
}

constexpr int kTrials = 128;  // trials at a time

struct TrialBuffer {
  DrawBuffer draw;
  alignas(64) uint32_t low[kTrials];
  alignas(64) int32_t part[kTrials];
  alignas(64) int64_t sum[kTrials];
  alignas(64) double largest[kTrials], total[kTrials];
};

// adds one block of every trial; its words are in the buffer
PYFLOW_FN void add_block(TrialBuffer& b) {
  const uint32_t* __restrict w0 = b.draw.word[0];
  const uint32_t* __restrict w1 = b.draw.word[1];
  const uint32_t* __restrict w2 = b.draw.word[2];
  const uint32_t* __restrict w3 = b.draw.word[3];
  uint32_t* __restrict low = b.low;
  int32_t* __restrict part = b.part;
  int64_t* __restrict sum = b.sum;
#pragma omp simd
  for (int i = 0; i < kTrials; ++i) {
    part[i] = block_sum(w0[i], w1[i], w2[i], w3[i]);
    const uint32_t a = w0[i] < w1[i] ? w0[i] : w1[i], c = w2[i] < w3[i] ? w2[i] : w3[i];
    const uint32_t least = a < c ? a : c;
    low[i] = least < low[i] ? least : low[i];
  }
#pragma omp simd
  for (int i = 0; i < kTrials; ++i) sum[i] += int64_t(part[i]);
}

// runs kTrials trials from number `first` on
inline void run_trials(const SectorTrials& a, uint64_t first, TrialBuffer& b) {
  const uint64_t blocks = uint64_t(a.points + 3) / 4;
  for (int i = 0; i < kTrials; ++i) b.low[i] = kNoWord;
  for (int i = 0; i < kTrials; ++i) b.sum[i] = 0;
  for (uint64_t block = 0; block < blocks; ++block) {
    draw_every(a.stream, seed_of(a.stream, 0), first * blocks + block, blocks, kTrials, b.draw);
    for (int64_t word = a.points - int64_t(4 * block); word < 4; ++word) {
      for (int i = 0; i < kTrials; ++i) b.draw.word[word][i] = kNoWord;
    }
    add_block(b);
  }
#pragma omp simd
  for (int i = 0; i < kTrials; ++i) b.part[i] = fixed_log(positive_uniform(b.low[i]));
  for (int i = 0; i < kTrials; ++i) b.largest[i] = double(b.part[i]);
  for (int i = 0; i < kTrials; ++i) b.total[i] = double(b.sum[i]);
}

}  // namespace

void sector_formula(const SectorFormula& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    a.out[i] = sector_value(probabilities(a.n[i], a.theta[i], a.work), a.complement, a.log);
  }
}

void sector_trials(const SectorTrials& a, int64_t begin, int64_t end) {
  TrialBuffer b;
  for (int64_t first = begin; first < end; first += kTrials) {
    const int live = int(smaller(end - first, kTrials));
    run_trials(a, uint64_t(first), b);
    for (int64_t k = 0; k < a.count; ++k) {
      const double x = a.thresholds[k];
      int64_t hits = 0;
#pragma omp simd reduction(+ : hits)
      for (int i = 0; i < live; ++i) hits += gap_reaches(b.largest[i], b.total[i], x) ? 1 : 0;
      a.counts[k] += hits;
    }
  }
}

}  // namespace pyflow::PYFLOW_ISA
