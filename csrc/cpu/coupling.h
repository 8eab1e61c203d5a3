// Arguments of the coupling kernels; the functions live in one namespace per instruction set.
#pragma once

#include "../ops/coupling.h"
#include "view.h"

namespace pyflow {

struct CouplingArgs {
  Space space;
  Plan plan;
  bool f64;     // compute type: double for float64 x, float for everything else
  bool affine;  // has scale and logdet; else additive
  bool inverse;
  bool shift_first;
  ScaleMap scale_map;  // unused without a scale
  double map_arg;
  View x, shift, scale, mask;  // mask may be absent; true: x passes through
};

struct CouplingForward : CouplingArgs {
  View y;
  void* logdet;     // (rows,) of the compute type, if affine
  double* partial;  // (rows, segments) if a row has several segments, else absent
};

struct CouplingBackward : CouplingArgs {
  View gy, gl;              // either may be absent; gl has row dims only
  View gx, gshift, gscale;  // gshift may be absent
};

}  // namespace pyflow
