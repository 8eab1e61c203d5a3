// h = factor h + shift.
#pragma once

#include "../part.h"

namespace pyflow::PYFLOW_ISA {

template <>
struct PartRule<Part::elementwise> {
  template <class T>
  static void forward(const ProgramTile<T>& t, const ProgramPart& part) {
    const Columns<T> from = input_of(t, part), to = output_of(t, part);
    for (int64_t b = 0; b < t.blocks; ++b) {
      for (int64_t i = 0; i < part.size; ++i) {
        const T factor = entry(part.factor, i, T(1)), shift = entry(part.shift, i, T(0));
        const T* h = from.at(b, i);
        T* y = to.at(b, i);
#pragma omp simd
        for (int r = 0; r < kWidth<T>; ++r) {
          y[r] = fma_(h[r], factor, shift);
        }
      }
    }
  }

  template <class T>
  static T* backward(const ProgramTile<T>& t, const ProgramPart& part, Arrays<T>&, T* g) {
    const Columns<T> from = input_of(t, part), grad{g, part.size};
    add_lanes(t, part.shift, grad);
    alignas(64) T product[kWidth<T>];
    for (int64_t b = 0; part.factor.data && b < t.blocks; ++b) {
      for (int64_t i = 0; i < part.size; ++i) {
        const T factor = entry(part.factor, i, T(1));
        const T* __restrict h = from.at(b, i);
        T* __restrict gi = grad.at(b, i);
#pragma omp simd
        for (int r = 0; r < kWidth<T>; ++r) {
          product[r] = gi[r] * h[r];
          gi[r] *= factor;
        }
        if (t.sums) add_lanes(b, product, lanes_of(t, part.factor.place, i));
      }
    }
    return g;
  }
};

}  // namespace pyflow::PYFLOW_ISA
