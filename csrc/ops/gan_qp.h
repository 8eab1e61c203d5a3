// GAN-QP critic: the distance d of two samples, and the loss -D + D^2 / (2 lam (d + eps)) of a sample with
// D = t_real - t_fake. No fma.
#pragma once

#include "../math/fn.h"
#include "../tiles/enum.h"

// in the order of DISTANCES in pyflow/_schemas.py
#define PYFLOW_DISTANCES(F) \
  F(l1)                     \
  F(l2)

namespace pyflow {

PYFLOW_ENUM(Distance, PYFLOW_DISTANCES)

// one element's term: the distance is the mean of the terms (l1) or the square root of the mean (l2)
template <Distance D, class T>
PYFLOW_FN T deviation(T real, T fake) {
  const T difference = real - fake;
  return D == Distance::l1 ? abs_(difference) : difference * difference;
}

template <class T>
PYFLOW_FN T mean_distance(Distance distance, T sum, int64_t n) {
  const T mean = sum / T(n);
  return distance == Distance::l1 ? mean : sqrt_(mean);
}

// 2 lam (d + eps), with lam2 = 2 lam; where it is 0, so are the loss and its slope
template <class T>
PYFLOW_FN T width_of(T d, T lam2, T eps) {
  return lam2 * (d + eps);
}

template <class T>
PYFLOW_FN T quadratic_loss(T delta, T width) {
  const T loss = delta * (delta / width) - delta;
  return width == T(0) ? T(0) : loss;
}

// derivative of quadratic_loss with respect to delta
template <class T>
PYFLOW_FN T quadratic_slope(T delta, T width) {
  const T slope = T(2) * (delta / width) - T(1);
  return width == T(0) ? T(0) : slope;
}

}  // namespace pyflow
