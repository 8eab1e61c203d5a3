// x = x + shift.
#pragma once

#include "rule.h"

namespace pyflow::PYFLOW_ISA {

template <>
struct Rule<Instruction::additive> {
  template <class T>
  static void forward(const ProgramTile<T>& t, const ProgramInstruction& in) {
    const Columns<T> shifts = t.taped_at(in.params, in.count);
    const T sign = in.inverse ? T(-1) : T(1);
    for_each_column(t, in, [&](int64_t b, int64_t c, int64_t i) {
      T* __restrict x = t.state.at(b, c);
      const T* __restrict shift = shifts.at(b, i);
      for (int r = 0; r < kWidth<T>; ++r) x[r] += sign * shift[r];
    });
  }

  template <class T>
  static void backward(const ProgramTile<T>& t, const ProgramInstruction& in) {
    const T sign = in.inverse ? T(-1) : T(1);
    const Columns<T> gshifts = t.array(0, in.count);
    for_each_column(t, in, [&](int64_t b, int64_t c, int64_t i) {
      const T* __restrict g = t.grad.at(b, c);
      T* __restrict gshift = gshifts.at(b, i);
      for (int r = 0; r < kWidth<T>; ++r) gshift[r] = sign * g[r];
    });
  }
};

}  // namespace pyflow::PYFLOW_ISA
