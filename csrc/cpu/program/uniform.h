// Adds the log-density of some columns in a box: -infinity outside.
#pragma once

#include "rule.h"

namespace pyflow::PYFLOW_ISA {

template <>
struct Rule<Instruction::uniform> {
  template <bool Closed, class T>
  static void run(const ProgramTile<T>& t, const ProgramInstruction& in) {
    for (int64_t b = 0; b < t.blocks; ++b) {
      alignas(64) T sum[kWidth<T>] = {};
      for (int64_t i = 0; i < in.count; ++i) {
        const T* __restrict z = t.state.at(b, in.columns[i]);
        const T low = T(in.lows[i]), high = T(in.highs[i]), none = T(-__builtin_inf());
#pragma omp simd
        for (int r = 0; r < kWidth<T>; ++r) {
          sum[r] = outside<Closed>(z[r], low, high) ? none : sum[r];
        }
      }
      add_logdet(t, b, sum);
    }
    add_logdet(t, in.log_density);
  }

  template <class T>
  static void forward(const ProgramTile<T>& t, const ProgramInstruction& in) {
    in.closed ? run<true>(t, in) : run<false>(t, in);
  }

  // the gradient is 0
  template <class T>
  static void backward(const ProgramTile<T>&, const ProgramInstruction&) {}
};

}  // namespace pyflow::PYFLOW_ISA
