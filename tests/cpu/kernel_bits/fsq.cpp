#include "../../../csrc/args/fsq.h"

#include "common.h"

namespace pyflow {
namespace {

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
  f.variant = variant;
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
  cpu::fsq_forward(f, 0, 1);
  cpu::fsq_backward(b, 0, 1);
  show("fsq");
  if (!is_symmetric(variant)) return;
  f.indices.stride[1] = stages;
  cpu::residual_fsq_forward(f, 0, 1);
  cpu::residual_fsq_backward(b, 0, 1);
  show("residual_fsq");
}

}  // namespace

PYFLOW_BITS(fsq) {
  for (int variant = 0; variant <= int(FsqVariant::bounded); ++variant) {
    for (int flat = 0; flat < 2; ++flat) fsq(FsqVariant(variant), flat);
  }
}

}  // namespace pyflow
