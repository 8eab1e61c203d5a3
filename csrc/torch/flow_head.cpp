#include "../cpu/flow_head.h"

#include "../cpu/dispatch.h"
#include "tensor.h"

namespace pyflow {
namespace {

// merges the layout, to which every view was added, and splits the work; returns the number of units
int64_t cut(FlowHeadArgs& a, Layout& layout, const Tensor& h, int64_t prior) {
  a.f64 = h.scalar_type() == ScalarType::Double;
  a.prior = int(prior);
  a.space = layout.merge();
  a.segments = a.space.cols > kHeadSegment ? (a.space.cols + kHeadSegment - 1) / kHeadSegment : 1;
  return (a.space.rows + kHeadRows - 1) / kHeadRows * a.segments;
}

Tensor flow_log_prob(Tensor h, std::optional<Tensor> log_scale, int64_t prior) {
  FlowHeadForward a{};
  Layout layout(h, h.dim() - 1);
  layout.add(a.h, h);
  if (log_scale) layout.add_event(a.log_scale, *log_scale);
  const int64_t units = cut(a, layout, h, prior);
  const int64_t rows = a.space.rows;
  const int64_t count = rows * a.segments;
  Tensor partial = new_empty(h, &count, 1, ScalarType::Double);
  a.partial = (double*)partial.data_ptr();
  const auto kernel = cpu_table()->flow_head_forward;
  torch::stable::parallel_for(0, units, grain_of(kHeadRows * a.space.cols),
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  Tensor out = new_empty(h, &rows, 1, a.f64 ? ScalarType::Double : ScalarType::Float);
  for (int64_t r = 0; r < rows; ++r) {
    double total = a.partial[r * a.segments];
    for (int64_t i = 1; i < a.segments; ++i) total += a.partial[r * a.segments + i];
    a.f64 ? ((double*)out.data_ptr())[r] = total : ((float*)out.data_ptr())[r] = float(total);
  }
  return out;
}

std::tuple<Tensor, Tensor> flow_log_prob_backward(Tensor grad, Tensor h, std::optional<Tensor> log_scale,
                                                  int64_t prior) {
  FlowHeadBackward a{};
  Layout layout(h, h.dim() - 1);
  const int64_t none = 0;
  Tensor gh = new_like(h);
  Tensor glog_scale = log_scale ? new_like(*log_scale) : new_empty(h, &none, 1, h.scalar_type());
  layout.add(a.h, h);
  layout.add(a.gh, gh);
  a.gh.stream = streams(gh);
  layout.add_rows(a.grad, grad);
  if (log_scale) layout.add_event(a.log_scale, *log_scale);
  if (log_scale) layout.add_event(a.glog_scale, glog_scale);
  const int64_t units = cut(a, layout, h, prior);
  const int64_t count = log_scale ? (a.space.rows + kHeadRows - 1) / kHeadRows * a.space.cols : 0;
  Tensor partial = new_empty(h, &count, 1, a.f64 ? ScalarType::Double : ScalarType::Float);
  a.partial = log_scale ? (char*)partial.data_ptr() : nullptr;
  const CpuTable& cpu = *cpu_table();
  if (h.numel() > 0) {
    torch::stable::parallel_for(0, units, grain_of(kHeadRows * a.space.cols),
                                [&](int64_t begin, int64_t end) { cpu.flow_head_backward(a, begin, end); });
  }
  if (log_scale) {
    torch::stable::parallel_for(0, a.space.cols, grain_of(count / (a.space.cols > 0 ? a.space.cols : 1)),
                                [&](int64_t begin, int64_t end) { cpu.flow_head_reduce(a, begin, end); });
  }
  return {gh, glog_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyflow, CPU, m) {
  m.impl("flow_log_prob", TORCH_BOX(&flow_log_prob));
  m.impl("flow_log_prob_backward", TORCH_BOX(&flow_log_prob_backward));
}

}  // namespace pyflow
