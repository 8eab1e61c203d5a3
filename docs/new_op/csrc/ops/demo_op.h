// One element of demo_op, and its derivative.
#pragma once

#include "../math/log.h"

namespace pyflow {

template <class T>
PYFLOW_FN T demo_op_value(T x, T scale) {
  return scale * softplus(x);
}

template <class T>
PYFLOW_FN T demo_op_slope(T x, T scale) {
  return scale * sigmoid(x);
}

}  // namespace pyflow
