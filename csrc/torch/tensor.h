// The bridge between stable-ABI tensors and the plain views the kernels take.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../cpu/stream.h"
#include "../cpu/view.h"

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

// Collects the tensors of one call, then merges the dims that all of them lay out alike.
class Layout {
 public:
  // the last `col_dims` dims of `like` are the event, visited in C order or, for the cache, in that of memory
  Layout(const Tensor& like, int64_t col_dims, bool c_order = false);
  // an event of the sizes of `event`, one row dim in front
  Layout(int64_t rows, const Tensor& event);
  // `t` has the sizes of `like`; `offset` and `step` pick a slice along `dim` without a copy
  void add(View& view, const Tensor& t);
  void add_slice(View& view, const Tensor& t, int64_t dim, int64_t offset, int64_t step);
  // `t` has the row dim, the only one, at `dim`
  void add_moved(View& view, const Tensor& t, int64_t dim);
  // `t` has the sizes of the row dims of `like`
  void add_rows(View& view, const Tensor& t);
  // `t` has the sizes of the event dims of `like`
  void add_event(View& view, const Tensor& t);
  Space merge();
  // every view is one run of memory in the order of the iteration space
  bool flat() const { return flat_; }

 private:
  struct Entry {
    View* view;
    bool whole;  // has every dim of the space
    int64_t stride[64];
  };
  static constexpr int kMaxViews = 12;
  Entry& entry(View& view, const Tensor& t);
  int dims_, row_dims_;
  int64_t size_[64];
  Entry entries_[kMaxViews];
  int count_ = 0;
  bool flat_ = true, c_order_ = false;
};

// uninitialised, with the strides torch.empty_like gives
Tensor new_like(const Tensor& t);
// whether an output is too large for the caches
inline bool streams(const Tensor& t) { return t.numel() * int64_t(t.element_size()) >= kStreamBytes; }

// contiguous
Tensor new_empty(const Tensor& like, const int64_t* sizes, int64_t dims, ScalarType dtype);

}  // namespace pyflow
