// Coupling layers: the scale maps g(s), their derivatives, and one element forward and backward.
//   forward  y = x e^g + shift          (shift_first: (x + shift) e^g)
//   inverse  y = (x - shift) e^{-g}     (shift_first: x e^{-g} - shift)
#pragma once

#include "../math/atan.h"
#include "../math/exp.h"
#include "../math/log.h"
#include "../math/tanh.h"

namespace pyflow {

// the order is the `scale_map` integer of the operator schema; `resolve` turns sigmoid and softplus with eps > 0 into
// their own formulas, once per call
enum class ScaleMap : int {
  exp,
  sigmoid,
  sigmoid_inv,
  softplus,
  tanh,
  atan,
  softsign,
  softplus_clamp,
  sigmoid_eps,
  softplus_eps
};

PYFLOW_FN ScaleMap resolve(int64_t scale_map, double arg) {
  const ScaleMap m = ScaleMap(scale_map);
  if (m == ScaleMap::sigmoid && arg > 0) return ScaleMap::sigmoid_eps;
  if (m == ScaleMap::softplus && arg > 0) return ScaleMap::softplus_eps;
  return m;
}

template <class T>
struct LogScale {
  T g;      // log-scale
  T slope;  // dg/ds
};

constexpr double kAtanGain = 0.636;  // FrEIA's constant, close to 2/pi
// nflows' constants of softplus_clamp
constexpr double kClampEps = 1e-3, kClampMax = 3.0;

// `arg` is the one constant a map uses: clamp (tanh, atan), eps (sigmoid, softplus), c (softsign)
template <ScaleMap M, class T>
PYFLOW_FN T log_scale(T s, T arg) {
  if constexpr (M == ScaleMap::exp) {
    return s;
  } else if constexpr (M == ScaleMap::sigmoid) {
    return -softplus(-(s + T(2)));
  } else if constexpr (M == ScaleMap::sigmoid_eps) {
    return log_(sigmoid(s + T(2)) + arg);
  } else if constexpr (M == ScaleMap::sigmoid_inv) {
    return softplus(-(s + T(2)));
  } else if constexpr (M == ScaleMap::softplus) {
    // log(softplus(s)) is -inf once softplus underflows
    return s < T(-15) ? s - T(0.5) * exp_(s) : log_(softplus(s));
  } else if constexpr (M == ScaleMap::softplus_eps) {
    return log_(softplus(s) + arg);
  } else if constexpr (M == ScaleMap::tanh) {
    return arg * tanh_(s * (T(1) / arg));
  } else if constexpr (M == ScaleMap::atan) {
    return arg * T(kAtanGain) * atan_(s);
  } else if constexpr (M == ScaleMap::softplus_clamp) {
    const T p = softplus(s) + T(kClampEps);
    return log_(p > T(kClampMax) ? T(kClampMax) : p);
  } else {
    return s / (T(1) + abs_(s) * (T(1) / arg));
  }
}

template <ScaleMap M, class T>
PYFLOW_FN LogScale<T> log_scale_slope(T s, T arg) {
  if constexpr (M == ScaleMap::exp) {
    return {s, T(1)};
  } else if constexpr (M == ScaleMap::sigmoid) {
    const T t = -(s + T(2));
    return {-softplus(t), sigmoid(t)};
  } else if constexpr (M == ScaleMap::sigmoid_eps) {
    const T p = sigmoid(s + T(2));
    const T q = sigmoid(-(s + T(2)));
    return {log_(p + arg), p * q / (p + arg)};
  } else if constexpr (M == ScaleMap::sigmoid_inv) {
    const T t = -(s + T(2));
    return {softplus(t), -sigmoid(t)};
  } else if constexpr (M == ScaleMap::softplus) {
    const T slope = sigmoid(s) / softplus(s);
    return {log_scale<M>(s, arg), s < T(-15) ? T(1) - T(0.5) * exp_(s) : slope};
  } else if constexpr (M == ScaleMap::softplus_eps) {
    const T p = softplus(s) + arg;
    return {log_(p), sigmoid(s) / p};
  } else if constexpr (M == ScaleMap::tanh) {
    const T t = tanh_(s * (T(1) / arg));
    return {arg * t, fma_(-t, t, T(1))};
  } else if constexpr (M == ScaleMap::atan) {
    return {arg * T(kAtanGain) * atan_(s), arg * T(kAtanGain) / (T(1) + s * s)};
  } else if constexpr (M == ScaleMap::softplus_clamp) {
    const T p = softplus(s) + T(kClampEps);
    const T slope = sigmoid(s) / p;
    return {log_scale<M>(s, arg), p > T(kClampMax) ? T(0) : slope};
  } else {
    const T d = T(1) + abs_(s) * (T(1) / arg);
    return {s / d, T(1) / (d * d)};
  }
}

// e is e^g forward and e^{-g} inverse
template <bool Inverse, bool ShiftFirst, class T>
PYFLOW_FN T couple(T x, T shift, T e) {
  if constexpr (Inverse) {
    return ShiftFirst ? fma_(x, e, -shift) : (x - shift) * e;
  } else {
    return ShiftFirst ? (x + shift) * e : fma_(x, e, shift);
  }
}

template <class T>
struct CouplingGrad {
  T x, shift, scale;
};

// gy = dL/dy, gl = dL/dlogdet
template <bool Inverse, bool ShiftFirst, class T>
PYFLOW_FN CouplingGrad<T> couple_backward(T gy, T gl, T x, T shift, T e, T slope) {
  const T gx = gy * e;
  if constexpr (Inverse) {
    const T moved = ShiftFirst ? x : x - shift;
    return {gx, ShiftFirst ? -gy : -gx, -(fma_(gx, moved, gl) * slope)};
  } else {
    const T moved = ShiftFirst ? x + shift : x;
    return {gx, ShiftFirst ? gx : gy, fma_(gx, moved, gl) * slope};
  }
}

}  // namespace pyflow
