// Arguments of the quantisation kernels; the functions live in one namespace per instruction set.
#pragma once

#include "view.h"

namespace pyflow {

// What a kernel needs of the channels: six runs of constants (FsqChannel's fields in their order) and one of the
// basis, entry i of a run for channel i % channels.
struct FsqTable {
  const char* constants;  // of the compute type
  const char* basis;      // of the index type
  int64_t period;         // entries in a run
};

// units: tiles of positions, at most kChunk of them; flat, and in the residual operators, at most kChunk values
struct FsqArgs {
  Space space;  // (channels) x (positions); flat: one row of positions x channels
  FsqTable table;
  int64_t channels, positions, tile;
  bool flat;  // the channels of a position lie side by side
  bool f64;
  bool wide;     // indices are int64
  int variant;   // FsqVariant
  View indices;  // over the positions; may be absent
};

struct FsqForward : FsqArgs {
  View z, codes;
};

struct FsqBackward : FsqArgs {
  View grad, z, gz;
};

struct FsqDecode : FsqArgs {
  View codes;
  const int64_t* levels;
  uint64_t size;  // of the codebook
};

// the scale of stage q and entry i is scales[q * period + i]; stages from `active` on do nothing
struct ResidualFsqForward : FsqForward {
  const char* scales;      // of the compute type
  int64_t stages, active;  // a position's indices lie side by side
};

struct ResidualFsqBackward : FsqBackward {
  const char* scales;
  int64_t stages, active;
};

}  // namespace pyflow
