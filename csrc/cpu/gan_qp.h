// Arguments of the GAN-QP kernels; the functions live in one namespace per instruction set.
#pragma once

#include "view.h"

namespace pyflow {

// units of the plan
struct GanQpSums {
  Space space;
  Plan plan;
  bool f64;      // compute type: double where one of the call's tensors is
  int distance;  // Distance
  View real, fake;
  double* sums;  // (rows, segments)
};

// the critic's values, a row after another stride[0] apart
struct GanQpValues {
  bool f64;
  View t_real, t_fake;
  double lam2, eps;  // 2 lam
};

struct GanQpLoss : GanQpValues {
  const GanQpSums* x;
  const GanQpSums* z;  // null without latents
  char* loss;          // of the compute type, like the distances
  char* d;
};

struct GanQpLossBackward : GanQpValues {
  View grad, d;
  View g_real, g_fake;
};

}  // namespace pyflow
