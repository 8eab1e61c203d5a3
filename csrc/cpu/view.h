// Tensor arguments of a CPU kernel: pointer, dtype and strides per tensor, one iteration space for all tensors, and the
// plan that splits it. Plain structs, shared by every instruction set.
#pragma once

#include <cstdint>

namespace pyflow {

enum class DType : int { f32, f64, bf16, f16, u8, i32, i64 };  // i32, i64: indices, never converted

constexpr int kMaxDims = 12;  // counted after adjacent dims are merged

// rows x cols: the leading dims are the batch, the trailing dims the event that row sums run over
struct Space {
  int row_dims = 0;
  int col_dims = 0;
  int64_t size[kMaxDims] = {};  // row dims, then column dims
  int64_t rows = 1;
  int64_t cols = 1;
};

struct View {
  char* data = nullptr;  // null: the tensor is absent
  DType dtype = DType::f32;
  bool stream = false;            // written by streaming stores, see stream.h
  int64_t stride[kMaxDims] = {};  // in elements, same dims as the Space
};

// The plan does not depend on the thread count, so neither do sums. A unit is a block of whole short rows, or one
// segment of a long row.
constexpr int64_t kChunk = 512;  // elements per chunk: the buffers of a kernel stay in L1
constexpr int64_t kSegment = 16 * kChunk;

// smallest number of units per thread, for units of `elements` elements
inline int64_t grain_of(int64_t elements) { return elements > 32768 ? 1 : 32768 / (elements > 0 ? elements : 1); }

struct Plan {
  int64_t tile_rows;  // rows in a unit
  int64_t segments;   // units in a row
  int64_t units;
  int64_t grain;  // smallest number of units per thread
};

// `flat`: every tensor is contiguous, so short rows are cheaper several at a time
inline Plan plan_of(const Space& s, bool flat) {
  Plan p;
  const bool row_by_row = s.cols > kChunk / 2 || (!flat && s.cols >= 128);
  p.tile_rows = row_by_row ? 1 : kChunk / (s.cols > 0 ? s.cols : 1);
  p.segments = s.cols > kSegment ? (s.cols + kSegment - 1) / kSegment : 1;
  p.units = (s.rows + p.tile_rows - 1) / p.tile_rows * p.segments;
  p.grain = grain_of(p.tile_rows * (s.cols < kSegment ? s.cols : kSegment));
  return p;
}

}  // namespace pyflow
