// Flow head, per element: log-density of the prior at z = h e^{log_scale}, plus log_scale.
#pragma once

#include "../math/log.h"
#include "../math/tanh.h"
#include "../tiles/enum.h"

// in the order of PRIORS in pyflow/_schemas.py
#define PYFLOW_PRIORS(F) \
  F(gaussian)            \
  F(logistic)

namespace pyflow {

PYFLOW_ENUM(Prior, PYFLOW_PRIORS)

constexpr double kHalfLog2Pi = 0.91893853320467274178;

// log-density of the prior at z without its constant, which the caller adds once per sum
template <Prior P, class T>
PYFLOW_FN T prior_log_density(T z) {
  if constexpr (P == Prior::gaussian) {
    return T(-0.5) * z * z;
  } else {
    // -softplus(z) - softplus(-z)
    const T a = abs_(z);
    return -fma_(T(2), log1p01(exp_(-a)), a);
  }
}

template <Prior P>
constexpr double kPriorConstant = P == Prior::gaussian ? -kHalfLog2Pi : 0.0;

// derivative of prior_log_density
template <Prior P, class T>
PYFLOW_FN T prior_score(T z) {
  return P == Prior::gaussian ? -z : -tanh_(T(0.5) * z);
}

}  // namespace pyflow
