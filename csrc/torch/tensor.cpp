#include "tensor.h"

#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pyflow {
namespace {

constexpr uintptr_t kHugePage = uintptr_t(2) << 20;
constexpr uintptr_t kHugeBytes = 2 * kHugePage;

// The system maps and clears a large result at first touch: with huge pages it takes one page fault per 2 MB instead of
// 512 (NumPy does the same for its arrays). Only advice: the system may ignore it.
void advise_huge_pages([[maybe_unused]] const Tensor& t) {
#ifdef MADV_HUGEPAGE
  const size_t bytes = t.numel() * t.element_size();
  if (bytes < kHugeBytes || !t.is_cpu()) return;
  const uintptr_t start = uintptr_t(t.data_ptr());
  const uintptr_t first = (start + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (start + bytes) / kHugePage * kHugePage;
  if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

Layout::Layout(const Tensor& like, int64_t col_dims, bool c_order) : c_order_(c_order) {
  dims_ = int(like.dim());
  row_dims_ = dims_ - int(col_dims);
  for (int d = 0; d < dims_; ++d) size_[d] = like.size(d);
}

Layout::Layout(int64_t rows, const Tensor& event) {
  dims_ = int(event.dim()) + 1;
  row_dims_ = 1;
  size_[0] = rows;
  for (int d = 1; d < dims_; ++d) size_[d] = event.size(d - 1);
}

Layout::Entry& Layout::entry(View& view, const Tensor& t) {
  view.dtype = dtype_of(t);
  view.data = (char*)t.data_ptr();
  Entry& e = entries_[count_++];
  e.view = &view;
  e.whole = false;
  for (int d = 0; d < dims_; ++d) e.stride[d] = 0;
  return e;
}

void Layout::add(View& view, const Tensor& t) { add_slice(view, t, 0, 0, 1); }

void Layout::add_output(View& view, const Tensor& t) {
  add(view, t);
  view.stream = streams(t);
}

void Layout::add_slice(View& view, const Tensor& t, int64_t dim, int64_t offset, int64_t step) {
  Entry& e = entry(view, t);
  e.whole = true;
  const auto strides = t.strides();
  for (int d = 0; d < dims_; ++d) e.stride[d] = strides[d];
  if (dims_ == 0) return;
  view.data += offset * e.stride[dim] * int64_t(t.element_size());
  e.stride[dim] *= step;
}

void Layout::add_moved(View& view, const Tensor& t, int64_t dim) {
  Entry& e = entry(view, t);
  const auto strides = t.strides();
  e.stride[0] = strides[dim];
  for (int d = 1; d < dims_; ++d) e.stride[d] = strides[d <= dim ? d - 1 : d];
}

void Layout::add_rows(View& view, const Tensor& t) {
  Entry& e = entry(view, t);
  const auto strides = t.strides();
  for (int d = 0; d < row_dims_; ++d) e.stride[d] = strides[d];
}

void Layout::add_event(View& view, const Tensor& t) {
  Entry& e = entry(view, t);
  const auto strides = t.strides();
  for (int d = row_dims_; d < dims_; ++d) e.stride[d] = strides[d - row_dims_];
}

// the order in which dims are visited: event dims in the memory order of the first tensor, for cache locality
void Layout::order_dims(int* order) const {
  for (int d = 0; d < dims_; ++d) order[d] = d;
  const int64_t* lead = entries_[0].stride;
  for (int i = row_dims_ + 1; !c_order_ && i < dims_; ++i) {
    for (int j = i; j > row_dims_ && lead[order[j]] > lead[order[j - 1]]; --j) std::swap(order[j], order[j - 1]);
  }
}

// Appends dims [begin, end) of the order, the rows or the event, to the space, of which `merged` dims are set: drops
// size 1 and joins neighbours that are contiguous with each other in every tensor. Returns the number of dims set.
int Layout::merge_dims(Space& space, int merged, const int* order, int begin, int end, int64_t unit_stride) {
  const int first = merged;
  int64_t count = 1;
  for (int i = begin; i < end; ++i) count *= size_[order[i]];
  // without elements there is one dim of size 0, because offsets divide by the sizes of inner dims
  for (int i = begin; count > 0 && i < end; ++i) {
    const int d = order[i];
    if (size_[d] == 1) continue;
    bool joins = merged > first;
    for (int k = 0; joins && k < count_; ++k) {
      joins = entries_[k].view->stride[merged - 1] == entries_[k].stride[d] * size_[d];
    }
    if (!joins) {
      STD_TORCH_CHECK(merged < kMaxDims - 1, "pyflow: more than ", kMaxDims - 1,
                      " dims that cannot be merged; make the tensors contiguous");
      space.size[merged++] = 1;
    }
    space.size[merged - 1] *= size_[d];
    for (int k = 0; k < count_; ++k) entries_[k].view->stride[merged - 1] = entries_[k].stride[d];
  }
  if (merged == first) {
    space.size[merged] = count;
    for (int k = 0; k < count_; ++k) entries_[k].view->stride[merged] = unit_stride;
    ++merged;
  }
  return merged;
}

Space Layout::merge() {
  int order[64];
  order_dims(order);
  Space space;
  for (int d = 0; d < row_dims_; ++d) space.rows *= size_[d];
  for (int d = row_dims_; d < dims_; ++d) space.cols *= size_[d];
  space.row_dims = merge_dims(space, 0, order, 0, row_dims_, space.cols);
  space.col_dims = merge_dims(space, space.row_dims, order, row_dims_, dims_, 1) - space.row_dims;
  for (int k = 0; k < count_; ++k) {
    if (!entries_[k].whole) continue;
    const int64_t* stride = entries_[k].view->stride;
    flat_ = flat_ && space.row_dims == 1 && space.col_dims == 1 && stride[1] == 1 && stride[0] == space.cols;
  }
  return space;
}

Tensor new_like(const Tensor& t) {
  if (!t.is_contiguous()) {
    Tensor out = torch::stable::empty_like(t);
    advise_huge_pages(out);
    return out;
  }
  const auto sizes = t.sizes();
  return new_empty(t, sizes.data(), int64_t(sizes.size()), t.scalar_type());
}

// not torch::stable::empty, which looks up its operator by name on every call: 1 us of the 7 us of a small call
Tensor new_empty(const Tensor& like, const int64_t* sizes, int64_t dims, ScalarType dtype) {
  int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle out = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes, dims, &type, nullptr, nullptr, 0, nullptr, &out));
  Tensor tensor(out);
  advise_huge_pages(tensor);
  return tensor;
}

}  // namespace pyflow
