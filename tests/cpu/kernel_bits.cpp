// Prints the kernel results of this build on fixed inputs, bit by bit, to compare builds for different CPUs. One line
// per result: `case word word ...`.
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "../../csrc/args/coupling.h"
#include "../../csrc/args/energy.h"
#include "../../csrc/args/fsq.h"
#include "../../csrc/args/gan_qp.h"
#include "../../csrc/args/hsic.h"
#include "../../csrc/args/math.h"
#include "../../csrc/args/sde.h"
#include "../../csrc/args/sector.h"
#include "../../csrc/args/spectral.h"
#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/math/half.h"
#include "../../csrc/ops/coupling.h"
#include "../../csrc/ops/fsq.h"
#include "../../csrc/ops/gan_qp.h"

namespace {

using namespace pyflow;

const CpuTable* table;
uint32_t state = 1;

float uniform() {  // [-1, 1)
  state = state * 1664525u + 1013904223u;
  return float(int32_t(state)) * 0x1p-31f;
}

// ordinary values, every 37th a special one
std::vector<float> values(int64_t n, float range) {
  const float inf = std::numeric_limits<float>::infinity();
  const float special[] = {0.f,   -0.f,   1e-40f, -1e-40f, 1e-20f, 88.f, -88.f,
                           104.f, -104.f, 1e30f,  -1e30f,  inf,    -inf, NAN};
  std::vector<float> v(n);
  for (int64_t i = 0; i < n; ++i) v[i] = i % 37 == 5 ? special[i / 37 % 14] : range * uniform();
  return v;
}

// every NaN prints alike: payloads may differ
unsigned word(float v) { return v != v ? 0x7fc00000u : bits_of(v); }

void print(const char* name, const std::vector<float>& v) {
  std::printf("%s", name);
  for (float x : v) std::printf(" %x", word(x));
  std::printf("\n");
}

template <class T>
View view(std::vector<T>& v, DType dtype, int64_t cols) {
  View w;
  w.data = (char*)v.data();
  w.dtype = dtype;
  w.stride[0] = cols;
  w.stride[1] = 1;
  return w;
}

Space space(int64_t rows, int64_t cols) {
  Space s;
  s.row_dims = s.col_dims = 1;
  s.size[0] = s.rows = rows;
  s.size[1] = s.cols = cols;
  return s;
}

RowView row_view(std::vector<float>& v) {
  RowView r;
  r.view = view(v, DType::f32, 1);
  return r;
}

// sums in `out`, or those of several segments in `partial`
template <class T>
RowSums row_sums(std::vector<T>& out, std::vector<double>& partial, int64_t rows, const Plan& p) {
  out.resize(rows);
  partial.resize(p.segments > 1 ? rows * p.segments : 0);
  return {out.data(), partial.empty() ? nullptr : partial.data()};
}

void print_sums(const char* name, const std::vector<float>& out, const std::vector<double>& partial) {
  print(name, partial.empty() ? out : std::vector<float>(partial.begin(), partial.end()));
}

void coupling(int64_t rows, int64_t cols, ScaleMap map, bool inverse, bool shift_first) {
  const int64_t n = rows * cols;
  auto x = values(n, 3), shift = values(n, 2), scale = values(n, 6), gy = values(n, 1), gl = values(rows, 1);
  std::vector<float> y(n), logdet(rows), gx(n), gshift(n), gscale(n);
  CouplingForward f{};
  f.space = space(rows, cols);
  f.plan = cpu_plan(f.space, true);
  f.inverse = inverse;
  f.shift_first = shift_first;
  f.affine = true;
  f.scale_map = map;
  const bool eps = map == ScaleMap::sigmoid_eps || map == ScaleMap::softplus_eps;
  f.map_arg = eps ? 0.01 : map == ScaleMap::softsign ? 6.9078 : 2.0;
  f.x = view(x, DType::f32, cols);
  f.shift = view(shift, DType::f32, cols);
  f.scale = view(scale, DType::f32, cols);
  CouplingBackward b{};
  static_cast<CouplingArgs&>(b) = f;
  f.y = view(y, DType::f32, cols);
  std::vector<double> partial;
  f.logdet = row_sums(logdet, partial, rows, f.plan);
  table->coupling_forward(f, 0, f.plan.units);
  if (f.logdet.partial) {
    for (int64_t r = 0; r < rows; ++r) {
      double total = 0;
      for (int64_t i = 0; i < f.plan.segments; ++i) total += partial[r * f.plan.segments + i];
      logdet[r] = float(total);
    }
  }
  b.gy = view(gy, DType::f32, cols);
  b.gl = view(gl, DType::f32, 1);
  b.gx = view(gx, DType::f32, cols);
  b.gshift = view(gshift, DType::f32, cols);
  b.gscale = view(gscale, DType::f32, cols);
  table->coupling_backward(b, 0, b.plan.units);
  char name[96];
  const auto show = [&](const char* what, const std::vector<float>& v) {
    std::snprintf(name, sizeof name, "%s[map=%d,inverse=%d,shift_first=%d,%dx%d]", what, int(map), inverse, shift_first,
                  int(rows), int(cols));
    print(name, v);
  };
  show("y", y);
  show("logdet", logdet);
  show("gx", gx);
  show("gshift", gshift);
  show("gscale", gscale);
}

// channels adjacent (flat) or one plane per channel; for the symmetric variants also residual_fsq
void fsq(FsqVariant variant, bool flat) {
  const int64_t positions = 37, channels = 3, stages = 2, n = positions * channels;
  const float levels[channels] = {8, 5, 3};
  const int32_t products[channels] = {1, 8, 40};
  std::vector<float> constants, scales;
  std::vector<int32_t> basis;
  const auto run = [&](auto& out, auto value) {
    for (int64_t i = 0; i < n; ++i) out.push_back(value(i % channels));
  };
  run(constants, [&](int64_t c) { return 0.1f * float(c); });
  run(constants, [&](int64_t c) { return (levels[c] - 1.f) * 0.5005f; });
  run(constants, [&](int64_t c) { return c == 0 ? 0.5f : 0.f; });
  run(constants, [&](int64_t c) { return float(int(levels[c]) / 2); });
  run(constants, [&](int64_t c) { return levels[c] - 1.f; });
  run(constants, [&](int64_t c) { return 2.f / (levels[c] - 1.f); });
  for (int64_t stage = 0; stage < stages; ++stage) {
    run(scales, [&](int64_t c) { return stage == 0 ? 1.f : 1.f / levels[c]; });
  }
  run(basis, [&](int64_t c) { return products[c]; });
  auto z = values(n, 2), grad = values(n, 1);
  std::vector<float> codes(n), gz(n), numbers;
  std::vector<int32_t> indices(positions * stages);
  ResidualFsqForward f{};
  f.space = flat ? space(1, n) : space(channels, positions);
  f.table = {(const char*)constants.data(), (const char*)basis.data(), n};
  f.channels = channels;
  f.positions = positions;
  f.tile = positions;
  f.flat = flat;
  f.variant = int(variant);
  f.stages = f.active = stages;
  f.scales = (const char*)scales.data();
  f.z = view(z, DType::f32, f.space.cols);
  f.codes = view(codes, DType::f32, f.space.cols);
  f.indices = view(indices, DType::i32, 0);
  ResidualFsqBackward b{};
  static_cast<FsqArgs&>(b) = f;
  b.stages = b.active = stages;
  b.scales = f.scales;
  b.z = f.z;
  b.grad = view(grad, DType::f32, f.space.cols);
  b.gz = view(gz, DType::f32, f.space.cols);
  char name[96];
  const auto show = [&](const char* op) {
    std::snprintf(name, sizeof name, "%s[variant=%d,flat=%d]", op, int(variant), flat);
    numbers.assign(indices.begin(), indices.end());
    print(name, codes);
    print(name, numbers);
    print(name, gz);
  };
  table->fsq_forward(f, 0, 1);
  table->fsq_backward(b, 0, 1);
  show("fsq");
  if (!is_symmetric(variant)) return;
  f.indices.stride[1] = stages;
  table->residual_fsq_forward(f, 0, 1);
  table->residual_fsq_backward(b, 0, 1);
  show("residual_fsq");
}

RandomStream stream(std::vector<int64_t>& seeds, bool per_row) {
  for (size_t i = 0; i < seeds.size(); ++i) seeds[i] = int64_t(i) * 0x123456789abcdef - 7;
  return {{per_row ? seeds.data() : nullptr, seeds[0]}, {nullptr, (int64_t(1) << 40) + 3}, per_row ? 1 : 0, per_row, 2};
}

void noise(int64_t rows, int64_t cols, NoiseKind kind, bool per_row) {
  std::vector<float> out(rows * cols);
  std::vector<int64_t> seeds(rows);
  NoiseArgs a{};
  a.space = space(rows, cols);
  a.plan = cpu_plan(a.space, true);
  a.kind = kind;
  a.stream = stream(seeds, per_row);
  a.out = view(out, DType::f32, cols);
  table->noise(a, 0, a.plan.units);
  char name[64];
  std::snprintf(name, sizeof name, "noise[kind=%d,per_row=%d,%dx%d]", int(kind), per_row, int(rows), int(cols));
  print(name, out);
}

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
  table->sde_step(s, 0, s.plan.units);
  print("sde_step", y);
  print("sde_step_mean", mean);
  std::vector<float> losses;
  std::vector<double> partial;
  s.score_given = true;
  s.sums = row_sums(losses, partial, rows, s.plan);
  table->denoising_loss(s, 0, s.plan.units);
  print_sums("denoising_loss", losses, partial);
}

