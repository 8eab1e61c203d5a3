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
  double scale;
  View x;
  View y;       // forward
  View gy, gx;  // backward
};

PYFLOW_CPU_KERNEL(demo_op_forward, DemoOpArgs)
PYFLOW_CPU_KERNEL(demo_op_backward, DemoOpArgs)

namespace cuda {
void demo_op_forward(const DemoOpArgs&, Stream);
void demo_op_backward(const DemoOpArgs&, Stream);
}  // namespace cuda

}  // namespace pyflow
