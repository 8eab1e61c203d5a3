// x = W x + b for some columns.
#pragma once

#include "rule.h"

namespace pyflow::PYFLOW_ISA {

template <>
struct Rule<Instruction::linear> {
  template <class T>
  static void forward(const ProgramTile<T>& t, const ProgramInstruction& in) {
    const Columns<T> x = t.taped_at(in.saved, in.count), y{t.scratch.data, in.count};
    gather(t, in, t.state, x);
    product<false>(factor<T>(*in.parts), x, y, t.blocks);
    scatter(t, in, y, t.state);
    if (in.given_logdet) add_logdet(t, double(*(const T*)in.given_logdet));
  }

  template <class T>
  static void backward(const ProgramTile<T>& t, const ProgramInstruction& in) {
    const Columns<T> gy = t.array(1, in.count), gx{t.scratch.data, in.count};
    gather(t, in, t.grad, gy);
    add_weight_gradients(t, *in.parts, t.taped_at(in.saved, in.count), gy);
    product<false>(transposed_factor<T>(*in.parts), gy, gx, t.blocks);
    scatter(t, in, gx, t.grad);
    if (!t.sums || !in.given_logdet) return;
    for (int64_t b = 0; b < t.blocks; ++b) add_lanes(b, t.grad_logdet + b * kWidth<T>, lanes_of(t, in.logdet_place, 0));
  }
};

}  // namespace pyflow::PYFLOW_ISA
