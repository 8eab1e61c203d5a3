// Arguments of the energy kernels; the functions live in one namespace per instruction set.
#pragma once

#include "noise.h"

namespace pyflow {

struct MalaArgs {
  Space space;
  Plan plan;
  bool f64;
  Stream stream;  // of the accept uniforms, one per row
  View z, z_new, grad, grad_new;
  View alpha, u, u_new;  // row views: one value per row, stride[0] apart
  View z_out, grad_out, u_out;
  uint8_t* accepted;  // (rows)
  double* sums;       // (rows, segments)
};

struct SquaresArgs {
  Space space;
  Plan plan;
  bool f64;
  View x;
  double* sums;  // (rows, segments)
};

}  // namespace pyflow
