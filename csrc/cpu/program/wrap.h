// x = (x + shift + bound) mod 2 bound - bound.
#pragma once

#include "rule.h"

namespace pyflow::PYFLOW_ISA {

template <>
struct Rule<Instruction::wrap> {
  template <class T>
  static void forward(const ProgramTile<T>& t, const ProgramInstruction& in) {
    for_each_column(t, in, [&](int64_t b, int64_t c, int64_t i) {
      T* __restrict x = t.state.at(b, c);
      const T shift = T(in.shifts[i]), bound = T(in.bounds[i]);
#pragma omp simd
      for (int r = 0; r < kWidth<T>; ++r) {
        x[r] = wrap(x[r] + shift + bound, bound);
      }
    });
  }

  // the gradient stays
  template <class T>
  static void backward(const ProgramTile<T>&, const ProgramInstruction&) {}
};

}  // namespace pyflow::PYFLOW_ISA