// counts are integers below 2^24, exact as floats
void sector(int64_t points, int64_t trials) {
  std::vector<double> thresholds;
  for (int k = 0; k < 16; ++k) thresholds.push_back(double(k * k) / 256);
  std::vector<int64_t> counts(thresholds.size()), seeds(1);
  const int64_t begin = int64_t(1) << 33;  // blocks beyond 32 bits
  table->sector_trials({thresholds.data(), 16, points, trials, stream(seeds, false), counts.data()}, begin,
                       begin + trials);
  print("sector_trials", std::vector<float>(counts.begin(), counts.end()));
}

// prints the bits of the float64 results
void sector_formula() {
  std::vector<int64_t> n;
  std::vector<double> theta;
  for (int64_t points : {1, 2, 5, 64, 500, 3000}) {
    for (double x : {0.9, 0.5, 2.0 / double(points), 3.0 / double(points), 6.5 / double(points)}) {
      n.push_back(points);
      theta.push_back(kTwoPi.hi * (1 - x));
    }
  }
  std::vector<double> work(path_room(3000)), out(n.size());
  for (int flags = 0; flags < 2; ++flags) {
    table->sector_formula({n.data(), theta.data(), flags == 1, false, work.data(), out.data()}, 0, int64_t(n.size()));
    std::printf("sector_formula");
    for (double v : out) {
      uint64_t bits;
      std::memcpy(&bits, &v, sizeof bits);
      std::printf(" %llx", (unsigned long long)bits);
    }
    std::printf("\n");
  }
}

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
  table->gram_stats(s, 0, 2);
  table->gram_pack(s, 0, 2 * (s.padded / kPad));
  table->gram_clear(b, 0, 2 * (s.padded / kPad));
  for (int64_t round = 0; round < s.tournament.seats; ++round) {
    s.round = b.round = round;
    table->gram_sums(s, 0, tiles_of(s.tournament, round));
    table->gram_backward(b, 0, tiles_of(s.tournament, round));
  }
  table->gram_finish(b, 0, n);
  char name[64];
  std::snprintf(name, sizeof name, "grams[kernel=%d,dim=%d,n=%d]", int(kernel), int(dim), int(n));
  std::vector<float> narrow(rows.begin(), rows.end());
  narrow.insert(narrow.end(), cross.begin(), cross.end());
  narrow.insert(narrow.end(), shift.begin(), shift.end());
  print(name, narrow);
  print(name, grad);
}

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
    table->gan_qp_sums(s, 0, s.plan.units);
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
  table->gan_qp_loss(f, 0, rows);
  b.grad = row_view(grad);
  b.d = row_view(d);
  b.g_real = row_view(g_real);
  b.g_fake = row_view(g_fake);
  table->gan_qp_loss_backward(b, 0, rows);
  char name[64];
  std::snprintf(name, sizeof name, "gan_qp[distance=%d,%dx%d]", int(distance), int(rows), int(cols));
  for (const auto* v : {&loss, &d, &g_real, &g_fake}) print(name, *v);
}

