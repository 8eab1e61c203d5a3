// Programs of flows: the instructions, and the activations of their networks with their gradients.
#pragma once

#include "../math/erf.h"
#include "../math/log.h"
#include "../math/tanh.h"
#include "../tiles/enum.h"

// the classes of pyflow/program.py, in lower case
#define PYFLOW_INSTRUCTIONS(F) \
  F(scale)                     \
  F(linear)                    \
  F(wrap)                      \
  F(net)                       \
  F(additive)                  \
  F(multiplicative)            \
  F(affine)                    \
  F(spline)                    \
  F(autoregressive)            \
  F(prior)                     \
  F(uniform)

#define PYFLOW_PARTS(F) \
  F(dense)              \
  F(activation)         \
  F(residual)           \
  F(context)            \
  F(norm)               \
  F(elementwise)        \
  F(periodic)

// in the order of ACTIVATIONS in pyflow/_schemas.py
#define PYFLOW_ACTIVATIONS(F) \
  F(identity)                 \
  F(relu)                     \
  F(leaky_relu)               \
  F(tanh)                     \
  F(silu)                     \
  F(gelu)                     \
  F(elu)                      \
  F(sigmoid)                  \
  F(clamp_exp)

namespace pyflow {

PYFLOW_ENUM(Instruction, PYFLOW_INSTRUCTIONS)
PYFLOW_ENUM(Part, PYFLOW_PARTS)
PYFLOW_ENUM(Activation, PYFLOW_ACTIVATIONS)

constexpr double kSqrtHalf = 0.70710678118654752440, kInvSqrt2Pi = 0.39894228040143267794;

// whether the gradient needs z, the value before the activation; the others follow from h, the value after it
constexpr bool needs_before(Activation a) {
  return a == Activation::silu || a == Activation::gelu || a == Activation::clamp_exp;
}

// `arg`: slope of leaky_relu below 0, alpha of elu, both >= 0
template <Activation A, class T>
PYFLOW_FN T activate(T z, T arg) {
  if constexpr (A == Activation::relu) {
    return T(0) > z ? T(0) : z;
  } else if constexpr (A == Activation::leaky_relu) {
    return T(0) > z ? z * arg : z;
  } else if constexpr (A == Activation::tanh) {
    return tanh_(z);
  } else if constexpr (A == Activation::silu) {
    return z * sigmoid(z);
  } else if constexpr (A == Activation::gelu) {
    return T(0.5) * z * (T(1) + erf_(z * T(kSqrtHalf)));
  } else if constexpr (A == Activation::elu) {
    return z > T(0) ? z : arg * exp_less(z > T(0) ? T(0) : z, T(1));
  } else if constexpr (A == Activation::sigmoid) {
    return sigmoid(z);
  } else if constexpr (A == Activation::clamp_exp) {
    return exp_(z > T(0) ? T(0) : z);
  } else {
    return z;
  }
}

// dL/dz from g = dL/dh
template <Activation A, class T>
PYFLOW_FN T activation_grad(T g, T z, T h, T arg) {
  if constexpr (A == Activation::relu) {
    return h <= T(0) ? T(0) : g;
  } else if constexpr (A == Activation::leaky_relu) {
    return h > T(0) ? g : g * arg;
  } else if constexpr (A == Activation::tanh) {
    return g * fma_(-h, h, T(1));
  } else if constexpr (A == Activation::silu) {
    const T p = sigmoid(z);
    return g * fma_(h, T(1) - p, p);
  } else if constexpr (A == Activation::gelu) {
    const T density = T(kInvSqrt2Pi) * exp_(T(-0.5) * z * z);
    return g * fma_(z, density, T(0.5) * (T(1) + erf_(z * T(kSqrtHalf))));
  } else if constexpr (A == Activation::elu) {
    return h <= T(0) ? g * (h + arg) : g;
  } else if constexpr (A == Activation::sigmoid) {
    return g * (h * (T(1) - h));
  } else if constexpr (A == Activation::clamp_exp) {
    return z > T(0) ? T(0) : g * h;
  } else {
    return g;
  }
}

// whether z is outside of [low, high), where NaN is; `Closed`: of [low, high], where NaN is inside
template <bool Closed, class T>
PYFLOW_FN bool outside(T z, T low, T high) {
  return Closed ? (z < low) | (z > high) : !((z >= low) & (z < high));
}

// x mod 2 bound - bound; the remainder is rounded once, as torch's is, if x is up to 2^22 periods
template <class T>
PYFLOW_FN T wrap(T x, T bound) {
  const T period = T(2) * bound, turns = floor_(x / period), rest = fma_(-turns, period, x);
  // a quotient just below a whole number is rounded to it
  return (rest < T(0) ? fma_(T(1) - turns, period, x) : rest) - bound;
}

}  // namespace pyflow
