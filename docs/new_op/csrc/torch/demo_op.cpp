#include "../args/demo_op.h"

#include <cmath>

#include "device.h"

namespace pyflow {
namespace {

using Optional = std::optional<Tensor>;

// adds x and sets what both operators share
void set_arguments(DemoOpArgs& a, Layout& layout, const Tensor& x, double scale) {
  layout.add(a.x, x);
  a.f64 = is_f64(x);
  a.scale = scale;
  a.log_scale = std::log(scale);
}

std::tuple<Tensor, Tensor> demo_op(Tensor x, double scale, int64_t event_dims) {
  DemoOpForward a{};
  Layout layout(x, event_dims);
  set_arguments(a, layout, x, scale);
  Tensor y = new_like(x);
  layout.add_output(a.y, y);
  plan(a, layout);
  SumTensors logdet(a.logdet, x, x.sizes().data(), x.dim() - event_dims, a.space, a.plan, compute_type(a.f64));
  if (x.numel() > 0) PYFLOW_RUN(demo_op_forward, a, x);
  logdet.finish();
  return {y, logdet.out};
}

Tensor demo_op_backward(Optional gy, Optional gl, Tensor x, double scale, int64_t event_dims) {
  DemoOpBackward a{};
  Layout layout(x, event_dims);
  set_arguments(a, layout, x, scale);
  Tensor gx = new_like(x);
  if (gy) layout.add(a.gy, *gy);
  if (gl) layout.add_rows(a.gl, *gl);
  layout.add_output(a.gx, gx);
  plan(a, layout);
  if (x.numel() > 0) PYFLOW_RUN(demo_op_backward, a, x);
  return gx;
}

}  // namespace

PYFLOW_OPERATORS(m) {
  m.impl("demo_op", TORCH_BOX(&demo_op));
  m.impl("demo_op_backward", TORCH_BOX(&demo_op_backward));
}

}  // namespace pyflow
