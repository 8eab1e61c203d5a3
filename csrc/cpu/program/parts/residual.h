// h = h + parts(h). The parts come before it in the list of the net's parts, and have run.
#pragma once

#include "../part.h"

namespace pyflow::PYFLOW_ISA {

template <>
struct PartRule<Part::residual> {
  template <class T>
  static void forward(const ProgramTile<T>& t, const ProgramPart& part) {
    const T *h = input_of(t, part).data, *more = t.taped_at(part.before, part.size).data;
    T* sum = output_of(t, part).data;
#pragma omp simd
    for (int64_t i = 0; i < part.size * t.padded(); ++i) {
      sum[i] = h[i] + more[i];
    }
  }

  template <class T>
  static T* backward(const ProgramTile<T>& t, const ProgramPart& part, Arrays<T>& arrays, T* g) {
    const int64_t count = part.size * t.padded();
    T* of_more = arrays.take();
    copy(g, of_more, count);
    of_more = pull_parts(t, &part - part.inner, part.inner, arrays, of_more);
    T* __restrict sum = g;
    const T* __restrict more = of_more;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      sum[i] += more[i];
    }
    arrays.give(of_more);
    return g;
  }
};

}  // namespace pyflow::PYFLOW_ISA
