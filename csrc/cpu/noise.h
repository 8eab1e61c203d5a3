// Arguments of the noise kernels; the functions live in one namespace per instruction set.
#pragma once

#include "../ops/noise.h"
#include "view.h"

namespace pyflow {

// random stream of a call: one over all elements in C order, or one per row
struct Stream {
  const int64_t* seed;
  int64_t seed_stride;  // between rows
  bool per_row;
  uint64_t step;
  int purpose;
};

struct NoiseArgs {
  Space space;
  Plan plan;
  NoiseKind kind;
  Stream stream;
  View out;
};

// contiguous int64 words: counter (n, 4), key (n, 2), out (n, 4)
struct PhiloxArgs {
  const int64_t *counter, *key;
  int64_t* out;
};

}  // namespace pyflow
