// h = act(W h + b).
#pragma once

#include "../part.h"

namespace pyflow::PYFLOW_ISA {

template <>
struct PartRule<Part::dense> {
  template <class T>
  static void forward(const ProgramTile<T>& t, const ProgramPart& part) {
    if (t.back && is_kept(part.before)) {
      if (!is_kept(part.out)) activate_all(t, part, t.taped_at(part.before, part.size).data, output_of(t, part).data);
      return;
    }
    Columns<T> from = input_of(t, part);
    Factor<T> f = factor<T>(part);
    if (is_given(t, part)) {
      f.adds = true;
      from.count = part.first;
    } else {
      f.first = part.first;
    }
    run_dense(t, part, f, from, output_of(t, part));
  }

  template <class T>
  static T* backward(const ProgramTile<T>& t, const ProgramPart& part, Arrays<T>& arrays, T* g) {
    pull_dense(t, part, input_of(t, part), output_of(t, part), g);
    T* of_inputs = arrays.take();
    product<false>(transposed_factor<T>(part), Columns<T>{g, part.size}, Columns<T>{of_inputs, part.inputs}, t.blocks);
    arrays.give(g);
    return of_inputs;
  }
};

}  // namespace pyflow::PYFLOW_ISA
