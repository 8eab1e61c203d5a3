#include "../args/flow_head.h"

#include "device.h"

namespace pyflow {
namespace {

using Optional = std::optional<Tensor>;

// call after every view was added to the layout
void plan(FlowHeadArgs& a, Layout& layout, const Tensor& h, int64_t prior, Plan (*plan_of)(const Space&)) {
  a.f64 = is_f64(h);
  a.prior = Prior(prior);
  a.space = layout.merge();
  a.plan = plan_of(a.space);
}

Tensor flow_log_prob(Tensor h, Optional log_scale, int64_t prior) {
  FlowHeadForward a{};
  Layout layout(h, h.dim() - 1);
  layout.add(a.h, h);
  if (log_scale) layout.add_event(a.log_scale, *log_scale);
  plan(a, layout, h, prior, kCuda ? gpu_plan : cpu_head_forward_plan);
  SumTensors sums(a.log_prob, h, &a.space.rows, 1, a.space, a.plan, compute_type(a.f64));
  if (h.numel() > 0) PYFLOW_RUN(flow_head_forward, a, h);
  sums.finish();
  return sums.out;
}

std::tuple<Tensor, Tensor> flow_log_prob_backward(Tensor grad, Tensor h, Optional log_scale, int64_t prior) {
  FlowHeadBackward a{};
  Layout layout(h, h.dim() - 1);
  Tensor gh = new_like(h);
  Tensor glog_scale = log_scale ? new_like(*log_scale) : new_none(h, h.scalar_type());
  layout.add(a.h, h);
  layout.add_output(a.gh, gh);
  layout.add_rows(a.grad, grad);
  if (log_scale) layout.add_event(a.log_scale, *log_scale);
  if (log_scale) layout.add_event(a.glog_scale, glog_scale);
  plan(a, layout, h, prior, kCuda ? gpu_head_backward_plan : cpu_head_backward_plan);
  if (h.numel() == 0) return {gh, torch::stable::zero_(glog_scale)};
  a.block_rows = kCuda ? gpu_block_rows(a.space, a.plan) : kHeadRows;
  const int64_t blocks = ceil_div(a.space.rows, a.block_rows);
  Tensor partial = new_rows(h, log_scale ? blocks * a.space.cols : 0, compute_type(a.f64));
  a.partial = log_scale ? partial.data_ptr() : nullptr;
  PYFLOW_RUN(flow_head_backward, a, h);
  // the CUDA function does both
  if (!kCuda && log_scale) run_units(cpu::flow_head_reduce, a, 0, a.space.cols, grain_of(blocks));
  return {gh, glog_scale};
}

}  // namespace

PYFLOW_OPERATORS(m) {
  m.impl("flow_log_prob", TORCH_BOX(&flow_log_prob));
  m.impl("flow_log_prob_backward", TORCH_BOX(&flow_log_prob_backward));
}

}  // namespace pyflow
