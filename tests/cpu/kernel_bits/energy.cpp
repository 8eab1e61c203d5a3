#include "../../../csrc/args/energy.h"

#include "common.h"

namespace pyflow {
namespace {

// the accept step, and row sums of squares
void mala(int64_t rows, int64_t cols) {
  const int64_t n = rows * cols;
  std::vector<float> in[4], u(rows), u_new(rows), alpha(rows, 0.1f), z_out(n), grad_out(n), u_out(rows);
  for (auto& v : in) {
    v.resize(n);
    for (float& x : v) x = 0.1f * uniform();
  }
  for (float& x : u_new) x = uniform();
  std::vector<uint8_t> accepted(rows);
  std::vector<int64_t> seeds(rows);
  MalaArgs m{};
  m.space = space(rows, cols);
  m.plan = cpu_plan(m.space, true);
  m.stream = stream(seeds, true);
  View* const views[] = {&m.z, &m.z_new, &m.grad, &m.grad_new};
  for (int i = 0; i < 4; ++i) *views[i] = view(in[i], DType::f32, cols);
  m.alpha = row_view(alpha);
  m.u = row_view(u);
  m.u_new = row_view(u_new);
  m.z_out = view(z_out, DType::f32, cols);
  m.grad_out = view(grad_out, DType::f32, cols);
  m.u_out = row_view(u_out);
  m.accepted = accepted.data();
  std::vector<float> totals;
  std::vector<double> partial;
  if (m.plan.segments > 1) {
    m.log_ratio = row_sums(totals, partial, rows, m.plan);
    cpu::mala_sums(m, 0, m.plan.units);
    add_segments(partial, m.plan.segments, totals);
  }
  cpu::mala_accept(m, 0, m.plan.units);
  print("mala_z", z_out);
  print("mala_grad", grad_out);
  print("mala_u", u_out);
  if (m.plan.segments > 1) print_sums("mala_sums", totals, partial);
  SquaresArgs q{};
  q.space = m.space;
  q.plan = m.plan;
  q.x = m.z;
  q.squares = row_sums(totals, partial, rows, q.plan);
  cpu::row_squares(q, 0, q.plan.units);
  print_sums("row_squares", totals, partial);
}

}  // namespace

PYFLOW_BITS(energy) {
  for (const auto& s : kShapes) mala(s[0], s[1]);
}

}  // namespace pyflow
