#include "../../../csrc/args/sde.h"

#include "common.h"

namespace pyflow {
namespace {

void sde(int64_t rows, int64_t cols) {
  const int64_t n = rows * cols;
  auto x = values(n, 3), score = values(n, 2), a = values(rows, 1), b = values(rows, 1), c = values(rows, 1);
  std::vector<float> y(n), mean(n);
  std::vector<int64_t> seeds(rows);
  SdeArgs s{};
  s.space = space(rows, cols);
  s.plan = cpu_plan(s.space, true);
  s.stream = stream(seeds, true);
  s.x = view(x, DType::f32, cols);
  s.score = view(score, DType::f32, cols);
  s.a = row_view(a);
  s.b = row_view(b);
  s.c = row_view(c);
  s.y = view(y, DType::f32, cols);
  s.mean = view(mean, DType::f32, cols);
  cpu::sde_step(s, 0, s.plan.units);
  print("sde_step", y);
  print("sde_step_mean", mean);
  std::vector<float> losses;
  std::vector<double> partial;
  s.score_given = true;
  s.sums = row_sums(losses, partial, rows, s.plan);
  cpu::denoising_loss(s, 0, s.plan.units);
  print_sums("denoising_loss", losses, partial);
  std::vector<float> gx(n), gscore(n), sums;
  s.gx = view(gx, DType::f32, cols);
  s.sums = row_sums(sums, partial, rows, s.plan);
  cpu::denoising_loss(s, 0, s.plan.units);
  print("denoising_loss_grad_pred", gx);
  print_sums("denoising_loss_grad_std", sums, partial);
  s.sums = row_sums(sums, partial, 2 * rows, s.plan);
  cpu::langevin_squares(s, 0, s.plan.units);
  print_sums("langevin_squares", sums, partial);
  s.gy = view(score, DType::f32, cols);
  s.gmean = view(x, DType::f32, cols);
  s.gscore = view(gscore, DType::f32, cols);
  s.sums = row_sums(sums, partial, 3 * rows, s.plan);
  cpu::sde_step_backward(s, 0, s.plan.units);
  print("sde_step_grad_x", gx);
  print("sde_step_grad_score", gscore);
  print_sums("sde_step_grad_abc", sums, partial);
}

}  // namespace

PYFLOW_BITS(sde) {
  for (const auto& s : kShapes) sde(s[0], s[1]);
}

}  // namespace pyflow
