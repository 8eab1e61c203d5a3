// Arguments of the quantisation kernels.
#pragma once

#include "../cpu/dispatch.h"
#include "../cuda/shared.h"
#include "../ops/fsq.h"
#include "../tiles/plan.h"

namespace pyflow {

constexpr int kFsqFields = 6;     // constants of a channel: the fields of FsqChannel
constexpr int kFsqChannels = 64;  // GPU: most channels of a launch

// Constants of the channels: kFsqFields arrays of `period` entries, one per field of FsqChannel in their order, and one
// array for the basis. Entry i of an array belongs to channel i % channels. In host memory: a GPU launch copies them
// into its kernel parameters.
struct FsqTable {
  const char* constants;  // of the compute type; GPU: float32
  const char* basis;      // of the index type; GPU: int64
  int64_t period;         // entries per array; GPU: one per channel
};

// a unit is a tile of positions with all their channels
struct FsqArgs {
  Space space;  // channels x positions; CPU, flat: one row of positions * channels
  Plan plan;
  FsqTable table;
  const int64_t* levels;  // (channels), in host memory
  int64_t channels, positions;
  int64_t tile;  // CPU: at most kChunk positions, or values if flat or residual; GPU: at most kTile values
  bool flat;     // channels are the faster index; CPU: and all values are adjacent in memory
  bool f64;
  bool wide;  // indices are int64
  FsqVariant variant;
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
  uint64_t size;  // entries of the codebook
};

// the scale of stage q and entry i is scales[q * period + i]; stages >= active have index -1 and add nothing
struct FsqStages {
  const char* scales;            // like FsqTable::constants
  int64_t stages, active;        // the indices of a position are adjacent
  const int64_t* device_active;  // GPU: replaces `active`; may be absent
};

struct ResidualFsqForward : FsqForward, FsqStages {};
struct ResidualFsqBackward : FsqBackward, FsqStages {};

PYFLOW_CPU_KERNEL(fsq_forward, FsqForward)
PYFLOW_CPU_KERNEL(fsq_backward, FsqBackward)
PYFLOW_CPU_KERNEL(fsq_decode, FsqDecode)
PYFLOW_CPU_KERNEL(residual_fsq_forward, ResidualFsqForward)
PYFLOW_CPU_KERNEL(residual_fsq_backward, ResidualFsqBackward)

namespace cuda {
void fsq_forward(const FsqForward&, Stream);
void fsq_backward(const FsqBackward&, Stream);
void fsq_decode(const FsqDecode&, Stream);
void residual_fsq_forward(const ResidualFsqForward&, Stream);
void residual_fsq_backward(const ResidualFsqBackward&, Stream);
}  // namespace cuda

}  // namespace pyflow
