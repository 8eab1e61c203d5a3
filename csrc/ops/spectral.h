// Spectral normalisation: the floor of the divisor sigma, and the gradient of W / sigma.
#pragma once

#include "../math/fn.h"

namespace pyflow {

constexpr double kSpectralFloor = 1e-12;  // lower bound of norms and of sigma

// whether |norm| is at most the floor; false for NaN
PYFLOW_FN bool spectral_vanishes(double norm) { return abs_(norm) <= kSpectralFloor; }

PYFLOW_FN double spectral_floored(double sigma) { return spectral_vanishes(sigma) ? kSpectralFloor : sigma; }

// factor of u v' in the gradient of W, with dot = sum(grad * W)
PYFLOW_FN double spectral_slope(double grad_sigma, double dot, double sigma) {
  return spectral_vanishes(sigma) ? 0.0 : grad_sigma - dot / (sigma * sigma);
}

// one element of the gradient; `slope` is spectral_slope times u of the row
template <class T>
PYFLOW_FN T spectral_gradient_of(T grad, T inverse_sigma, T slope, T v) {
  return fma_(slope, v, grad * inverse_sigma);
}

}  // namespace pyflow
