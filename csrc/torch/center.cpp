#include "../args/center.h"

#include "device.h"

namespace pyflow {
namespace {

constexpr int64_t kCenterBytes = 4 << 20;  // matrices of a group

void center_into(const Tensor& gram, Tensor& out) {
  if (gram.numel() == 0) return;
  CenterArgs a{};
  a.f64 = is_f64(gram);
  Layout layout(gram, 1, true);
  layout.add(a.gram, gram);
  layout.add_output(a.out, out);
  a.space = layout.merge();
  a.n = a.space.cols;
  a.blocks = ceil_div(a.n, kCenterRows);
  const int64_t matrices = a.space.rows / a.n;
  Tensor rows = new_rows(gram, matrices * a.n, ScalarType::Double),
         means = new_rows(gram, matrices, ScalarType::Double);
  Tensor columns = new_rows(gram, matrices * a.blocks * a.n, ScalarType::Double);
  a.row_means = (double*)rows.data_ptr();
  a.columns = (double*)columns.data_ptr();
  a.means = (double*)means.data_ptr();
  // a group of matrices fits the caches, so that the second pass reads from them
  const int64_t group = 1 + kCenterBytes / (a.n * a.n * int64_t(gram.element_size()));
  for (int64_t first = 0; first < matrices; first += group) {
    const int64_t last = first + group < matrices ? first + group : matrices;
    const int64_t grain = grain_of(kCenterRows * a.n);
    run_units(cpu::center_sums, a, first * a.blocks, last * a.blocks, grain);
    run_units(cpu::center_means, a, first, last, grain_of(a.blocks * a.n));
    run_units(cpu::center_apply, a, first * a.blocks, last * a.blocks, grain);
  }
}

Tensor center_gram(Tensor gram) {
  const auto sizes = gram.sizes();
  Tensor out = new_empty(gram, sizes.data(), gram.dim(), gram.scalar_type());
  center_into(gram, out);
  return out;
}

void center_gram_(Tensor gram) { center_into(gram, gram); }

}  // namespace

PYFLOW_OPERATORS(m) {
  m.impl("center_gram", TORCH_BOX(&center_gram));
  m.impl("center_gram_", TORCH_BOX(&center_gram_));
}

}  // namespace pyflow
