#include "../../../csrc/args/center.h"

#include "common.h"

namespace pyflow {
namespace {

void center(int64_t n) {
  const int64_t matrices = 2;
  std::vector<float> gram(matrices * n * n), out(gram.size());
  for (float& v : gram) v = uniform();
  CenterArgs a{};
  a.space = space(matrices * n, n);
  a.gram = view(gram, DType::f32, n);
  a.out = view(out, DType::f32, n);
  a.n = n;
  a.blocks = ceil_div(n, kCenterRows);
  std::vector<double> row_means(matrices * n), columns(matrices * a.blocks * n), means(matrices);
  a.row_means = row_means.data();
  a.columns = columns.data();
  a.means = means.data();
  cpu::center_sums(a, 0, matrices * a.blocks);
  cpu::center_means(a, 0, matrices);
  cpu::center_apply(a, 0, matrices * a.blocks);
  print("center", out);
}

}  // namespace

PYFLOW_BITS(center) {
  for (int64_t n : {1, 63, 200}) center(n);
}

}  // namespace pyflow
