// Tensor arguments of a kernel: pointer, dtype and strides per tensor, one iteration space for all tensors, and one
// value per row. Plain structs, the same for the CPU and CUDA.
#pragma once

#include "../math/fn.h"

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
  bool stream = false;            // written by streaming stores of a CPU, see cpu/stream.h
  int64_t stride[kMaxDims] = {};  // in elements, same dims as the Space
};

// one number for all rows, or one per row: a caller's number is passed by value
struct RowView {
  View view;         // one value per row, stride[0] apart; 0 for a single value in memory
  double value = 0;  // used if the view has no data
};

// Sums over the columns, one or more per row. A row of several segments has a partial sum per segment, which
// sum_segments adds in a fixed order.
struct RowSums {
  void* out = nullptr;  // (count, rows) of the compute type
  void* partial =
      nullptr;  // (count, rows, segments): float64 on a CPU, of the compute type on a GPU; null: one segment
};

// the offset of element `index` of dims [first, end); a loop that is not unrolled, since every access has one
PYFLOW_FN int64_t offset_in(const Space& s, const View& v, int64_t index, int first, int end) {
  int64_t offset = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
  for (int d = end - 1; d > first; --d) {
    const int64_t rest = index / s.size[d];
    offset += (index - rest * s.size[d]) * v.stride[d];
    index = rest;
  }
  return offset + index * v.stride[first];
}

PYFLOW_FN int64_t row_offset(const Space& s, const View& v, int64_t row) { return offset_in(s, v, row, 0, s.row_dims); }

PYFLOW_FN int64_t col_offset(const Space& s, const View& v, int64_t col) {
  return offset_in(s, v, col, s.row_dims, s.row_dims + s.col_dims);
}

}  // namespace pyflow
