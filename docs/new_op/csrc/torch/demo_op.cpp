#include "../args/demo_op.h"

#include "device.h"

namespace pyflow {
namespace {

// rows are split on a CPU, columns on a GPU
Layout layout_of(const Tensor& x) { return Layout(x, x.dim() > 1 ? x.dim() - 1 : kCuda ? x.dim() : 0); }

// adds the result, which is like x, and plans the call
Tensor plan(DemoOpArgs& a, Layout& layout, View& view, const Tensor& x, double scale) {
  Tensor out = new_like(x);
  layout.add(a.x, x);
  layout.add(view, out);
  view.stream = streams(out);
  a.f64 = is_f64(x);
  a.scale = scale;
  a.space = layout.merge();
  a.plan = plan_of(a.space, layout.flat());
  return out;
}

Tensor demo_op(Tensor x, double scale) {
  DemoOpArgs a{};
  Layout layout = layout_of(x);
  Tensor y = plan(a, layout, a.y, x, scale);
  if (x.numel() > 0) PYFLOW_RUN(demo_op_forward, a, x);
  return y;
}

Tensor demo_op_backward(Tensor grad, Tensor x, double scale) {
  DemoOpArgs a{};
  Layout layout = layout_of(x);
  layout.add(a.gy, grad);
  Tensor gx = plan(a, layout, a.gx, x, scale);
  if (x.numel() > 0) PYFLOW_RUN(demo_op_backward, a, x);
  return gx;
}

}  // namespace

PYFLOW_OPERATORS(m) {
  m.impl("demo_op", TORCH_BOX(&demo_op));
  m.impl("demo_op_backward", TORCH_BOX(&demo_op_backward));
}

}  // namespace pyflow
