// Arguments of the sector kernels; the functions live in one namespace per instruction set.
#pragma once

#include "../ops/sector.h"
#include "noise.h"

namespace pyflow {

struct SectorFormula {
  const int64_t* n;
  const double* theta;
  bool complement, log;
  double* work;  // path_room doubles for the largest n
  double* out;
};

// counts[k] += number of trials in [begin, end) whose largest gap is at least thresholds[k]
struct SectorTrials {
  const double* thresholds;
  int64_t count;
  int64_t points;
  Stream stream;
  int64_t* counts;
};

}  // namespace pyflow
