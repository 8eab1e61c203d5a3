#include "../args/energy.h"

#include "random.h"

namespace pyflow {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> mala_accept(Tensor z, Tensor z_new, Tensor u, Tensor u_new, Tensor grad,
                                                       Tensor grad_new, Tensor alpha, Tensor seed, Tensor step) {
  MalaArgs a{};
  Layout layout(z, z.dim() - 1);
  const int64_t rows = z.size(0);
  Tensor z_out = new_like(z), u_out = new_like(u), grad_out = new_like(grad);
  Tensor accepted = new_rows(z, rows, ScalarType::Bool);
  if (rows == 0) return {z_out, u_out, grad_out, accepted};
  for (const Tensor* t : {&z, &z_new, &u, &u_new, &grad, &grad_new}) a.f64 = a.f64 || is_f64(*t);
  layout.add(a.z, z);
  layout.add(a.z_new, z_new);
  layout.add(a.grad, grad);
  layout.add(a.grad_new, grad_new);
  layout.add_output(a.z_out, z_out);
  layout.add_output(a.grad_out, grad_out);
  a.alpha = row_view(alpha);
  a.u = row_view(u);
  a.u_new = row_view(u_new);
  a.u_out = row_view(u_out);
  a.accepted = (uint8_t*)accepted.data_ptr();
  a.stream = random_stream(seed, step, Purpose::accept);
  plan(a, layout);
  std::optional<SumTensors> log_ratio;
  if (a.plan.segments > 1) {
    log_ratio.emplace(a.log_ratio, z, &rows, 1, a.space, a.plan, compute_type(a.f64));
    PYFLOW_RUN(mala_sums, a, z);
    log_ratio->finish();
  }
  PYFLOW_RUN(mala_accept, a, z);
  return {z_out, u_out, grad_out, accepted};
}

Tensor grad_norm_penalty(Tensor grad) {
  SquaresArgs a{};
  Layout layout(grad, grad.dim() - 1);
  a.f64 = is_f64(grad);
  layout.add(a.x, grad);
  plan(a, layout);
  SumTensors squares(a.squares, grad, &a.space.rows, 1, a.space, a.plan, compute_type(a.f64));
  if (grad.numel() > 0) PYFLOW_RUN(row_squares, a, grad);
  squares.finish();
  return squares.out;
}

}  // namespace

PYFLOW_OPERATORS(m) {
  m.impl("mala_accept", TORCH_BOX(&mala_accept));
  m.impl("grad_norm_penalty", TORCH_BOX(&grad_norm_penalty));
}

}  // namespace pyflow
