// Noise on a GPU: draws of four neighbours per thread.
#pragma once

#include "../args/noise.h"
#include "tile.h"

namespace pyflow::cuda {

__device__ inline Words words_of(const RandomStream& s, int64_t row, uint64_t block) {
  const uint64_t seed = seed_of(s, row), step = uint64_t(s.step.data ? *s.step.data : s.step.value);
  return block_words(uint32_t(block), uint32_t(block >> 32), uint32_t(step), high_of_step(step, s.purpose),
                     uint32_t(seed), uint32_t(seed >> 32));
}

// noise of elements col to col + 3 of a row
template <NoiseKind K>
__device__ Four draw(const RandomStream& s, const Space& space, int64_t row, int64_t col) {
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

// the single column of element i of a group of kEach
__device__ inline Spot column(const Space& s, const Spot& p, int i) {
  return {p.row, p.col + i, p.row < s.rows && p.col + i < s.cols};
}

// loads the kEach elements of a draw, as one vector if N == kEach, else one by one
template <int N, class T>
__device__ Group<T, kEach> load_four(const Space& s, const View& v, const Spot& p) {
  if constexpr (N == kEach) {
    return load<kEach, T>(s, v, p);
  } else {
    Group<T, kEach> out{};
#pragma unroll
    for (int i = 0; i < kEach; ++i) out.v[i] = load<1, T>(s, v, column(s, p, i)).v[0];
    return out;
  }
}

template <int N, class T>
__device__ void store_four(const Space& s, const View& v, const Spot& p, const Group<T, kEach>& values) {
  if constexpr (N == kEach) {
    store(s, v, p, values);
  } else {
#pragma unroll
    for (int i = 0; i < kEach; ++i) store(s, v, column(s, p, i), Group<T, 1>{{values.v[i]}});
  }
}

}  // namespace pyflow::cuda
