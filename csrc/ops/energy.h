// Metropolis-adjusted Langevin step (MALA): one element's term of the log-ratio of the proposal densities, and the
// accept decision. No fma: every backend adds the same terms.
#pragma once

#include "../math/normal.h"

namespace pyflow {

// With q(z'|z) ~ exp(-|z' - z + alpha g|^2 / (4 alpha)), log q(z|z') - log q(z'|z) is the sum of
// (g + g') ((z' - z) / 2 + alpha (g - g') / 4): the two squared norms cancel before rounding, nothing is divided by
// alpha, and z' is the proposal as stored, after rounding.
template <class T>
PYFLOW_FN T transition(T z, T z_new, T grad, T grad_new, T alpha) {
  return (grad + grad_new) * (T(0.5) * (z_new - z) + T(0.25) * alpha * (grad - grad_new));
}

PYFLOW_FN bool is_finite(float x) { return abs_(x) <= 3.402823466385288598e38f; }
PYFLOW_FN bool is_finite(double x) { return abs_(x) <= 1.79769313486231570815e308; }

// whether log(uniform) < u - u_new + ratio, with energies u; rejects a position, energy or gradient that is not finite
template <class T>
PYFLOW_FN bool accepts(T u, T u_new, T ratio, float uniform) {
  if (!is_finite(u_new) || !is_finite(ratio)) return false;
  const float log_uniform = uniform > 0.f ? log_plain(uniform) : -float_of(0x7f800000u);  // log 0 = -inf
  return T(log_uniform) < u - u_new + ratio;
}

}  // namespace pyflow
