// Noise for a tile of rows x columns, as contiguous floats in L1.
#pragma once

#include "../args/noise.h"
#include "lanes.h"
#include "tile.h"

namespace pyflow::PYFLOW_ISA {

constexpr int kBlocks = int(kChunk) / 4 + 1;  // + 1: a chunk can begin inside a block
constexpr int kBlockRoom = (kBlocks + 15) / 16 * 16;

struct DrawBuffer {
  alignas(64) uint32_t word[4][kBlockRoom];
  alignas(64) uint32_t block[kBlockRoom], seed_low[kBlockRoom], seed_high[kBlockRoom];
  alignas(64) float z[4 * kBlockRoom];
};

#if defined(PYFLOW_LANES)
// stores the words of kLanes blocks from index i of b.word on; words past the last block are never read
template <class Key>
PYFLOW_FN void draw_vector(const RandomStream& s, const Lanes& block, Key key0, Key key1, int i, DrawBuffer& b) {
  Lanes c0 = block, c1 = block >> 32;
  Lanes c2 = lanes_of(uint32_t(s.step.value), 0), c3 = lanes_of(high_of_step(s.step.value, s.purpose), 0);
  philox_rounds(c0, c1, c2, c3, key0, key1, [](const Lanes& words, uint32_t by) { return product(words, by); });
  narrow(c0, b.word[0] + i);
  narrow(c1, b.word[1] + i);
  narrow(c2, b.word[2] + i);
  narrow(c3, b.word[3] + i);
}

// words of n consecutive blocks of one stream, starting at `block`
inline void draw_run(const RandomStream& s, uint64_t seed, uint64_t block, int n, DrawBuffer& b) {
  Lanes blocks = lanes_of(block, 1);
  for (int i = 0; i < n; i += kLanes) {
    draw_vector(s, blocks, uint64_t(uint32_t(seed)), seed >> 32, i, b);
    blocks += uint64_t(kLanes);
  }
}

// words of the n blocks `block` + i * `step` of one stream
inline void draw_every(const RandomStream& s, uint64_t seed, uint64_t block, uint64_t step, int n, DrawBuffer& b) {
  Lanes blocks = lanes_of(block, step);
  for (int i = 0; i < n; i += kLanes) {
    draw_vector(s, blocks, uint64_t(uint32_t(seed)), seed >> 32, i, b);
    blocks += uint64_t(kLanes) * step;
  }
}

// words of n blocks, with the number and the seed of each block in the buffer
inline void draw_lanes(const RandomStream& s, int n, DrawBuffer& b) {
  for (int i = 0; i < n; i += kLanes) {
    draw_vector(s, widen(b.block + i), widen(b.seed_low + i), widen(b.seed_high + i), i, b);
  }
}
#else
PYFLOW_FN void put_words(const Words& w, int i, uint32_t* __restrict w0, uint32_t* __restrict w1,
                         uint32_t* __restrict w2, uint32_t* __restrict w3) {
  w0[i] = w.v[0];
  w1[i] = w.v[1];
  w2[i] = w.v[2];
  w3[i] = w.v[3];
}

// words of n consecutive blocks of one stream, starting at `block`
inline void draw_run(const RandomStream& s, uint64_t seed, uint64_t block, int n, DrawBuffer& b) {
  const uint32_t low = uint32_t(block), high = uint32_t(block >> 32);
  const uint32_t step_low = uint32_t(s.step.value), step_high = high_of_step(s.step.value, s.purpose);
  const uint32_t seed_low = uint32_t(seed), seed_high = uint32_t(seed >> 32);
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const uint32_t here = low + uint32_t(i);
    const Words w = block_words(here, high + (here < low ? 1u : 0u), step_low, step_high, seed_low, seed_high);
    put_words(w, i, b.word[0], b.word[1], b.word[2], b.word[3]);
  }
}

// words of the n blocks `block` + i * `step` of one stream
inline void draw_every(const RandomStream& s, uint64_t seed, uint64_t block, uint64_t step, int n, DrawBuffer& b) {
  const uint32_t step_low = uint32_t(s.step.value), step_high = high_of_step(s.step.value, s.purpose);
  const uint32_t seed_low = uint32_t(seed), seed_high = uint32_t(seed >> 32);
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const uint64_t here = block + uint64_t(uint32_t(i)) * step;
    const Words w = block_words(uint32_t(here), uint32_t(here >> 32), step_low, step_high, seed_low, seed_high);
    put_words(w, i, b.word[0], b.word[1], b.word[2], b.word[3]);
  }
}

// words of n blocks, with the number and the seed of each block in the buffer
inline void draw_lanes(const RandomStream& s, int n, DrawBuffer& b) {
  const uint32_t step_low = uint32_t(s.step.value), step_high = high_of_step(s.step.value, s.purpose);
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const Words w = block_words(b.block[i], 0u, step_low, step_high, b.seed_low[i], b.seed_high[i]);
    put_words(w, i, b.word[0], b.word[1], b.word[2], b.word[3]);
  }
}
#endif

// converts the words of n blocks to floats
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
void draw_elements(const RandomStream& s, uint64_t seed, int64_t k, int64_t n, DrawBuffer& b, float* out) {
  const int64_t first = k / 4, blocks = (k + n + 3) / 4 - first;
  draw_run(s, seed, uint64_t(first), int(blocks), b);
  const bool whole = k % 4 == 0 && n % 4 == 0;
  words_to_floats<K>(b, int(blocks), whole ? out : b.z);
  if (!whole) copy_floats(b.z + k % 4, out, n);
}

// short rows, each with its own seed: draws as many rows at a time as fit in the buffer
template <NoiseKind K>
void draw_rows(const RandomStream& s, const Tile& t, DrawBuffer& b, float* out) {
  const int64_t each = (t.cols + 3) / 4;
  for (int64_t r = 0; r < t.rows;) {
    const int64_t last = smaller(r + kBlocks / each, t.rows);
    int n = 0;
    for (int64_t row = r; row < last; ++row) {
      const uint64_t seed = seed_of(s, t.row + row);
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

// writes the noise of tile t to `out`
template <NoiseKind K>
void draw(const RandomStream& s, const Space& space, const Tile& t, DrawBuffer& b, float* out) {
  if (!s.per_row) return draw_elements<K>(s, seed_of(s, 0), t.row * space.cols + t.col, t.count(), b, out);
  if (t.rows > 1) return draw_rows<K>(s, t, b, out);
  draw_elements<K>(s, seed_of(s, t.row), t.col, t.cols, b, out);
}

}  // namespace pyflow::PYFLOW_ISA
