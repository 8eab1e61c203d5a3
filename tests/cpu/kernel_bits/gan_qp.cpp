#include "../../../csrc/args/gan_qp.h"

#include "common.h"

namespace pyflow {
namespace {

// loss and gradients for real and fake samples, with latents of one feature
void gan_qp(int64_t rows, int64_t cols, Distance distance) {
  const int64_t n = rows * cols;
  auto x_real = values(n, 2), x_fake = values(n, 2), z_real = values(rows, 1), z_fake = values(rows, 1);
  auto t_real = values(rows, 3), t_fake = values(rows, 3), grad = values(rows, 1);
  std::vector<float> loss(rows), d(rows), g_real(rows), g_fake(rows);
  const auto sums = [&](std::vector<float>& real, std::vector<float>& fake, int64_t width,
                        std::vector<double>& totals) {
    GanQpSums s{};
    s.space = space(rows, width);
    s.plan = cpu_plan(s.space, true);
    s.distance = distance;
    s.real = view(real, DType::f32, width);
    s.fake = view(fake, DType::f32, width);
    std::vector<double> partial;
    s.sums = row_sums(totals, partial, rows, s.plan);
    cpu::gan_qp_sums(s, 0, s.plan.units);
    for (int64_t i = 0; i < int64_t(partial.size()); ++i) totals[i / s.plan.segments] += partial[i];
    return GanQpDistance{totals.data(), width};
  };
  std::vector<double> of_x, of_z;
  GanQpLoss f{};
  f.distance = distance;
  f.x = sums(x_real, x_fake, cols, of_x);
  f.z = sums(z_real, z_fake, 1, of_z);
  f.t_real = row_view(t_real);
  f.t_fake = row_view(t_fake);
  f.lam2 = 20;
  f.eps = 0.25;
  GanQpLossBackward b{};
  static_cast<GanQpArgs&>(b) = f;
  f.loss = loss.data();
  f.d = d.data();
  cpu::gan_qp_loss(f, 0, rows);
  b.grad = row_view(grad);
  b.d = row_view(d);
  b.g_real = row_view(g_real);
  b.g_fake = row_view(g_fake);
  cpu::gan_qp_loss_backward(b, 0, rows);
  char name[64];
  std::snprintf(name, sizeof name, "gan_qp[distance=%d,%dx%d]", int(distance), int(rows), int(cols));
  print(name, of_x);
  for (const auto* v : {&loss, &d, &g_real, &g_fake}) print(name, *v);
}

}  // namespace

PYFLOW_BITS(gan_qp) {
  for (const auto& s : kShapes) {
    for (int distance = 0; distance < 2; ++distance) gan_qp(s[0], s[1], Distance(distance));
  }
}

}  // namespace pyflow
