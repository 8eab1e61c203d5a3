// Coupling layers: the scale maps g(s), their derivatives, and one element forward and backward.
//   forward  y = x e^g + shift          (shift_first: (x + shift) e^g)
//   inverse  y = (x - shift) e^{-g}     (shift_first: x e^{-g} - shift)
#pragma once

#include "../math/atan.h"
#include "../math/exp.h"
#include "../math/log.h"
#include "../math/tanh.h"
#include "../tiles/enum.h"

// in the order of SCALE_MAPS in pyflow/_schemas.py
#define PYFLOW_SCALE_MAPS(F) \
  F(exp)                     \
  F(sigmoid)                 \
  F(sigmoid_inv)             \
  F(softplus)                \
  F(tanh)                    \
  F(atan)                    \
  F(softsign)                \
  F(softplus_clamp)          \
  F(sigmoid_eps)             \
  F(softplus_eps)

// PACKINGS: where packed parameters hold shift and scale
#define PYFLOW_PACKINGS(F) \
  F(shift_scale)           \
  F(scale_shift)           \
  F(interleaved)

namespace pyflow {

PYFLOW_ENUM(ScaleMap, PYFLOW_SCALE_MAPS)
PYFLOW_ENUM(Packing, PYFLOW_PACKINGS)

// sigmoid and softplus with eps > 0 have separate formulas, which callers do not select by name
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
    // log(softplus(s)) is -inf once softplus underflows
    const T p = softplus(s), e = exp_(s);
    return {s < T(-15) ? s - T(0.5) * e : log_(p), s < T(-15) ? T(1) - T(0.5) * e : sigmoid(s) / p};
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
    const bool clamped = p > T(kClampMax);
    return {log_(clamped ? T(kClampMax) : p), clamped ? T(0) : sigmoid(s) / p};
  } else {
    const T d = T(1) + abs_(s) * (T(1) / arg);
    return {s / d, T(1) / (d * d)};
  }
}

// without the slope: the compiler removes its terms
template <ScaleMap M, class T>
PYFLOW_FN T log_scale(T s, T arg) {
  return log_scale_slope<M>(s, arg).g;
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
