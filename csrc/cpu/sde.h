// Arguments of the sde kernels; the functions live in one namespace per instruction set.
#pragma once

#include "noise.h"

namespace pyflow {

struct SdeArgs {
  Space space;
  Plan plan;
  bool f64;  // compute type: double for float64 x, float for everything else
  Stream stream;
  View x, score, noise;     // loss: x is the prediction; absent noise is drawn from the stream
  View a, b, c;             // one value, or one per row, stride[0] apart; loss: c is std, a the gradient
  View y, mean;             // forward
  View gy, gmean;           // backward, either may be absent
  View gx, gscore, gnoise;  // absent if not needed
  double* sums;             // (rows, segments, kSums), for kernels that compute sums
};

constexpr int kSums = 3;  // sums of a kernel at most: the gradients of a, b and c

}  // namespace pyflow
