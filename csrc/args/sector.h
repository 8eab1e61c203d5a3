// Arguments of the sector kernels.
#pragma once

#include "../cpu/dispatch.h"
#include "../ops/sector.h"
#include "noise.h"

namespace pyflow {

// called by csrc/host/exports.cpp only
struct SectorFormula {
  const int64_t* n;
  const double* theta;
  bool complement, log;
  double* work;  // path_room doubles for the largest n
  double* out;
};

// counts[k] = number of trials (CPU: adds those in [begin, end)) whose largest gap is at least thresholds[k]
struct SectorTrials {
  const double* thresholds;
  int64_t count;
  int64_t points, trials;
  RandomStream stream;
  int64_t* counts;
};

PYFLOW_CPU_KERNEL(sector_formula, SectorFormula)
PYFLOW_CPU_KERNEL(sector_trials, SectorTrials)

namespace cuda {
void sector_trials(const SectorTrials&, Stream);
}

}  // namespace pyflow
