// Arguments of the energy kernels.
#pragma once

#include "../cpu/dispatch.h"
#include "../ops/energy.h"
#include "noise.h"

namespace pyflow {

struct MalaArgs {
  Space space;
  Plan plan;
  bool f64;
  RandomStream stream;  // of the accept uniforms, one per row
  View z, z_new, grad, grad_new;
  RowView alpha, u, u_new;
  View z_out, grad_out;
  RowView u_out;
  uint8_t* accepted;  // (rows)
  RowSums log_ratio;  // absent if a row is one segment, which mala_accept sums
};

struct SquaresArgs {
  Space space;
  Plan plan;
  bool f64;
  View x;
  RowSums squares;
};

PYFLOW_CPU_KERNEL(mala_sums, MalaArgs)
PYFLOW_CPU_KERNEL(mala_accept, MalaArgs)
PYFLOW_CPU_KERNEL(row_squares, SquaresArgs)

namespace cuda {
void mala_sums(const MalaArgs&, Stream);
void mala_accept(const MalaArgs&, Stream);
void row_squares(const SquaresArgs&, Stream);
}  // namespace cuda

}  // namespace pyflow
