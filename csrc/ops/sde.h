// Steps of stochastic differential equations, and the loss that trains their score: one element of each. No fma, so
// that every backend gives the same bits for the same noise.
#pragma once

#include "../math/fn.h"

namespace pyflow {

template <class T>
PYFLOW_FN T drift(T x, T score, T a, T b) {
  return a * x + b * score;
}

// -0 becomes +0, so that noise that is not added leaves the same bits whatever its sign
template <class T>
PYFLOW_FN T diffuse(T mean, T c, T z) {
  return mean + (c * z + T(0));
}

// what the loss squares: std * score + z, or of a prediction of z its error
template <bool Score, class T>
PYFLOW_FN T residual(T pred, T std, T z) {
  return Score ? std * pred + z : pred - z;
}

}  // namespace pyflow
