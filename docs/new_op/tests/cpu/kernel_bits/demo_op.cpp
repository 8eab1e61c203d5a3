#include "../../../csrc/args/demo_op.h"

#include "common.h"

namespace pyflow {
namespace {

void demo_op(int64_t rows, int64_t cols) {
  auto x = values(rows * cols, 3), gy = values(rows * cols, 1);
  std::vector<float> y(x.size()), gx(x.size());
  DemoOpArgs a{};
  a.space = space(rows, cols);
  a.plan = cpu_plan(a.space, true);
  a.scale = 0.7;
  a.x = view(x, DType::f32, cols);
  a.y = view(y, DType::f32, cols);
  a.gy = view(gy, DType::f32, cols);
  a.gx = view(gx, DType::f32, cols);
  cpu::demo_op_forward(a, 0, a.plan.units);
  cpu::demo_op_backward(a, 0, a.plan.units);
  print("demo_op", y);
  print("demo_op_backward", gx);
}

}  // namespace

PYFLOW_BITS(demo_op) {
  for (const auto& s : kShapes) demo_op(s[0], s[1]);
}

}  // namespace pyflow
