// Counter-based noise and raw Philox words. A unit is a block of whole short rows or one segment of a long row; for the
// words it is one counter.
#include "noise.h"

#include "draw.h"

namespace pyflow::PYFLOW_ISA {

template <NoiseKind K>
void noise_unit(const NoiseArgs& a, const Tile& unit, DrawBuffer& b) {
  alignas(64) float buffer[kChunk];
  for (int64_t c = 0; c < unit.cols; c += kChunk) {
    const int64_t cols = unit.cols - c < kChunk ? unit.cols - c : kChunk;
    const Tile t{unit.row, unit.rows, unit.col + c, cols};
    float* z = target(a.space, a.out, t, buffer);
    draw<K>(a.stream, a.space, t, b, z);
    store(a.space, a.out, t, z);
  }
}

void noise(const NoiseArgs& a, int64_t begin, int64_t end) {
  DrawBuffer b;
  for (int64_t u = begin; u < end; ++u) {
    const Tile t = unit_tile(a.space, a.plan, u);
    a.kind == NoiseKind::normal ? noise_unit<NoiseKind::normal>(a, t, b) : noise_unit<NoiseKind::uniform>(a, t, b);
  }
  stream_fence();
}

void philox_words(const PhiloxArgs& a, int64_t begin, int64_t end) {
  const int64_t* __restrict counter = a.counter;
  const int64_t* __restrict key = a.key;
  int64_t* __restrict out = a.out;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const Words c{{uint32_t(counter[4 * i]), uint32_t(counter[4 * i + 1]), uint32_t(counter[4 * i + 2]),
                   uint32_t(counter[4 * i + 3])}};
    const Words w = philox4x32(c, uint32_t(key[2 * i]), uint32_t(key[2 * i + 1]));
    out[4 * i] = int64_t(w.v[0]);
    out[4 * i + 1] = int64_t(w.v[1]);
    out[4 * i + 2] = int64_t(w.v[2]);
    out[4 * i + 3] = int64_t(w.v[3]);
  }
}

}  // namespace pyflow::PYFLOW_ISA
