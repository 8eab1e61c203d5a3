// Noise for a tile of rows x columns, as contiguous floats in L1.
#pragma once

#include "noise.h"
#include "tile.h"

namespace pyflow::PYFLOW_ISA {

constexpr int kBlocks = int(kChunk) / 4 + 1;  // a chunk need not begin with a block
constexpr int kBlockRoom = (kBlocks + 15) / 16 * 16;

struct DrawBuffer {
  alignas(64) uint32_t word[4][kBlockRoom];
  alignas(64) uint32_t block[kBlockRoom], seed_low[kBlockRoom], seed_high[kBlockRoom];
  alignas(64) float z[4 * kBlockRoom];
};

// words of `n` blocks of one stream from `block` on
inline void draw_run(const Stream& s, uint64_t seed, uint64_t block, int n, DrawBuffer& b) {
  uint32_t* __restrict w0 = b.word[0];
  uint32_t* __restrict w1 = b.word[1];
  uint32_t* __restrict w2 = b.word[2];
  uint32_t* __restrict w3 = b.word[3];
  const uint32_t low = uint32_t(block), high = uint32_t(block >> 32);
  const uint32_t step_low = uint32_t(s.step), step_high = high_of_step(s.step, s.purpose);
  const uint32_t seed_low = uint32_t(seed), seed_high = uint32_t(seed >> 32);
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const uint32_t here = low + uint32_t(i);
    const Words w = block_words(here, high + (here < low ? 1u : 0u), step_low, step_high, seed_low, seed_high);
    w0[i] = w.v[0];
    w1[i] = w.v[1];
    w2[i] = w.v[2];
    w3[i] = w.v[3];
  }
}

// likewise with the block and the seed of each lane as the buffer holds them
inline void draw_lanes(const Stream& s, int n, DrawBuffer& b) {
  uint32_t* __restrict w0 = b.word[0];
  uint32_t* __restrict w1 = b.word[1];
  uint32_t* __restrict w2 = b.word[2];
  uint32_t* __restrict w3 = b.word[3];
  const uint32_t* __restrict block = b.block;
  const uint32_t* __restrict seed_low = b.seed_low;
  const uint32_t* __restrict seed_high = b.seed_high;
  const uint32_t step_low = uint32_t(s.step), step_high = high_of_step(s.step, s.purpose);
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const Words w = block_words(block[i], 0u, step_low, step_high, seed_low[i], seed_high[i]);
    w0[i] = w.v[0];
    w1[i] = w.v[1];
    w2[i] = w.v[2];
    w3[i] = w.v[3];
  }
}

// the words of n blocks to floats
template <NoiseKind K>
void words_to_floats(const DrawBuffer& b, int n, float* __restrict z) {
  const uint32_t* __restrict w0 = b.word[0];
  const uint32_t* __restrict w1 = b.word[1];
  const uint32_t* __restrict w2 = b.word[2];
  const uint32_t* __restrict w3 = b.word[3];
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const Four f = noise_of<K>({{w0[i], w1[i], w2[i], w3[i]}});
    z[4 * i] = f.v[0];
    z[4 * i + 1] = f.v[1];
    z[4 * i + 2] = f.v[2];
    z[4 * i + 3] = f.v[3];
  }
}

PYFLOW_FN void copy_floats(const float* __restrict from, float* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// elements [k, k + n) of a stream
template <NoiseKind K>
void draw_elements(const Stream& s, int64_t seed, int64_t k, int64_t n, DrawBuffer& b, float* out) {
  const int64_t first = k / 4, blocks = (k + n + 3) / 4 - first;
  draw_run(s, uint64_t(seed), uint64_t(first), int(blocks), b);
  const bool whole = k % 4 == 0 && n % 4 == 0;
  words_to_floats<K>(b, int(blocks), whole ? out : b.z);
  if (!whole) copy_floats(b.z + k % 4, out, n);
}

// short rows, each with its own seed: as many of them at a time as fill the lanes
template <NoiseKind K>
void draw_rows(const Stream& s, const Tile& t, DrawBuffer& b, float* out) {
  const int64_t each = (t.cols + 3) / 4;
  for (int64_t r = 0; r < t.rows;) {
    const int64_t last = r + kBlocks / each < t.rows ? r + kBlocks / each : t.rows;
    int n = 0;
    for (int64_t row = r; row < last; ++row) {
      const uint64_t seed = uint64_t(s.seed[(t.row + row) * s.seed_stride]);
      for (int64_t i = 0; i < each; ++i, ++n) {
        b.block[n] = uint32_t(i);
        b.seed_low[n] = uint32_t(seed);
        b.seed_high[n] = uint32_t(seed >> 32);
      }
    }
    draw_lanes(s, n, b);
    words_to_floats<K>(b, n, b.z);
    for (int64_t i = 0; r < last; ++r, i += 4 * each) copy_floats(b.z + i, out + r * t.cols, t.cols);
  }
}

// the tile's noise into out, which has room for it
template <NoiseKind K>
void draw(const Stream& s, const Space& space, const Tile& t, DrawBuffer& b, float* out) {
  if (!s.per_row) return draw_elements<K>(s, s.seed[0], t.row * space.cols + t.col, t.count(), b, out);
  if (t.rows > 1) return draw_rows<K>(s, t, b, out);
  draw_elements<K>(s, s.seed[t.row * s.seed_stride], t.col, t.cols, b, out);
}

}  // namespace pyflow::PYFLOW_ISA
