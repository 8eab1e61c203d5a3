// Noise on a GPU: the stream of a launch, and draws of four neighbours per thread.
#pragma once

#include "../ops/noise.h"
#include "tile.h"

namespace pyflow::cuda {

// a seed or step; a caller's number arrives as a 0-d CPU tensor and is passed by value
struct Number {
  const int64_t* data;  // on the device; null: use `value`
  int64_t value;
};

inline Number number_of(const Tensor& t) {
  const auto* data = (const int64_t*)t.data_ptr();
  if (t.device().type() == torch::headeronly::DeviceType::CPU) return {nullptr, *data};
  return {data, 0};
}

// noise stream of a call: one over all elements in C order, or one per row
struct Stream {
  Number seed, step;
  int64_t seed_stride;
  bool per_row;
  int purpose;
};

inline Stream stream_of(const Tensor& seed, const Tensor& step, int64_t purpose) {
  const bool per_row = seed.dim() > 0;
  return {number_of(seed), number_of(step), per_row ? seed.stride(0) : 0, per_row, int(purpose)};
}

__device__ inline Words words_of(const Stream& s, int64_t row, uint64_t block) {
  const uint64_t seed = uint64_t(s.seed.data ? s.seed.data[row * s.seed_stride] : s.seed.value);
  const uint64_t step = uint64_t(s.step.data ? *s.step.data : s.step.value);
  return block_words(uint32_t(block), uint32_t(block >> 32), uint32_t(step), high_of_step(step, s.purpose),
                     uint32_t(seed), uint32_t(seed >> 32));
}

// noise of elements col to col + 3 of a row
template <NoiseKind K>
__device__ Four draw(const Stream& s, const Space& space, int64_t row, int64_t col) {
  const uint64_t k = s.per_row ? uint64_t(col) : uint64_t(row * space.cols + col);
  Four z = noise_of<K>(words_of(s, row, k / 4));
  const unsigned shift = unsigned(k % 4);
  if (shift == 0) return z;
  // the four elements span two Philox blocks
  const Four next = noise_of<K>(words_of(s, row, k / 4 + 1));
  if (shift == 1) return {{z.v[1], z.v[2], z.v[3], next.v[0]}};
  if (shift == 2) return {{z.v[2], z.v[3], next.v[0], next.v[1]}};
  return {{z.v[3], next.v[0], next.v[1], next.v[2]}};
}

}  // namespace pyflow::cuda
