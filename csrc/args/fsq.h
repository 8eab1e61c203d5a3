// Arguments of the quantisation kernels.
#pragma once

#include "../tiles/plan.h"

namespace pyflow {

// Constants of the channels: six arrays of `period` entries, one per field of FsqChannel in their order, and one array
// for the basis. Entry i of an array belongs to channel i % channels.
struct FsqTable {
  const char* constants;  // of the compute type
  const char* basis;      // of the index type
  int64_t period;         // entries per array
};

// a unit is a tile of at most kChunk positions; with flat and in the residual operators, of at most kChunk values
struct FsqArgs {
  Space space;  // channels x positions; flat: one row of positions * channels
  FsqTable table;
  int64_t channels, positions, tile;
  bool flat;  // the channels of a position are adjacent in memory
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
  uint64_t size;  // entries of the codebook
};

// the scale of stage q and entry i is scales[q * period + i]; stages >= active are dropped: index -1, nothing added
struct ResidualFsqForward : FsqForward {
  const char* scales;      // of the compute type
  int64_t stages, active;  // the indices of a position are adjacent
};

struct ResidualFsqBackward : FsqBackward {
  const char* scales;
  int64_t stages, active;
};

#define PYFLOW_FSQ_KERNELS(F)                 \
  F(fsq_forward, FsqForward)                  \
  F(fsq_backward, FsqBackward)                \
  F(fsq_decode, FsqDecode)                    \
  F(residual_fsq_forward, ResidualFsqForward) \
  F(residual_fsq_backward, ResidualFsqBackward)

}  // namespace pyflow
