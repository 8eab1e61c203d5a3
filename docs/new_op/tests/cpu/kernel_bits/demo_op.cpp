#include "../../../csrc/args/demo_op.h"

#include "common.h"

namespace pyflow {
namespace {

void demo_op(int64_t rows, int64_t cols) {
  auto x = values(rows * cols, 3), gy = values(rows * cols, 1), gl = values(rows, 1);
  std::vector<float> y(x.size()), logdet, gx(x.size());
  std::vector<double> partial;
  DemoOpForward f{};
  f.space = space(rows, cols);
  f.plan = cpu_plan(f.space, true);
  f.scale = 0.7;
  f.log_scale = std::log(f.scale);
  f.x = view(x, DType::f32, cols);
  DemoOpBackward b{};
  static_cast<DemoOpArgs&>(b) = f;
  f.y = view(y, DType::f32, cols);
  f.logdet = row_sums(logdet, partial, rows, f.plan);
  cpu::demo_op_forward(f, 0, f.plan.units);
  b.gy = view(gy, DType::f32, cols);
  b.gl = view(gl, DType::f32, 1);
  b.gx = view(gx, DType::f32, cols);
  cpu::demo_op_backward(b, 0, b.plan.units);
  print("demo_op", y);
  print_sums("demo_op_logdet", logdet, partial);
  print("demo_op_backward", gx);
}

}  // namespace

PYFLOW_BITS(demo_op) {
  for (const auto& s : kShapes) demo_op(s[0], s[1]);
}

}  // namespace pyflow
