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
  F(sin)                         \
  F(cos)                         \
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

// what a core can do at most: a unit is kMultiplyAddSteps multiply-adds of each of some registers
struct MultiplyAddArgs {
  int64_t* count;  // multiply-adds of a unit
  float* sum;      // (kMultiplyAddLanes): of all values, so that nothing is left out
};
constexpr int64_t kMultiplyAddSteps = 4096, kMultiplyAddLanes = 16;

PYFLOW_CPU_KERNEL(math_evaluate, MathArgs)
PYFLOW_CPU_KERNEL(math_multiply_add, MultiplyAddArgs)

}  // namespace pyflow
