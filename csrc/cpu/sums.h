// float64 sums in sixteen lanes with the fold of lane_sum: the same bits for every vector width.
#pragma once

#include "tile.h"

namespace pyflow::PYFLOW_ISA {

// the sum over [begin, end), where add(lane, i) returns a lane with the value at i added
template <class F>
PYFLOW_FN double sum_lanes(int64_t begin, int64_t end, F add) {
  double lane[16] = {};
  int64_t i = begin;
  for (; i + 16 <= end; i += 16) {
    for (int j = 0; j < 16; ++j) lane[j] = add(lane[j], i + j);
  }
  for (int j = 0; i + j < end; ++j) lane[j] = add(lane[j], i + j);
  return lane_sum(lane, 16);
}

// returns the sum of n values, and adds each value to its column sum; n is a multiple of 16
template <class T>
double add_row(const T* __restrict value, double* __restrict column, int64_t n) {
  double lane[16] = {};
  for (int64_t i = 0; i < n; i += 16) {
#pragma omp simd
    for (int j = 0; j < 16; ++j) {
      const double v = double(value[i + j]);
      lane[j] += v;
      column[i + j] += v;
    }
  }
  return lane_sum(lane, 16);
}

}  // namespace pyflow::PYFLOW_ISA
