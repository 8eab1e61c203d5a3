// Constants and index numbering derived from the levels, rounded in one place for every device.
#pragma once

#include <cmath>
#include <vector>

#include "../ops/fsq.h"
#include "tensor.h"

namespace pyflow {

using Levels = std::vector<int64_t>;

// rounded to float32 after every operation, in the order of vector-quantize-pytorch
inline FsqChannel<float> channel_of(int64_t level, FsqVariant v) {
  const float half = float(level - 1) * (v == FsqVariant::paper ? 0.999f : 1.001f) / 2.f;
  const float offset = level % 2 == 0 ? 0.5f : 0.f;
  const double ratio = double(offset / half);
  const double shift = v == FsqVariant::paper ? std::tan(ratio) : v == FsqVariant::hard ? ratio : std::atanh(ratio);
  return {float(shift), half, offset, float(level / 2), float(level - 1), 2.f / float(level - 1)};
}

// scale of a residual stage, L^-stage
inline float scale_of(int64_t level, int64_t stage) { return float(std::pow(double(level), -double(stage))); }

inline uint64_t product(const Levels& levels, size_t count) {
  uint64_t size = 1;
  for (size_t c = 0; c < count; ++c) size *= uint64_t(levels[c]);
  return size;
}

// whether the largest index does not fit int32
inline bool is_wide(const Levels& levels) { return product(levels, levels.size()) > uint64_t(1) << 31; }

inline ScalarType index_dtype(bool wide) { return wide ? ScalarType::Long : ScalarType::Int; }

}  // namespace pyflow
