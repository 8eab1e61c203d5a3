// Arguments of the sde kernels; the functions live in one namespace per instruction set.
#pragma once

#include "noise.h"

namespace pyflow {

struct SdeArgs {
  Space space;
  Plan plan;
  bool f64;  // compute type: double for float64 x, float for everything else
  Stream stream;
  View x, score, noise;     // of the loss, x is the prediction; absent noise is drawn from the stream
  View a, b, c;             // one value or one per row, stride[0] apart; of the loss, c is std and a the gradient
  View y, mean;             // forward
  View gy, gmean;           // backward, either may be absent
  View gx, gscore, gnoise;  // absent where not asked for
  double* sums;             // (rows, segments, kSums) where a kernel sums
};

constexpr int kSums = 3;  // at most: gradients of a, b and c

}  // namespace pyflow
