// h = act(h).
#pragma once

#include "../part.h"

namespace pyflow::PYFLOW_ISA {

template <>
struct PartRule<Part::activation> {
  template <class T>
  static void forward(const ProgramTile<T>& t, const ProgramPart& part) {
    activate_all(t, part, input_of(t, part).data, output_of(t, part).data);
  }

  template <class T>
  static T* backward(const ProgramTile<T>& t, const ProgramPart& part, Arrays<T>&, T* g) {
    pull_activation(t, part, input_of(t, part).data, output_of(t, part).data, g);
    return g;
  }
};

}  // namespace pyflow::PYFLOW_ISA