// a matrix of several units and a vector: two rounds of power iteration, W / sigma, and the gradient
void spectral(int64_t rows, int64_t cols) {
  struct Layer {
    std::vector<float> w, u, v, grad, out, u_out, v_out, gw, sigma, grad_sigma, sum, right;
    std::vector<double> y, partial;
  };
  std::vector<Layer> memory(2);
  std::vector<SpectralLayer> layers;
  int64_t units = 0;
  for (Layer& m : memory) {
    const bool vector = &m == &memory[1];
    SpectralLayer l{};
    l.space = space(vector ? 1 : rows, cols);
    l.unit_rows = 12;
    l.units = (l.space.rows + l.unit_rows - 1) / l.unit_rows;
    l.first_unit = units;
    units += l.units;
    const int64_t n = l.space.rows * cols;
    for (auto* x : {&m.w, &m.grad}) {
      x->resize(n);
      for (float& value : *x) value = uniform();
    }
    for (auto* x : {&m.u, &m.v}) x->assign(x == &m.u ? l.space.rows : cols, 0.125f);
    m.out.resize(n);
    m.gw.resize(n);
    m.u_out = m.u;
    m.v_out = m.v;
    m.sigma.resize(1);
    m.grad_sigma.assign(1, 0.5f);
    m.sum.resize(l.units * cols);
    m.right.resize(cols);
    m.y.resize(l.space.rows);
    m.partial.resize(l.units * cols);
    l.w = view(m.w, DType::f32, cols);
    l.grad = view(m.grad, DType::f32, cols);
    l.out = view(m.out, DType::f32, cols);
    l.sigma = view(m.sigma, DType::f32, 1);
    l.grad_sigma = view(m.grad_sigma, DType::f32, 1);
    if (!vector) {
      l.u = view(m.u, DType::f32, 1);
      l.v = view(m.v, DType::f32, 1);
      l.u_out = view(m.u_out, DType::f32, 1);
      l.v_out = view(m.v_out, DType::f32, 1);
    }
    l.y = m.y.data();
    l.partial = m.partial.data();
    l.sum = (char*)m.sum.data();
    l.right = (char*)m.right.data();
    layers.push_back(l);
  }
  SpectralArgs a{layers.data(), 2, true, false};
  table->spectral_start(a, 0, 2);
  for (int round = 0; round < 2; ++round) {
    a.last = round == 1;
    table->spectral_product(a, 0, units);
    table->spectral_iterate(a, 0, 2);
  }
  table->spectral_scale(a, 0, units);
  for (size_t i = 0; i < 2; ++i) {
    layers[i].out = view(memory[i].gw, DType::f32, cols);
    if (layers[i].v.data) layers[i].u = layers[i].u_out, layers[i].v = layers[i].v_out;
  }
  table->spectral_dot(a, 0, units);
  table->spectral_gradient(a, 0, units);
  for (Layer& m : memory) {
    for (auto* x : {&m.out, &m.u_out, &m.v_out, &m.sigma, &m.gw}) print("spectral", *x);
  }
}

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
    table->mala_sums(m, 0, m.plan.units);
    for (int64_t r = 0; r < rows; ++r) {
      double total = 0;
      for (int64_t i = 0; i < m.plan.segments; ++i) total += partial[r * m.plan.segments + i];
      totals[r] = float(total);
    }
  }
  table->mala_accept(m, 0, m.plan.units);
  print("mala_z", z_out);
  print("mala_grad", grad_out);
  print("mala_u", u_out);
  if (m.plan.segments > 1) print_sums("mala_sums", totals, partial);
  SquaresArgs q{};
  q.space = m.space;
  q.plan = m.plan;
  q.x = m.z;
  q.squares = row_sums(totals, partial, rows, q.plan);
  table->row_squares(q, 0, q.plan.units);
  print_sums("row_squares", totals, partial);
}

