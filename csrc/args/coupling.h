// Arguments of the coupling kernels.
#pragma once

#include "../cuda/shared.h"
#include "../ops/coupling.h"
#include "../tiles/plan.h"

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
  RowSums logdet;  // if affine
};

struct CouplingBackward : CouplingArgs {
  View gy, gl;              // either may be absent; gl has row dims only
  View gx, gshift, gscale;  // gshift may be absent
};

#define PYFLOW_COUPLING_KERNELS(F)     \
  F(coupling_forward, CouplingForward) \
  F(coupling_backward, CouplingBackward)

namespace cuda {
void coupling_forward(const CouplingForward&, Stream);
void coupling_backward(const CouplingBackward&, Stream);
}  // namespace cuda

}  // namespace pyflow
