// Arguments of the noise kernels.
#pragma once

#include "../cpu/dispatch.h"
#include "../cuda/shared.h"
#include "../ops/noise.h"
#include "../tiles/plan.h"

namespace pyflow {

// a seed or a step. A single number in host memory is passed by value; a CPU kernel reads only seeds per row through
// `data`.
struct Number {
  const int64_t* data;  // on the kernel's device; null: use `value`
  int64_t value;
};

// random stream of a call: one over all elements in C order, or one per row
struct RandomStream {
  Number seed, step;
  int64_t seed_stride;  // between rows
  bool per_row;
  int purpose;
};

PYFLOW_FN uint64_t seed_of(const RandomStream& s, int64_t row) {
  return uint64_t(s.seed.data ? s.seed.data[row * s.seed_stride] : s.seed.value);
}

struct NoiseArgs {
  Space space;
  Plan plan;
  NoiseKind kind;
  RandomStream stream;
  View out;
};

// contiguous int64 words: counter (n, 4), key (n, 2), out (n, 4); the plan has n units
struct PhiloxArgs {
  Plan plan;
  const int64_t *counter, *key;
  int64_t* out;
};

PYFLOW_CPU_KERNEL(noise, NoiseArgs)
PYFLOW_CPU_KERNEL(philox, PhiloxArgs)

namespace cuda {
void noise(const NoiseArgs&, Stream);
void philox(const PhiloxArgs&, Stream);
}  // namespace cuda

}  // namespace pyflow
