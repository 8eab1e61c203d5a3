// h = h + act(W c + b), or h = h act(W c + b), with the context c.
#pragma once

#include "../part.h"

namespace pyflow::PYFLOW_ISA {

template <>
struct PartRule<Part::context> {
  template <bool Gate, class T>
  static void join(const T* h, const T* given, int64_t count, T* to) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      to[i] = Gate ? h[i] * given[i] : h[i] + given[i];
    }
  }

  template <class T>
  static Columns<T> given(const ProgramTile<T>& t, const ProgramPart& part) {
    return t.taped_at(part.given, part.size);
  }

  template <class T>
  static void forward(const ProgramTile<T>& t, const ProgramPart& part) {
    const Columns<T> c = given(t, part);
    if (t.args.products.data) {
      load_given(t, t.args.products, part.once, c);
    } else {
      run_dense(t, part, factor<T>(part), t.context, c);
    }
    const T* h = t.taped_at(part.in, part.size).data;
    T* to = output_of(t, part).data;
    const int64_t count = part.size * t.padded();
    part.gate ? join<true>(h, c.data, count, to) : join<false>(h, c.data, count, to);
  }

  // g -> g c, and in of_given g h
  template <class T>
  static void pull_gate(const T* __restrict h, const T* __restrict c, int64_t count, T* __restrict g,
                        T* __restrict of_given) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      of_given[i] = g[i] * h[i];
      g[i] *= c[i];
    }
  }

  template <class T>
  static T* backward(const ProgramTile<T>& t, const ProgramPart& part, Arrays<T>& arrays, T* g) {
    const Columns<T> c = given(t, part);
    const int64_t count = part.size * t.padded();
    T* of_given = arrays.take();
    part.gate ? pull_gate(t.taped_at(part.in, part.size).data, c.data, count, g, of_given) : copy(g, of_given, count);
    pull_dense(t, part, t.context, c, of_given);
    if (t.back->grad_context.data) {
      const Columns<T> of_context{arrays.take(), part.inputs};
      product<false>(transposed_factor<T>(part), Columns<T>{of_given, part.size}, of_context, t.blocks);
      for (int64_t i = 0; i < part.inputs * t.padded(); i += kWidth<T>)
        add_column(of_context.data + i, t.grad_context.data + i);
      arrays.give(of_context.data);
    }
    arrays.give(of_given);
    return g;
  }
};

}  // namespace pyflow::PYFLOW_ISA
