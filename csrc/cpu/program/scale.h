// x = x e^s + shift, or (x + shift) e^s, and its inverse.
#pragma once

#include "rule.h"

namespace pyflow::PYFLOW_ISA {

template <>
struct Rule<Instruction::scale> {
  template <class T>
  static T value(const char* vector, int64_t i, T absent) {
    return vector ? ((const T*)vector)[i] : absent;
  }

  template <bool Inverse, bool ShiftFirst, class T>
  static void run(const ProgramTile<T>& t, const ProgramInstruction& in) {
    for_each_column(t, in, [&](int64_t b, int64_t c, int64_t i) {
      T* __restrict x = t.state.at(b, c);
      const T shift = value(in.shift, i, T(0)), e = value(in.factor, i, T(1));
#pragma omp simd
      for (int r = 0; r < kWidth<T>; ++r) {
        x[r] = couple<Inverse, ShiftFirst>(x[r], shift, e);
      }
    });
  }

  template <class T>
  static void forward(const ProgramTile<T>& t, const ProgramInstruction& in) {
    save(t, in);
    if (in.inverse) {
      in.shift_first ? run<true, true>(t, in) : run<true, false>(t, in);
    } else {
      in.shift_first ? run<false, true>(t, in) : run<false, false>(t, in);
    }
    add_logdet(t, *in.logdet);
  }

  template <bool Inverse, bool ShiftFirst, class T>
  static void pull(const ProgramTile<T>& t, const ProgramInstruction& in) {
    const Columns<T> saved = t.taped_at(in.saved, in.count);
    alignas(64) T gshift[kWidth<T>], gscale[kWidth<T>];
    for_each_column(t, in, [&](int64_t b, int64_t c, int64_t i) {
      T* __restrict g = t.grad.at(b, c);
      const T* __restrict x = saved.at(b, i);
      const T* __restrict gl = t.grad_logdet + b * kWidth<T>;
      const T shift = value(in.shift, i, T(0)), e = value(in.factor, i, T(1));
#pragma omp simd
      for (int r = 0; r < kWidth<T>; ++r) {
        const CouplingGrad<T> grad = couple_backward<Inverse, ShiftFirst>(g[r], gl[r], x[r], shift, e, T(1));
        g[r] = grad.x;
        gshift[r] = grad.shift;
        gscale[r] = grad.scale;
      }
      if (t.sums && in.shift) add_lanes(b, gshift, lanes_of(t, in.shift_place, i));
      if (t.sums && in.log_scale) add_lanes(b, gscale, lanes_of(t, in.log_scale_place, i));
    });
  }

  template <class T>
  static void backward(const ProgramTile<T>& t, const ProgramInstruction& in) {
    if (in.inverse) return in.shift_first ? pull<true, true>(t, in) : pull<true, false>(t, in);
    return in.shift_first ? pull<false, true>(t, in) : pull<false, false>(t, in);
  }
};

}  // namespace pyflow::PYFLOW_ISA
