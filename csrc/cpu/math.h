// Elementary functions over an array, for the tests of their stated error.
#pragma once

#include <cstdint>

namespace pyflow {

enum class MathFunction : int {
  exp,
  exp_unfused,
  tanh,
  tanh_unfused,
  log,
  log1p01,
  softplus,
  sigmoid,
  atan,
  log_plain,
  radius,
  sin_turns,
  cos_turns,
  exp_minus,
  expm1_minus
};
constexpr const char* kMathFunctions[] = {"exp",     "exp_unfused", "tanh",      "tanh_unfused", "log",
                                          "log1p01", "softplus",    "sigmoid",   "atan",         "log_plain",
                                          "radius",  "sin_turns",   "cos_turns", "exp_minus",    "expm1_minus"};

struct MathArgs {
  MathFunction function;
  const float* in;
  float* out;
};

}  // namespace pyflow
