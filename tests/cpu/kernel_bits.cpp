// Prints what this build's kernels compute on fixed inputs, bit by bit, so that builds for different
// CPUs can be compared: one line per result, `case word word ...`.
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "../../csrc/cpu/coupling.h"
#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/math.h"
#include "../../csrc/math/half.h"
#include "../../csrc/ops/coupling.h"

namespace {

using namespace pyflow;

const CpuTable* table;
uint32_t state = 1;

float uniform() {  // [-1, 1)
  state = state * 1664525u + 1013904223u;
  return float(int32_t(state)) * 0x1p-31f;
}

// ordinary values, with the difficult ones strewn in
std::vector<float> values(int64_t n, float range) {
  const float inf = std::numeric_limits<float>::infinity();
  const float special[] = {0.f, -0.f, 1e-40f, -1e-40f, 1e-20f, 88.f, -88.f, 104.f, -104.f, 1e30f, -1e30f, inf, -inf, NAN};
  std::vector<float> v(n);
  for (int64_t i = 0; i < n; ++i) v[i] = i % 37 == 5 ? special[i / 37 % 14] : range * uniform();
  return v;
}

// a NaN's payload is not part of the promise
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

void coupling(int64_t rows, int64_t cols, ScaleMap map, bool inverse, bool shift_first) {
  const int64_t n = rows * cols;
  auto x = values(n, 3), shift = values(n, 2), scale = values(n, 6), gy = values(n, 1), gl = values(rows, 1);
  std::vector<float> y(n), logdet(rows), gx(n), gshift(n), gscale(n);
  CouplingForward f{};
  f.space = space(rows, cols);
  f.plan = plan_of(f.space, true);
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
  f.logdet = logdet.data();
  std::vector<double> partial(rows * f.plan.segments);
  if (f.plan.segments > 1) f.partial = partial.data();
  table->coupling_forward(f, 0, f.plan.units);
  if (f.partial) {
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

// storage in half precision: the conversions are ours too
void additive(DType dtype, const char* name) {
  const int64_t rows = 3, cols = 211;
  const auto x = values(rows * cols, 3), shift = values(rows * cols, 2);
  std::vector<uint16_t> hx, hshift, y(rows * cols);
  for (float v : x) hx.push_back(dtype == DType::bf16 ? float_to_bf16(v) : float_to_half(v));
  for (float v : shift) hshift.push_back(dtype == DType::bf16 ? float_to_bf16(v) : float_to_half(v));
  CouplingForward f{};
  f.space = space(rows, cols);
  f.plan = plan_of(f.space, true);
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
  for (const char* name : kMathFunctions) {
    const auto in = values(4099, 20);
    std::vector<float> out(in.size());
    table->math_evaluate({MathFunction(function++), in.data(), out.data()}, 0, int64_t(in.size()));
    print(name, out);
  }
  // tiles of short rows, one row in several chunks, a row in several segments
  const int64_t shapes[][2] = {{40, 31}, {1, 1037}, {2, kSegment + 5}};
  for (const auto& s : shapes) {
    for (int map = 0; map <= int(ScaleMap::softplus_eps); ++map) {
      for (int flags = 0; flags < 4; ++flags) coupling(s[0], s[1], ScaleMap(map), flags & 1, flags & 2);
    }
  }
  additive(DType::bf16, "additive[bf16]");
  additive(DType::f16, "additive[f16]");
  return 0;
}
