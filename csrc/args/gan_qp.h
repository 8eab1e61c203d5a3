// Arguments of the GAN-QP kernels.
#pragma once

#include "../cpu/dispatch.h"
#include "../cuda/shared.h"
#include "../ops/gan_qp.h"
#include "../tiles/plan.h"

namespace pyflow {

// sums of the distance terms of two samples
struct GanQpSums {
  Space space;
  Plan plan;
  bool f64;  // compute type: double if any tensor of the call is float64
  Distance distance;
  View real, fake;
  RowSums sums;  // float64 on a CPU
};

// a unit is a row
struct GanQpArgs {
  Plan plan;
  bool f64;
  RowView t_real, t_fake;  // values of the critic
  double lam2, eps;        // lam2 = 2 lam
};

struct GanQpDistance {
  const void* sums;  // (rows), float64 on a CPU, of the compute type on a GPU; null: no latents
  int64_t count;     // elements summed per row
};

struct GanQpLoss : GanQpArgs {
  Distance distance;
  GanQpDistance x, z;
  void *loss, *d;  // (rows) of the compute type
};

struct GanQpLossBackward : GanQpArgs {
  RowView grad, d;
  RowView g_real, g_fake;
};

PYFLOW_CPU_KERNEL(gan_qp_sums, GanQpSums)
PYFLOW_CPU_KERNEL(gan_qp_loss, GanQpLoss)
PYFLOW_CPU_KERNEL(gan_qp_loss_backward, GanQpLossBackward)

namespace cuda {
void gan_qp_sums(const GanQpSums&, Stream);
void gan_qp_loss(const GanQpLoss&, Stream);
void gan_qp_loss_backward(const GanQpLossBackward&, Stream);
}  // namespace cuda

}  // namespace pyflow
