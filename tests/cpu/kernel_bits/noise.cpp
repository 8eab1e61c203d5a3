#include "../../../csrc/args/noise.h"

#include "common.h"

namespace pyflow {
namespace {

void noise(int64_t rows, int64_t cols, NoiseKind kind, bool per_row) {
  std::vector<float> out(rows * cols);
  std::vector<int64_t> seeds(rows);
  NoiseArgs a{};
  a.space = space(rows, cols);
  a.plan = cpu_plan(a.space, true);
  a.kind = kind;
  a.stream = stream(seeds, per_row);
  a.out = view(out, DType::f32, cols);
  cpu::noise(a, 0, a.plan.units);
  char name[64];
  std::snprintf(name, sizeof name, "noise[kind=%d,per_row=%d,%dx%d]", int(kind), per_row, int(rows), int(cols));
  print(name, out);
}

}  // namespace

PYFLOW_BITS(noise) {
  for (const auto& s : kShapes) {
    for (int flags = 0; flags < 4; ++flags) noise(s[0], s[1], NoiseKind(flags & 1), flags & 2);
  }
}

}  // namespace pyflow
