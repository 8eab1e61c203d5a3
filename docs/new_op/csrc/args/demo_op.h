// What the kernels of demo_op are given.
#pragma once

#include "../cpu/dispatch.h"
#include "../cuda/shared.h"
#include "../ops/demo_op.h"
#include "../tiles/plan.h"

namespace pyflow {

struct DemoOpArgs {
  Space space;
  Plan plan;
  bool f64;  // compute type: double for float64 x, float for everything else
  double scale, log_scale;
  View x;
};

struct DemoOpForward : DemoOpArgs {
  View y;
  RowSums logdet;
};

struct DemoOpBackward : DemoOpArgs {
  View gy, gl;  // gl has row dims only; absent: zero
  View gx;
};

PYFLOW_CPU_KERNEL(demo_op_forward, DemoOpForward)
PYFLOW_CPU_KERNEL(demo_op_backward, DemoOpBackward)

namespace cuda {
void demo_op_forward(const DemoOpForward&, Stream);
void demo_op_backward(const DemoOpBackward&, Stream);
}  // namespace cuda

}  // namespace pyflow
