// Arguments of the GAN-QP kernels; the functions live in one namespace per instruction set.
#pragma once

#include "view.h"

namespace pyflow {

// sums of the distance terms per row and segment; units are those of the plan
struct GanQpSums {
  Space space;
  Plan plan;
  bool f64;      // compute type: double if any tensor of the call is float64
  int distance;  // Distance
  View real, fake;
  double* sums;  // (rows, segments)
};

// values of the critic, one per row, stride[0] apart
struct GanQpValues {
  bool f64;
  View t_real, t_fake;
  double lam2, eps;  // lam2 = 2 lam
};

struct GanQpLoss : GanQpValues {
  const GanQpSums* x;
  const GanQpSums* z;  // null without latents
  char* loss;          // loss and d: (rows) of the compute type
  char* d;
};

struct GanQpLossBackward : GanQpValues {
  View grad, d;
  View g_real, g_fake;
};

}  // namespace pyflow
