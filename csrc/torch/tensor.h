// Conversion of stable-ABI tensors to the plain views that the kernels take.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../cpu/stream.h"
#include "../tiles/plan.h"

namespace pyflow {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Bool: return DType::u8;
    case ScalarType::Int: return DType::i32;
    case ScalarType::Long: return DType::i64;
    default: break;
  }
  STD_TORCH_CHECK(false, "pyflow: unsupported dtype");
}

// Collects the tensors of one call, then merges neighbouring dims that are contiguous with each other in all of them.
class Layout {
 public:
  // the last `col_dims` dims of `like` are the event, visited in C order or, for cache locality, in memory order
  Layout(const Tensor& like, int64_t col_dims, bool c_order = false);
  // one row dim of size `rows`, then the dims of `event`
  Layout(int64_t rows, const Tensor& event);
  // `t` has the sizes of `like`; `offset` and `step` pick a slice along `dim` without a copy
  void add(View& view, const Tensor& t);
  // a result, written with streaming stores if it is too large for the caches
  void add_output(View& view, const Tensor& t);
  void add_slice(View& view, const Tensor& t, int64_t dim, int64_t offset, int64_t step);
  // the single row dim of the space is dim `dim` of `t`
  void add_moved(View& view, const Tensor& t, int64_t dim);
  // `t` has the sizes of the row dims of `like`
  void add_rows(View& view, const Tensor& t);
  // `t` has the sizes of the event dims of `like`
  void add_event(View& view, const Tensor& t);
  Space merge();
  // whether every full-size view is contiguous in the order of the iteration space
  bool flat() const { return flat_; }

 private:
  struct Entry {
    View* view;
    bool whole;  // full size: has every dim of the space
    int64_t stride[64];
  };
  static constexpr int kMaxViews = 12;
  Entry& entry(View& view, const Tensor& t);
  void order_dims(int* order) const;
  int merge_dims(Space& space, int merged, const int* order, int begin, int end, int64_t unit_stride);
  int dims_, row_dims_;
  int64_t size_[64];
  Entry entries_[kMaxViews];
  int count_ = 0;
  bool flat_ = true, c_order_ = false;
};

// uninitialised, with the strides of torch.empty_like
Tensor new_like(const Tensor& t);
// whether an output is too large for the caches and is written with streaming stores
inline bool streams(const Tensor& t) { return t.numel() * int64_t(t.element_size()) >= kStreamBytes; }

// uninitialised, contiguous
Tensor new_empty(const Tensor& like, const int64_t* sizes, int64_t dims, ScalarType dtype);

}  // namespace pyflow
