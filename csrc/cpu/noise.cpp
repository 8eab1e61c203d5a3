// Counter-based noise and raw Philox words. A unit is a block of whole short rows or one segment of a long row; for the
// words it is one counter.
#include "draw.h"

namespace pyflow::PYFLOW_ISA {

namespace {

template <NoiseKind K>
void noise_unit(const NoiseArgs& a, const Tile& unit, DrawBuffer& draws) {
  alignas(64) float buffer[kChunk];
  for_each_chunk(unit, [&](const Tile& t, const Tile&) {
    float* z = target(a.space, a.out, t, buffer);
    draw<K>(a.stream, a.space, t, draws, z);
    store(a.space, a.out, t, z);
  });
}

}  // namespace

void noise(const NoiseArgs& a, int64_t begin, int64_t end) {
  DrawBuffer draws;
  as_constant(a.kind, [&](auto kind) {
    for (int64_t u = begin; u < end; ++u) noise_unit<kind.value>(a, unit_tile(a.space, a.plan, u), draws);
  });
  stream_fence();
}

void philox(const PhiloxArgs& a, int64_t begin, int64_t end) {
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
