#include "../cpu/gan_qp.h"

#include "../cpu/dispatch.h"
#include "tensor.h"

namespace pyflow {
namespace {

using Optional = std::optional<Tensor>;

bool is_f64(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }
bool is_f64(const Optional& t) { return t && is_f64(*t); }

View rows_of(const Tensor& t) {
  View view;
  view.data = (char*)t.data_ptr();
  view.dtype = dtype_of(t);
  view.stride[0] = t.stride(0);
  return view;
}

GanQpValues values_of(const Tensor& t_real, const Tensor& t_fake, double lam, double eps, bool f64) {
  return {f64, rows_of(t_real), rows_of(t_fake), 2 * lam, eps};
}

// sums of deviations per sample, or per segment of a long one; the returned tensor owns a.sums
Tensor sum(GanQpSums& a, const Tensor& real, const Tensor& fake, int64_t distance, bool f64) {
  Layout layout(real, real.dim() - 1);
  layout.add(a.real, real);
  layout.add(a.fake, fake);
  a.space = layout.merge();
  a.plan = plan_of(a.space, layout.flat());
  a.f64 = f64;
  a.distance = int(distance);
  const int64_t count = a.space.rows * a.plan.segments;
  Tensor memory = new_empty(real, &count, 1, ScalarType::Double);
  a.sums = (double*)memory.data_ptr();
  const auto kernel = cpu_table()->gan_qp_sums;
  torch::stable::parallel_for(0, a.plan.units, a.plan.grain,
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return memory;
}

std::tuple<Tensor, Tensor> gan_qp_loss(Tensor t_real, Tensor t_fake, Tensor x_real, Tensor x_fake, Optional z_real,
                                       Optional z_fake, double lam, double eps, int64_t distance) {
  const bool f64 =
      is_f64(t_real) || is_f64(t_fake) || is_f64(x_real) || is_f64(x_fake) || is_f64(z_real) || is_f64(z_fake);
  const int64_t rows = x_real.size(0);
  const ScalarType dtype = f64 ? ScalarType::Double : ScalarType::Float;
  Tensor loss = new_empty(x_real, &rows, 1, dtype), d = new_empty(x_real, &rows, 1, dtype);
  GanQpSums x{}, z{};
  const Tensor of_x = sum(x, x_real, x_fake, distance, f64);
  Optional of_z;
  if (z_real && z_fake) of_z = sum(z, *z_real, *z_fake, distance, f64);
  GanQpLoss a{};
  static_cast<GanQpValues&>(a) = values_of(t_real, t_fake, lam, eps, f64);
  a.x = &x;
  a.z = of_z ? &z : nullptr;
  a.loss = (char*)loss.data_ptr();
  a.d = (char*)d.data_ptr();
  const auto kernel = cpu_table()->gan_qp_loss;
  torch::stable::parallel_for(0, rows, grain_of(x.plan.segments),
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return {loss, d};
}

std::tuple<Tensor, Tensor> gan_qp_loss_backward(Tensor grad, Tensor t_real, Tensor t_fake, Tensor d, double lam,
                                                double eps) {
  Tensor g_real = new_like(t_real), g_fake = new_like(t_fake);
  GanQpLossBackward a{};
  static_cast<GanQpValues&>(a) = values_of(t_real, t_fake, lam, eps, is_f64(d));
  a.grad = rows_of(grad);
  a.d = rows_of(d);
  a.g_real = rows_of(g_real);
  a.g_fake = rows_of(g_fake);
  const auto kernel = cpu_table()->gan_qp_loss_backward;
  torch::stable::parallel_for(0, t_real.size(0), grain_of(1),
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return {g_real, g_fake};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyflow, CPU, m) {
  m.impl("gan_qp_loss", TORCH_BOX(&gan_qp_loss));
  m.impl("gan_qp_loss_backward", TORCH_BOX(&gan_qp_loss_backward));
}

}  // namespace pyflow
