#include "../../../csrc/args/hsic.h"

#include "common.h"

namespace pyflow {
namespace {

// one pair of two variables: row sums, sums of products, shifts and the gradient
void grams(int64_t n, GramKernel kernel, int64_t dim, float scale) {
  const int64_t columns = dim + 3;
  auto z = values(n * columns, 2), scales = std::vector<float>{scale, 1.f};
  for (float& v : z) v = std::isfinite(v) && std::fabs(v) < 100 ? v : 1.f;
  GramBackward b{};
  b.tournament = tournament_of(n);
  b.padded = (n + kPad - 1) / kPad * kPad;
  b.columns = columns;
  b.variables = 2;
  b.pairs = 1;
  b.items = b.parts = 1;
  const char *x = (const char*)z.data(), *y = (const char*)(z.data() + n * dim);
  GramVariable variables[2] = {{kernel, 2, dim, 0, 0, 0, 0, x, nullptr},
                               {GramKernel::rbf, 1, 3, dim, 0, 0, 0, y, nullptr}};
  for (GramVariable& v : variables) {
    v.width = (v.dim + 7) / 8 * 8;
    v.strips = b.workspace_size;
    v.rows = v.strips + b.padded * v.dim;
    b.workspace_size = v.rows + b.padded * v.width;
  }
  const int64_t pair[2] = {0, 1};
  std::vector<float> centres(columns), workspace(b.workspace_size), halves(2 * b.padded), grads(b.workspace_size),
      grad(n * columns);
  std::vector<double> shift(2), scratch(scratch_of(b, true) / 8 + 1), sums(2 * b.padded), grad_rows(2 * n),
      grad_cross(1, 0.5);
  for (double& v : grad_rows) v = uniform();
  b.variable = variables;
  b.pair = pair;
  variables[0].grad = (char*)grad.data();
  variables[1].grad = (char*)(grad.data() + n * dim);
  b.scale = (const char*)scales.data();
  b.shift = shift.data();
  b.centres = (char*)centres.data();
  b.workspace = (char*)workspace.data();
  b.halves = (char*)halves.data();
  b.scratch = (char*)scratch.data();
  b.grad_rows = grad_rows.data();
  b.grad_cross = grad_cross.data();
  b.weight_sums = sums.data();
  b.grad_workspace = (char*)grads.data();
  GramSums s{};
  static_cast<GramArgs&>(s) = b;
  const int64_t tiles = first_tile(s.tournament, s.tournament.seats);
  std::vector<double> rows(2 * n), cross(tiles);
  s.rows = rows.data();
  s.cross = cross.data();
  cpu::gram_stats(s, 0, 2);
  cpu::gram_pack(s, 0, 2 * (s.padded / kPad));
  cpu::gram_clear(b, 0, 2 * (s.padded / kPad));
  for (int64_t round = 0; round < s.tournament.seats; ++round) {
    s.round = b.round = round;
    cpu::gram_sums(s, 0, tiles_of(s.tournament, round));
    cpu::gram_backward(b, 0, tiles_of(s.tournament, round));
  }
  cpu::gram_finish(b, 0, n);
  char name[64];
  std::snprintf(name, sizeof name, "grams[kernel=%d,dim=%d,n=%d]", int(kernel), int(dim), int(n));
  std::vector<double> all(rows.begin(), rows.end());
  all.insert(all.end(), cross.begin(), cross.end());
  all.insert(all.end(), shift.begin(), shift.end());
  print(name, all);
  print(name, grad);
}

std::vector<double> doubles(int64_t n) {
  std::vector<double> v(n);
  for (double& value : v) value = uniform();
  return v;
}

// HSIC of all kinds of pairs of two variables, and the gradients
void terms(int64_t n, bool unbiased, int64_t step) {
  const int64_t batch = 2, pair[] = {0, 1, 1, 1};
  const auto rows = doubles(batch * 2 * n), shift = doubles(batch * 2);
  const auto diagonals = doubles(batch * 2 * n), cross = doubles(batch * 2);
  const auto gradients = doubles(batch * 2);
  std::vector<double> more(batch * 2), less(batch * 2), totals(batch * 2), grad(batch * 4 * n);
  Terms a{};
  a.variables = a.pairs = 2;
  a.n = n;
  a.pair = pair;
  a.unbiased = unbiased;
  a.rows = rows.data();
  a.shift = shift.data();
  a.diagonals = diagonals.data();
  a.stride[0] = 2 * n;
  a.stride[1] = n;
  a.stride[2] = step;
  a.cross = cross.data();
  a.more = more.data();
  a.less = less.data();
  a.totals = totals.data();
  cpu::hsic_terms(a, 0, batch);
  TermsBackward b{};
  (TermsArgs&)b = a;
  b.grad_more = b.grad_less = gradients.data();
  b.totals = totals.data();
  b.grad_rows = grad.data();
  b.grad_diagonals = grad.data() + batch * 2 * n;
  cpu::hsic_terms_backward(b, 0, batch * 2);
  char name[64];
  std::snprintf(name, sizeof name, "terms[n=%d,unbiased=%d,step=%d]", int(n), int(unbiased), int(step));
  print(name, more);
  print(name, less);
  print(name, grad);
}

}  // namespace

PYFLOW_BITS(hsic) {
  for (const int64_t n : {5, 16, 37}) {
    for (const int64_t step : {0, 1}) {
      for (const bool unbiased : {false, true}) terms(n, unbiased, step);
    }
  }
  for (int kernel = 0; kernel <= int(GramKernel::delta); ++kernel) {
    for (const int64_t dim : {3, 21}) {
      for (const int64_t n : {37, 200}) grams(n, GramKernel(kernel), dim, kernel % 2 ? 1.f : 0.05f);
    }
  }
}

}  // namespace pyflow
