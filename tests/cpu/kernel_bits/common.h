// Shared by the files of the program kernel_bits: fixed inputs, and a line `case word word ...` per result.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "../../../csrc/args/noise.h"

namespace pyflow {

// family -> the function that prints the results of its kernels; main calls all, in alphabetical order
inline std::map<std::string, void (*)()>& families() {
  static std::map<std::string, void (*)()> all;
  return all;
}

// PYFLOW_BITS(family) { ... } prints the results of a family's kernels
#define PYFLOW_BITS(family)                                                              \
  static void family##_bits();                                                           \
  static const bool family##_listed = families().emplace(#family, family##_bits).second; \
  static void family##_bits()

inline uint32_t state = 1;

inline float uniform() {  // [-1, 1)
  state = state * 1664525u + 1013904223u;
  return float(int32_t(state)) * 0x1p-31f;
}

// whether `values` holds special ones; main runs a family that uses `values` again without, because a sum with NaN in
// it compares nothing
inline bool specials = true, used_values = false;

// ordinary values, every 37th a special one
inline std::vector<float> values(int64_t n, float range) {
  used_values = true;
  const float inf = std::numeric_limits<float>::infinity();
  const float special[] = {0.f,   -0.f,   1e-40f, -1e-40f, 1e-20f, 88.f, -88.f,
                           104.f, -104.f, 1e30f,  -1e30f,  inf,    -inf, NAN};
  std::vector<float> v(n);
  for (int64_t i = 0; i < n; ++i) v[i] = specials && i % 37 == 5 ? special[i / 37 % 14] : range * uniform();
  return v;
}

// every NaN prints alike: payloads may differ
inline uint64_t word(float v) { return v != v ? 0x7fc00000u : bits_of(v); }

inline uint64_t word(double v) {
  uint64_t w = 0x7ff8000000000000u;
  if (v == v) std::memcpy(&w, &v, sizeof w);
  return w;
}

template <class T>
void print(const char* name, const std::vector<T>& v) {
  std::printf("%s%s", specials ? "" : "ordinary:", name);
  for (T x : v) std::printf(" %llx", (unsigned long long)word(x));
  std::printf("\n");
}

template <class T>
View view(std::vector<T>& v, DType dtype, int64_t cols) {
  View w;
  w.data = (char*)v.data();
  w.dtype = dtype;
  w.stride[0] = cols;
  w.stride[1] = 1;
  return w;
}

inline Space space(int64_t rows, int64_t cols) {
  Space s;
  s.row_dims = s.col_dims = 1;
  s.size[0] = s.rows = rows;
  s.size[1] = s.cols = cols;
  return s;
}

inline RowView row_view(std::vector<float>& v) {
  RowView r;
  r.view = view(v, DType::f32, 1);
  return r;
}

// sums in `out`, or those of several segments in `partial`
template <class T>
RowSums row_sums(std::vector<T>& out, std::vector<double>& partial, int64_t rows, const Plan& p) {
  out.resize(rows);
  partial.resize(p.segments > 1 ? rows * p.segments : 0);
  return {out.data(), partial.empty() ? nullptr : partial.data()};
}

// the sums of all segments, where there are several
inline void add_segments(const std::vector<double>& partial, int64_t segments, std::vector<float>& out) {
  for (int64_t r = 0; r * segments < int64_t(partial.size()); ++r) {
    double total = 0;
    for (int64_t i = 0; i < segments; ++i) total += partial[r * segments + i];
    out[r] = float(total);
  }
}

inline void print_sums(const char* name, const std::vector<float>& out, const std::vector<double>& partial) {
  partial.empty() ? print(name, out) : print(name, partial);
}

inline RandomStream stream(std::vector<int64_t>& seeds, bool per_row) {
  for (size_t i = 0; i < seeds.size(); ++i) seeds[i] = int64_t(i) * 0x123456789abcdef - 7;
  return {{per_row ? seeds.data() : nullptr, seeds[0]}, {nullptr, (int64_t(1) << 40) + 3}, per_row ? 1 : 0, per_row, 2};
}

// several short rows per unit, a row of several chunks, rows of several segments
constexpr int64_t kShapes[][2] = {{40, 31}, {1, 1037}, {2, kSegment + 5}};

}  // namespace pyflow
