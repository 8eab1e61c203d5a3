// Spectral normalisation: what is divided by, and the gradient of W / sigma.
#pragma once

#include "../math/fn.h"

namespace pyflow {

constexpr double kSpectralFloor = 1e-12;  // what no norm and no sigma falls below

// next to 0; NaN is not
PYFLOW_FN bool spectral_vanishes(double norm) { return abs_(norm) <= kSpectralFloor; }

PYFLOW_FN double spectral_floored(double sigma) { return spectral_vanishes(sigma) ? kSpectralFloor : sigma; }

// d sigma: what multiplies u v' in the gradient, with dot = sum(grad W)
PYFLOW_FN double spectral_slope(double grad_sigma, double dot, double sigma) {
  return spectral_vanishes(sigma) ? 0.0 : grad_sigma - dot / (sigma * sigma);
}

template <class T>
PYFLOW_FN T spectral_gradient_of(T grad, T inverse_sigma, T slope, T v) {
  return fma_(slope, v, grad * inverse_sigma);
}

}  // namespace pyflow
