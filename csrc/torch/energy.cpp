#include "../cpu/energy.h"

#include "../cpu/dispatch.h"
#include "noise.h"

namespace pyflow {
namespace {

constexpr int64_t kAccept = 3;  // noise purpose of the accept uniforms

// 0-d, or one value per row
void set_rows(View& view, const Tensor& t) {
  view.data = (char*)t.data_ptr();
  view.dtype = dtype_of(t);
  view.stride[0] = t.dim() > 0 ? t.stride(0) : 0;
}

void add_output(View& view, Layout& layout, const Tensor& out) {
  layout.add(view, out);
  view.stream = streams(out);
}

Tensor new_partial(const Tensor& like, const Space& space, const Plan& plan) {
  const int64_t count = space.rows * plan.segments;
  return new_empty(like, &count, 1, ScalarType::Double);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mala_accept(Tensor z, Tensor z_new, Tensor u, Tensor u_new, Tensor grad,
                                                       Tensor grad_new, Tensor alpha, Tensor seed, Tensor step) {
  MalaArgs a{};
  Layout layout(z, z.dim() - 1);
  const int64_t rows = z.size(0);
  Tensor z_out = new_like(z), u_out = new_like(u), grad_out = new_like(grad);
  Tensor accepted = new_empty(z, &rows, 1, ScalarType::Bool);
  for (const Tensor* t : {&z, &z_new, &u, &u_new, &grad, &grad_new}) {
    a.f64 = a.f64 || t->scalar_type() == ScalarType::Double;
  }
  layout.add(a.z, z);
  layout.add(a.z_new, z_new);
  layout.add(a.grad, grad);
  layout.add(a.grad_new, grad_new);
  add_output(a.z_out, layout, z_out);
  add_output(a.grad_out, layout, grad_out);
  set_rows(a.alpha, alpha);
  set_rows(a.u, u);
  set_rows(a.u_new, u_new);
  set_rows(a.u_out, u_out);
  a.accepted = (uint8_t*)accepted.data_ptr();
  a.stream = stream_of(seed, step, kAccept);
  a.space = layout.merge();
  a.plan = plan_of(a.space, layout.flat());
  Tensor sums = new_partial(z, a.space, a.plan);
  a.sums = (double*)sums.data_ptr();
  const CpuTable& cpu = *cpu_table();
  if (a.plan.segments > 1) {
    torch::stable::parallel_for(0, a.plan.units, a.plan.grain,
                                [&](int64_t begin, int64_t end) { cpu.mala_sums(a, begin, end); });
  }
  if (rows > 0) {
    torch::stable::parallel_for(0, a.plan.units, a.plan.grain,
                                [&](int64_t begin, int64_t end) { cpu.mala_accept(a, begin, end); });
  }
  return {z_out, u_out, grad_out, accepted};
}

Tensor grad_norm_penalty(Tensor grad) {
  SquaresArgs a{};
  Layout layout(grad, grad.dim() - 1);
  a.f64 = grad.scalar_type() == ScalarType::Double;
  layout.add(a.x, grad);
  a.space = layout.merge();
  a.plan = plan_of(a.space, layout.flat());
  Tensor partial = new_partial(grad, a.space, a.plan);
  a.sums = (double*)partial.data_ptr();
  const int64_t rows = a.space.rows;
  Tensor out = new_empty(grad, &rows, 1, a.f64 ? ScalarType::Double : ScalarType::Float);
  const auto kernel = cpu_table()->row_squares;
  if (rows > 0) {
    torch::stable::parallel_for(0, a.plan.units, a.plan.grain,
                                [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  }
  for (int64_t r = 0; r < rows; ++r) {
    double total = a.sums[r * a.plan.segments];
    for (int64_t i = 1; i < a.plan.segments; ++i) total += a.sums[r * a.plan.segments + i];
    // + 0.0 makes an empty sum +0
    a.f64 ? ((double*)out.data_ptr())[r] = total + 0.0 : ((float*)out.data_ptr())[r] = float(total + 0.0);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyflow, CPU, m) {
  m.impl("mala_accept", TORCH_BOX(&mala_accept));
  m.impl("grad_norm_penalty", TORCH_BOX(&grad_norm_penalty));
}

}  // namespace pyflow
