// float64 sums in sixteen lanes with the fold of lane_sum: the same bits for every vector width.
#pragma once

#include "tile.h"

namespace pyflow::PYFLOW_ISA {

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
