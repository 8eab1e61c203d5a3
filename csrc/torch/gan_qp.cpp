#include "../args/gan_qp.h"

#include "device.h"

namespace pyflow {
namespace {

using Optional = std::optional<Tensor>;

void set_values(GanQpArgs& a, const Tensor& t_real, const Tensor& t_fake, double lam, double eps, bool f64) {
  a.plan.units = t_real.size(0);
  a.plan.grain = grain_of(1);
  a.f64 = f64;
  a.t_real = row_view(t_real);
  a.t_fake = row_view(t_fake);
  a.lam2 = 2 * lam;
  a.eps = eps;
}

// sums of deviations of every sample; the returned tensor owns d.sums
Tensor sum(GanQpDistance& d, const Tensor& real, const Tensor& fake, int64_t distance, bool f64) {
  GanQpSums a{};
  Layout layout(real, real.dim() - 1);
  layout.add(a.real, real);
  layout.add(a.fake, fake);
  plan(a, layout);
  a.f64 = f64;
  a.distance = Distance(distance);
  SumTensors sums(a.sums, real, &a.space.rows, 1, a.space, a.plan, kCuda ? compute_type(f64) : ScalarType::Double);
  PYFLOW_RUN(gan_qp_sums, a, real);
  sums.finish();
  d = {sums.out.data_ptr(), a.space.cols};
  return sums.out;
}

std::tuple<Tensor, Tensor> gan_qp_loss(Tensor t_real, Tensor t_fake, Tensor x_real, Tensor x_fake, Optional z_real,
                                       Optional z_fake, double lam, double eps, int64_t distance) {
  GanQpLoss a{};
  bool f64 = false;
  for (const Tensor* t : {&t_real, &t_fake, &x_real, &x_fake}) f64 = f64 || is_f64(*t);
  for (const Optional* t : {&z_real, &z_fake}) f64 = f64 || (*t && is_f64(**t));
  const int64_t rows = x_real.size(0);
  Tensor loss = new_rows(x_real, rows, compute_type(f64)), d = new_rows(x_real, rows, compute_type(f64));
  if (rows == 0) return {loss, d};
  set_values(a, t_real, t_fake, lam, eps, f64);
  a.distance = Distance(distance);
  const Tensor of_x = sum(a.x, x_real, x_fake, distance, f64);
  Optional of_z;
  if (z_real && z_fake) of_z = sum(a.z, *z_real, *z_fake, distance, f64);
  a.loss = loss.data_ptr();
  a.d = d.data_ptr();
  PYFLOW_RUN(gan_qp_loss, a, loss);
  return {loss, d};
}

std::tuple<Tensor, Tensor> gan_qp_loss_backward(Tensor grad, Tensor t_real, Tensor t_fake, Tensor d, double lam,
                                                double eps) {
  GanQpLossBackward a{};
  Tensor g_real = new_like(t_real), g_fake = new_like(t_fake);
  set_values(a, t_real, t_fake, lam, eps, is_f64(d));
  a.grad = row_view(grad);
  a.d = row_view(d);
  a.g_real = row_view(g_real);
  a.g_fake = row_view(g_fake);
  if (a.plan.units > 0) PYFLOW_RUN(gan_qp_loss_backward, a, d);
  return {g_real, g_fake};
}

}  // namespace

PYFLOW_OPERATORS(m) {
  m.impl("gan_qp_loss", TORCH_BOX(&gan_qp_loss));
  m.impl("gan_qp_loss_backward", TORCH_BOX(&gan_qp_loss_backward));
}

}  // namespace pyflow
