// Finite scalar quantisation of one value: bound, digit, code, and the slope of the straight-through gradient. No fma:
// the same bits on every backend.
#pragma once

#include "../math/exp.h"
#include "../math/tanh.h"
#include "../tiles/enum.h"

// in the order of FSQ_VARIANTS in pyflow/_schemas.py
#define PYFLOW_FSQ_VARIANTS(F) \
  F(vqp)                       \
  F(paper)                     \
  F(symmetric)                 \
  F(sigmoid)                   \
  F(hard)                      \
  F(symmetric_hard)            \
  F(bounded)

namespace pyflow {

PYFLOW_ENUM(FsqVariant, PYFLOW_FSQ_VARIANTS)

// constants of a channel, exact in float32; the bounded value is half * squash(z + shift) - offset
template <class T>
struct FsqChannel {
  T shift, half, offset;
  T width;  // L / 2, the divisor of the code
  T top;    // L - 1
  T step;   // 2 / (L - 1)
};

PYFLOW_FN constexpr bool is_symmetric(FsqVariant v) {
  return v == FsqVariant::symmetric || v == FsqVariant::symmetric_hard;
}
PYFLOW_FN constexpr bool is_hard(FsqVariant v) {
  return v == FsqVariant::hard || v == FsqVariant::symmetric_hard || v == FsqVariant::bounded;
}

#if defined(__CUDA_ARCH__)
PYFLOW_FN float round_even(float x) { return rintf(x); }
PYFLOW_FN double round_even(double x) { return rint(x); }
#else
PYFLOW_FN float round_even(float x) { return __builtin_rintf(x); }
PYFLOW_FN double round_even(double x) { return __builtin_rint(x); }
#endif

// NaN stays NaN
template <class T>
PYFLOW_FN T clamp_(T x, T low, T high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

template <FsqVariant V, class T>
PYFLOW_FN T squash(T x) {
  return is_hard(V) ? clamp_(x, T(-1), T(1)) : tanh_unfused(x);
}

// level index of z: 0 to top, or NaN
template <FsqVariant V, class T>
PYFLOW_FN T fsq_digit(T z, const FsqChannel<T>& c) {
  T digit;
  if constexpr (V == FsqVariant::sigmoid) {
    digit = round_even(c.top * (T(1) / (T(1) + exp_unfused(-z))));
  } else if constexpr (is_symmetric(V)) {
    digit = floor_(c.top * (squash<V>(z) + T(1)) / T(2) + T(0.5));
  } else {
    digit = round_even(squash<V>(z + c.shift) * c.half - c.offset) + c.width;
  }
  return clamp_(digit, T(0), c.top);
}

template <FsqVariant V, class T>
PYFLOW_FN T fsq_code(T digit, const FsqChannel<T>& c) {
  if constexpr (V == FsqVariant::sigmoid) {
    return digit / c.top;
  } else if constexpr (is_symmetric(V)) {
    return digit * c.step - T(1);
  } else {
    return (digit - c.width) / c.width;
  }
}

// d code / dz, taking the rounding as the identity
template <FsqVariant V, class T>
PYFLOW_FN T fsq_slope(T z, const FsqChannel<T>& c) {
  const T u = V == FsqVariant::sigmoid || is_symmetric(V) ? z : z + c.shift;
  const T gain = V == FsqVariant::sigmoid || is_symmetric(V) ? T(1) : c.half / c.width;
  if constexpr (is_hard(V)) {
    return u >= T(-1) && u <= T(1) ? gain : T(0);
  } else {
    // sigmoid' = e / (1 + e)^2 with e = exp(-|u|); tanh' = 4 e / (1 + e)^2 with e = exp(-2 |u|)
    constexpr T k = V == FsqVariant::sigmoid ? T(1) : T(2);
    const T e = exp_unfused(-k * abs_(u));
    return gain * (k * k * e / ((T(1) + e) * (T(1) + e)));
  }
}

// the gradient of a clamped value is 0, even if grad is infinite or NaN
template <FsqVariant V, class T>
PYFLOW_FN T fsq_gradient(T grad, T slope) {
  return is_hard(V) && slope == T(0) ? T(0) : grad * slope;
}

}  // namespace pyflow
