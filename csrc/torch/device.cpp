#include "device.h"

#include <array>

#include "../math/half.h"

namespace pyflow {

namespace {

double number_in_memory(const Tensor& t) {
  const void* data = t.data_ptr();
  switch (dtype_of(t)) {
    case DType::f64: return *(const double*)data;
    case DType::f32: return *(const float*)data;
    case DType::bf16: return bf16_to_float(*(const uint16_t*)data);
    case DType::f16: return half_to_float(*(const uint16_t*)data);
    default: STD_TORCH_CHECK(false, "pyflow: a number must be of a float dtype");
  }
}

}  // namespace

RowView row_view(const Tensor& t) {
  RowView v;
  if (is_host_number(t)) {
    v.value = number_in_memory(t);
    return v;
  }
  v.view.data = (char*)t.data_ptr();
  v.view.dtype = dtype_of(t);
  v.view.stride[0] = t.dim() > 0 ? t.stride(0) : 0;
  return v;
}

SumTensors::SumTensors(RowSums& sums, const Tensor& like, const Space& space, const Plan& plan, ScalarType dtype,
                       int64_t count)
    : SumTensors(sums, like, std::array<int64_t, 2>{count, space.rows}.data(), 2, space, plan, dtype) {}

SumTensors::SumTensors(RowSums& sums, const Tensor& like, const int64_t* sizes, int64_t dims, const Space& space,
                       const Plan& plan, ScalarType dtype)
    : out(new_empty(like, sizes, dims, dtype)),
      sums_(sums),
      partial_(out),
      rows_(out.numel()),
      segments_(plan.segments),
      none_(space.rows * space.cols == 0) {
  sums_.out = out.data_ptr();
  sums_.partial = nullptr;
  if (segments_ == 1) return;
  partial_ = new_rows(like, rows_ * segments_, kCuda ? dtype : ScalarType::Double);
  sums_.partial = partial_.data_ptr();
}

void SumTensors::finish() {
  const bool f64 = is_f64(out);
  if (none_) {
    torch::stable::zero_(out);
  } else if (!sums_.partial) {
    return;
  } else if constexpr (kCuda) {
    launch(out, [&](cuda::Stream stream) { cuda::sum_segments(sums_, rows_, segments_, f64, stream); });
  } else {
    const double* partial = (const double*)sums_.partial;
    for (int64_t r = 0; r < rows_; ++r) {
      double total = 0;
      for (int64_t i = 0; i < segments_; ++i) total += *partial++;
      f64 ? ((double*)sums_.out)[r] = total : ((float*)sums_.out)[r] = float(total);
    }
  }
}

}  // namespace pyflow
