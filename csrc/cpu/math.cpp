// Evaluates one elementary function over an array, for tests: a unit is an element. Counts what a core can do, for
// benchmarks.
#include "../args/math.h"

#include "../math/angle.h"
#include "../math/atan.h"
#include "../math/erf.h"
#include "../math/exp.h"
#include "../math/log.h"
#include "../math/normal.h"
#include "../math/tanh.h"

namespace pyflow::PYFLOW_ISA {
namespace {

template <class F>
PYFLOW_FN void for_each_element(const MathArgs& a, int64_t begin, int64_t end, F f) {
  const float* __restrict in = a.in;
  float* __restrict out = a.out;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) out[i] = f(in[i]);
}

// twelve chains hide the latency of an addition
#if defined(__AVX512F__)
constexpr int kRegister = 16;
#else
constexpr int kRegister = 8;
#endif
constexpr int kChains = 12;

}  // namespace

void math_multiply_add(const MultiplyAddArgs& a, int64_t begin, int64_t end) {
  float sum[kChains][kRegister] = {}, value[kRegister];
  for (int j = 0; j < kRegister; ++j) value[j] = 1e-3f * float(j + 1);
  for (int64_t k = begin * kMultiplyAddSteps; k < end * kMultiplyAddSteps; ++k) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
#pragma omp simd
      for (int j = 0; j < kRegister; ++j) {
        sum[i][j] = fma_(sum[i][j], value[j], value[j]);
      }
    }
  }
  for (int i = 0; i < kChains; ++i) {
    for (int j = 0; j < kRegister; ++j) a.sum[j] += sum[i][j];
  }
  *a.count = kMultiplyAddSteps * kChains * kRegister;
}

void math_evaluate(const MathArgs& a, int64_t begin, int64_t end) {
  switch (a.function) {
    case MathFunction::exp: return for_each_element(a, begin, end, [](float x) { return exp_(x); });
    case MathFunction::exp_unfused: return for_each_element(a, begin, end, [](float x) { return exp_unfused(x); });
    case MathFunction::tanh: return for_each_element(a, begin, end, [](float x) { return tanh_(x); });
    case MathFunction::tanh_unfused: return for_each_element(a, begin, end, [](float x) { return tanh_unfused(x); });
    case MathFunction::log: return for_each_element(a, begin, end, [](float x) { return log_(x); });
    case MathFunction::log1p01: return for_each_element(a, begin, end, [](float x) { return log1p01(x); });
    case MathFunction::softplus: return for_each_element(a, begin, end, [](float x) { return softplus(x); });
    case MathFunction::sigmoid: return for_each_element(a, begin, end, [](float x) { return sigmoid(x); });
    case MathFunction::atan: return for_each_element(a, begin, end, [](float x) { return atan_(x); });
    case MathFunction::erf: return for_each_element(a, begin, end, [](float x) { return erf_(x); });
    case MathFunction::sin: return for_each_element(a, begin, end, [](float x) { return angle(x).sin; });
    case MathFunction::cos: return for_each_element(a, begin, end, [](float x) { return angle(x).cos; });
    case MathFunction::log_plain: return for_each_element(a, begin, end, [](float x) { return log_plain(x); });
    // functions of a random word: the bits of x
    case MathFunction::radius: return for_each_element(a, begin, end, [](float x) { return radius(bits_of(x)); });
    case MathFunction::sin_turns:
      return for_each_element(a, begin, end, [](float x) { return sincos_turns(bits_of(x) >> 8).sin; });
    case MathFunction::cos_turns:
      return for_each_element(a, begin, end, [](float x) { return sincos_turns(bits_of(x) >> 8).cos; });
    // evaluated at -|x|
    case MathFunction::exp_minus:
      return for_each_element(a, begin, end, [](float x) { return exp_less(-abs_(x), 0.f); });
    case MathFunction::expm1_minus:
      return for_each_element(a, begin, end, [](float x) { return exp_less(-abs_(x), 1.f); });
  }
}

}  // namespace pyflow::PYFLOW_ISA
