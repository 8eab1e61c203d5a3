// Elementary functions over an array, for the tests of their stated error.
#pragma once

#include "../cpu/dispatch.h"
#include "../tiles/enum.h"

#define PYFLOW_MATH_FUNCTIONS(F) \
  F(exp)                         \
  F(exp_unfused)                 \
  F(tanh)                        \
  F(tanh_unfused)                \
  F(log)                         \
  F(log1p01)                     \
  F(softplus)                    \
  F(sigmoid)                     \
  F(atan)                        \
  F(erf)                         \
  F(log_plain)                   \
  F(radius)                      \
  F(sin_turns)                   \
  F(cos_turns)                   \
  F(exp_minus)                   \
  F(expm1_minus)

namespace pyflow {

PYFLOW_ENUM(MathFunction, PYFLOW_MATH_FUNCTIONS)

struct MathArgs {
  MathFunction function;
  const float* in;
  float* out;
};

PYFLOW_CPU_KERNEL(math_evaluate, MathArgs)

}  // namespace pyflow
