// Arguments of the kernels of SDE steps.
#pragma once

#include "../cpu/dispatch.h"
#include "../ops/sde.h"
#include "noise.h"

namespace pyflow {

struct SdeArgs {
  Space space;
  Plan plan;
  bool f64;  // compute type: double for float64 x, float for everything else
  RandomStream stream;
  View x, score, noise;     // loss: x is the prediction; absent noise is drawn from the stream
  bool score_given;         // loss: the prediction is a score, and c is used
  RowView a, b, c;          // coefficients; loss: c is std, a the gradient
  View y, mean;             // forward
  View gy, gmean;           // backward, either may be absent
  View gx, gscore, gnoise;  // absent if not needed
  RowSums sums;             // backward: gradients of a, b and c; absent if not needed
};

PYFLOW_CPU_KERNEL(sde_step, SdeArgs)
PYFLOW_CPU_KERNEL(sde_step_backward, SdeArgs)
PYFLOW_CPU_KERNEL(denoising_loss, SdeArgs)
PYFLOW_CPU_KERNEL(langevin_squares, SdeArgs)

namespace cuda {
void sde_step(const SdeArgs&, Stream);
void sde_step_backward(const SdeArgs&, Stream);
void denoising_loss(const SdeArgs&, Stream);
void langevin_squares(const SdeArgs&, Stream);
}  // namespace cuda

}  // namespace pyflow