// 16-bit storage: checks the conversions
void additive(DType dtype, const char* name) {
  const int64_t rows = 3, cols = 211;
  const auto x = values(rows * cols, 3), shift = values(rows * cols, 2);
  std::vector<uint16_t> hx, hshift, y(rows * cols);
  for (float v : x) hx.push_back(dtype == DType::bf16 ? float_to_bf16(v) : float_to_half(v));
  for (float v : shift) hshift.push_back(dtype == DType::bf16 ? float_to_bf16(v) : float_to_half(v));
  CouplingForward f{};
  f.space = space(rows, cols);
  f.plan = cpu_plan(f.space, true);
  f.x = view(hx, dtype, cols);
  f.shift = view(hshift, dtype, cols);
  f.y = view(y, dtype, cols);
  table->coupling_forward(f, 0, f.plan.units);
  std::vector<float> widened;
  for (uint16_t v : y) widened.push_back(dtype == DType::bf16 ? bf16_to_float(v) : half_to_float(v));
  print(name, widened);
}

}  // namespace

int main() {
  table = cpu_table();
  if (!table) {
    std::fprintf(stderr, "none of the compiled instruction sets (%s) runs on this CPU\n", compiled_isas());
    return 1;
  }
  std::fprintf(stderr, "%s\n", table->isa);
  int function = 0;
  for (const char* name : kMathFunctionNames) {
    const auto in = values(4099, 20);
    std::vector<float> out(in.size());
    table->math_evaluate({MathFunction(function++), in.data(), out.data()}, 0, int64_t(in.size()));
    print(name, out);
  }
  // several short rows per unit, a row of several chunks, rows of several segments
  const int64_t shapes[][2] = {{40, 31}, {1, 1037}, {2, kSegment + 5}};
  for (const auto& s : shapes) {
    for (int map = 0; map <= int(ScaleMap::softplus_eps); ++map) {
      for (int flags = 0; flags < 4; ++flags) coupling(s[0], s[1], ScaleMap(map), flags & 1, flags & 2);
    }
  }
  for (int variant = 0; variant <= int(FsqVariant::symmetric_hard); ++variant) {
    for (int flat = 0; flat < 2; ++flat) fsq(FsqVariant(variant), flat);
  }
  for (const auto& s : shapes) {
    for (int flags = 0; flags < 4; ++flags) noise(s[0], s[1], NoiseKind(flags & 1), flags & 2);
    sde(s[0], s[1]);
    for (int distance = 0; distance < 2; ++distance) gan_qp(s[0], s[1], Distance(distance));
    mala(s[0], s[1]);
  }
  for (int64_t cols : {31, 1037}) spectral(70, cols);
  for (int64_t points : {1, 4, 7, 33}) sector(points, 1000);
  sector_formula();
  for (int kernel = 0; kernel <= int(GramKernel::delta); ++kernel) {
    for (const int64_t dim : {3, 21}) {
      for (const int64_t n : {37, 200}) grams(n, GramKernel(kernel), dim, kernel % 2 ? 1.f : 0.05f);
    }
  }
  additive(DType::bf16, "additive[bf16]");
  additive(DType::f16, "additive[f16]");
  return 0;
}
