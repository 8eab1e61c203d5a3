// A Metropolis-adjusted Langevin step: one element of the log-ratio of the proposal densities, and the decision. No
// fma, so that every backend adds the same terms.
#pragma once

#include "../math/normal.h"

namespace pyflow {

// log q(z|z') - log q(z'|z), q(z'|z) ~ exp(-|z' - z + alpha g|^2 / (4 alpha)), is the sum of
// (g + g') ((z' - z) / 2 + alpha (g - g') / 4): the squares of the two norms cancel before they are rounded, nothing is
// divided by alpha, and the proposal is the one that was stored
template <class T>
PYFLOW_FN T transition(T z, T z_new, T grad, T grad_new, T alpha) {
  return (grad + grad_new) * (T(0.5) * (z_new - z) + T(0.25) * alpha * (grad - grad_new));
}

PYFLOW_FN bool is_finite(float x) { return abs_(x) <= 3.402823466385288598e38f; }
PYFLOW_FN bool is_finite(double x) { return abs_(x) <= 1.79769313486231570815e308; }

// log u < u_old - u_new + ratio; a proposal whose position, energy or gradient is not finite is rejected
template <class T>
PYFLOW_FN bool accepts(T u, T u_new, T ratio, float uniform) {
  if (!is_finite(u_new) || !is_finite(ratio)) return false;
  const float log_uniform = uniform > 0.f ? log_plain(uniform) : -float_of(0x7f800000u);  // log 0 = -inf
  return T(log_uniform) < u - u_new + ratio;
}

}  // namespace pyflow
