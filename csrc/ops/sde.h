// One element of a step of a stochastic differential equation, and of the denoising loss that trains its score. No fma:
// every backend gives the same bits for the same noise.
#pragma once

#include "../math/fn.h"

namespace pyflow {

template <class T>
PYFLOW_FN T drift(T x, T score, T a, T b) {
  return a * x + b * score;
}

// + 0 turns -0 into +0: with c = 0 the sign of z does not change the result's bits
template <class T>
PYFLOW_FN T diffuse(T mean, T c, T z) {
  return mean + (c * z + T(0));
}

// the residual that the loss squares: std * score + z, or pred - z if the network predicts z
template <bool Score, class T>
PYFLOW_FN T residual(T pred, T std, T z) {
  return Score ? std * pred + z : pred - z;
}

}  // namespace pyflow
