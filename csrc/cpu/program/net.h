// A conditioner: a network of some columns of the state, and of the context.
#pragma once

#include "parts/activation.h"
#include "parts/context.h"
#include "parts/dense.h"
#include "parts/elementwise.h"
#include "parts/norm.h"
#include "parts/periodic.h"
#include "parts/residual.h"
#include "rule.h"

namespace pyflow::PYFLOW_ISA {

template <class T>
T* pull_parts(const ProgramTile<T>& t, const ProgramPart* parts, int64_t count, Arrays<T>& arrays, T* g) {
  for (int64_t i = count - 1; i >= 0; i -= 1 + parts[i].inner) {
    as_constant(parts[i].kind, [&](auto kind) { g = PartRule<kind.value>::backward(t, parts[i], arrays, g); });
  }
  return g;
}

template <>
struct Rule<Instruction::net> {
  template <class T>
  static void forward(const ProgramTile<T>& t, const ProgramInstruction& in) {
    const Columns<T> inputs = t.taped_at(in.parts[0].in, in.inputs);
    gather(t, in, t.state, inputs);
    const bool copies = in.context && !is_given(t, in.parts[0]);
    for (int64_t b = 0; copies && b < t.blocks; ++b) {
      for (int64_t c = 0; c < t.context.count; ++c) copy_column(t.context.at(b, c), inputs.at(b, in.count + c));
    }
    for (int64_t i = 0; i < in.part_count; ++i) {
      as_constant(in.parts[i].kind, [&](auto kind) { PartRule<kind.value>::forward(t, in.parts[i]); });
    }
  }

  template <class T>
  static void backward(const ProgramTile<T>& t, const ProgramInstruction& in) {
    Arrays<T> arrays(t);
    const Columns<T> g{pull_parts(t, in.parts, in.part_count, arrays, t.array(0, 0).data), in.inputs};
    for_each_column(t, in, [&](int64_t b, int64_t c, int64_t i) { add_column(g.at(b, i), t.grad.at(b, c)); });
    for (int64_t b = 0; in.context && b < t.blocks; ++b) {
      for (int64_t c = 0; c < t.context.count; ++c) add_column(g.at(b, in.count + c), t.grad_context.at(b, c));
    }
  }
};

}  // namespace pyflow::PYFLOW_ISA
