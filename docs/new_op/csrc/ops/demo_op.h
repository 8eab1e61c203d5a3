// One element of demo_op, y = scale * softplus(x), and its derivatives.
#pragma once

#include "../math/log.h"

namespace pyflow {

template <class T>
PYFLOW_FN T demo_op_value(T x, T scale) {
  return scale * softplus(x);
}

// log dy/dx
template <class T>
PYFLOW_FN T demo_op_log_slope(T x, T log_scale) {
  return log_scale - softplus(-x);
}

// gradient of x for the gradients gy of y and gl of the sum of log slopes
template <class T>
PYFLOW_FN T demo_op_gradient(T gy, T gl, T x, T scale) {
  return gy * (scale * sigmoid(x)) + gl * sigmoid(-x);
}

}  // namespace pyflow
