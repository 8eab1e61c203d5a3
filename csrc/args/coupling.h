// Arguments of the coupling kernels.
#pragma once

#include "../cpu/dispatch.h"
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

PYFLOW_CPU_KERNEL(coupling_forward, CouplingForward)
PYFLOW_CPU_KERNEL(coupling_backward, CouplingBackward)

namespace cuda {
void coupling_forward(const CouplingForward&, Stream);
void coupling_backward(const CouplingBackward&, Stream);
}  // namespace cuda

}  // namespace pyflow
