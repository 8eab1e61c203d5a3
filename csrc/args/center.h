// Arguments of the kernels that centre Gram matrices.
#pragma once

#include "../cpu/dispatch.h"
#include "../tiles/plan.h"

namespace pyflow {

constexpr int64_t kCenterRows = 64;  // rows of a matrix in a unit

struct CenterArgs {
  Space space;  // (matrices, n) x (n)
  View gram, out;
  int64_t n, blocks;  // blocks of rows in a matrix
  double* row_means;  // (matrices, n)
  double* columns;    // (matrices, blocks, n): column sums; center_means replaces block 0 by the column means
  double* means;      // (matrices)
  bool f64;
};

PYFLOW_CPU_KERNEL(center_sums, CenterArgs)
PYFLOW_CPU_KERNEL(center_means, CenterArgs)
PYFLOW_CPU_KERNEL(center_apply, CenterArgs)

}  // namespace pyflow
