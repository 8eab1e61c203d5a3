#include "../../../csrc/args/coupling.h"

#include "../../../csrc/math/half.h"
#include "common.h"

namespace pyflow {
namespace {

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
  cpu::coupling_forward(f, 0, f.plan.units);
  add_segments(partial, f.plan.segments, logdet);
  b.gy = view(gy, DType::f32, cols);
  b.gl = view(gl, DType::f32, 1);
  b.gx = view(gx, DType::f32, cols);
  b.gshift = view(gshift, DType::f32, cols);
  b.gscale = view(gscale, DType::f32, cols);
  cpu::coupling_backward(b, 0, b.plan.units);
  char name[96];
  const auto show = [&](const char* what, const auto& v) {
    std::snprintf(name, sizeof name, "%s[map=%d,inverse=%d,shift_first=%d,%dx%d]", what, int(map), inverse, shift_first,
                  int(rows), int(cols));
    print(name, v);
  };
  show("y", y);
  show("logdet", logdet);
  if (!partial.empty()) show("logdet_partial", partial);
  show("gx", gx);
  show("gshift", gshift);
  show("gscale", gscale);
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
  cpu::coupling_forward(f, 0, f.plan.units);
  std::vector<float> widened;
  for (uint16_t v : y) widened.push_back(dtype == DType::bf16 ? bf16_to_float(v) : half_to_float(v));
  print(name, widened);
}

}  // namespace

PYFLOW_BITS(coupling) {
  for (const auto& s : kShapes) {
    for (int map = 0; map <= int(ScaleMap::softplus_eps); ++map) {
      for (int flags = 0; flags < 4; ++flags) coupling(s[0], s[1], ScaleMap(map), flags & 1, flags & 2);
    }
  }
  additive(DType::bf16, "additive[bf16]");
  additive(DType::f16, "additive[f16]");
}

}  // namespace pyflow
