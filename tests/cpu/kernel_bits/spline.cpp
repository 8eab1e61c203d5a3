#include "../../../csrc/args/spline.h"

#include <cmath>

#include "../../../csrc/math/half.h"
#include "common.h"

namespace pyflow {
namespace {

struct Kind {
  SplineVariant variant;
  SplineTails tails;
  bool inverse;
};

void set_kind(SplineArgs& a, const Kind& kind, int bins, int64_t cols) {
  a.variant = kind.variant;
  a.tails = kind.tails;
  a.inverse = kind.inverse;
  a.bins = bins;
  a.constants = kind.variant == SplineVariant::zuko ? SplineConstants<double>{1, 6.9078, 0, 1, 1e-3}
                                                    : SplineConstants<double>{0.5, 1, 1e-3, 1 - 1e-3 * bins, 1e-3};
  a.low = kind.tails == SplineTails::none ? 0 : -2;
  a.high = kind.tails == SplineTails::none ? 1 : 2;
  a.features = cols;
  for (uint32_t& bits : a.linear) bits = 0x5a5a5a5au;
}

void spline(int64_t rows, int64_t cols, const Kind& kind, int bins, bool half) {
  const int64_t n = rows * cols, count = spline_params(bins, kind.tails);
  auto x = values(n, 3), params = values(n * count, 4), gy = values(n, 1), gl = values(rows, 1);
  // without tails a value outside [0, 1] has no result
  for (float& v : x) v = kind.tails == SplineTails::none ? v - std::floor(v) : v;
  std::vector<uint16_t> narrow;
  for (float v : params) narrow.push_back(float_to_bf16(v));
  std::vector<float> y(n), logdet(rows), gx(n), gparams(n * count);
  SplineForward f{};
  f.space = space(rows, cols);
  f.plan = cpu_plan(f.space, true);
  set_kind(f, kind, bins, cols);
  f.x = view(x, DType::f32, cols);
  f.params = half ? view(narrow, DType::bf16, cols * count) : view(params, DType::f32, cols * count);
  f.params.stride[1] = count;
  f.step = 1;
  SplineBackward b{};
  static_cast<SplineArgs&>(b) = f;
  f.y = view(y, DType::f32, cols);
  std::vector<double> partial;
  f.logdet = row_sums(logdet, partial, rows, f.plan);
  cpu::spline_forward(f, 0, f.plan.units);
  add_segments(partial, f.plan.segments, logdet);
  b.gy = view(gy, DType::f32, cols);
  b.gl = view(gl, DType::f32, 1);
  b.gx = view(gx, DType::f32, cols);
  b.gparams = view(gparams, DType::f32, cols * count);
  b.gparams.stride[1] = count;
  b.gstep = 1;
  cpu::spline_backward(b, 0, b.plan.units);
  char name[128];
  const auto show = [&](const char* what, const std::vector<float>& v) {
    std::snprintf(name, sizeof name, "spline_%s[variant=%d,tails=%d,inverse=%d,bins=%d,half=%d,%dx%d]", what,
                  int(kind.variant), int(kind.tails), kind.inverse, bins, half, int(rows), int(cols));
    print(name, v);
  };
  show("y", y);
  show("logdet", logdet);
  show("gx", gx);
  show("gparams", gparams);
}

}  // namespace

PYFLOW_BITS(spline) {
  for (const SplineVariant variant : {SplineVariant::nflows, SplineVariant::zuko}) {
    for (int tails = 0; tails < 4; ++tails) {
      for (const bool inverse : {false, true}) {
        const Kind kind{variant, SplineTails(tails), inverse};
        spline(9, 33, kind, 8, false);
        if (variant == SplineVariant::zuko) continue;
        spline(9, 33, kind, 2, true);
        spline(9, 33, kind, 32, false);
      }
    }
  }
  spline(2, 9001, {SplineVariant::nflows, SplineTails::linear, false}, 5, false);
}

}  // namespace pyflow
