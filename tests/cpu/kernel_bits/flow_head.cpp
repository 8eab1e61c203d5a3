#include "../../../csrc/args/flow_head.h"

#include "common.h"

namespace pyflow {
namespace {

// without and with the gradient of log_scale
void flow_head(int64_t rows, int64_t cols, Prior prior) {
  const int64_t n = rows * cols;
  auto h = values(n, 3), log_scale = values(cols, 1), grad = values(rows, 1);
  std::vector<float> log_prob, gh(n), glog_scale(cols);
  std::vector<double> partial;
  FlowHeadForward f{};
  f.space = space(rows, cols);
  f.plan = cpu_head_forward_plan(f.space);
  f.prior = prior;
  f.h = view(h, DType::f32, cols);
  f.log_scale = view(log_scale, DType::f32, 0);
  FlowHeadBackward b{};
  static_cast<FlowHeadArgs&>(b) = f;
  b.plan = cpu_head_backward_plan(f.space);
  f.log_prob = row_sums(log_prob, partial, rows, f.plan);
  cpu::flow_head_forward(f, 0, f.plan.units);
  print_sums("flow_log_prob", log_prob, partial);
  b.grad = view(grad, DType::f32, 1);
  b.gh = view(gh, DType::f32, cols);
  b.glog_scale = view(glog_scale, DType::f32, 0);
  b.block_rows = kHeadRows;
  std::vector<float> blocks(ceil_div(rows, kHeadRows) * cols);
  b.partial = blocks.data();
  cpu::flow_head_backward(b, 0, b.plan.units);
  cpu::flow_head_reduce(b, 0, cols);
  print("flow_log_prob_grad_h", gh);
  print("flow_log_prob_grad_log_scale", glog_scale);
}

}  // namespace

PYFLOW_BITS(flow_head) {
  for (const auto& s : kShapes) {
    for (int prior = 0; prior < 2; ++prior) flow_head(s[0], s[1], Prior(prior));
  }
}

}  // namespace pyflow
