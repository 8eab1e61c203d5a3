// Arguments of the flow-head kernels; the functions live in one namespace per instruction set.
#pragma once

#include "view.h"

namespace pyflow {

constexpr int64_t kHeadRows = 32;             // rows that share one exponential of log_scale
constexpr int64_t kHeadSegment = 4 * kChunk;  // columns of a unit; its buffers stay in L1

// a unit is kHeadRows rows x one segment of kHeadSegment columns, segment fastest
struct FlowHeadArgs {
  Space space;
  int64_t segments;
  bool f64;
  int prior;          // Prior
  View h, log_scale;  // log_scale may be absent
};

struct FlowHeadForward : FlowHeadArgs {
  double* partial;  // (rows, segments)
};

struct FlowHeadBackward : FlowHeadArgs {
  View grad;  // row dims only
  View gh, glog_scale;
  char* partial;  // (row blocks, cols) of the compute type, absent without log_scale
};

}  // namespace pyflow
