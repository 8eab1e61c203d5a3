// A conditioner: a network of some columns of the state, and of the context.
#pragma once

#include "rule.h"

namespace pyflow::PYFLOW_ISA {

template <>
struct Rule<Instruction::mlp> {
  template <class T>
  static Columns<T> inputs(const ProgramTile<T>& t, const ProgramInstruction& in) {
    return t.taped_at(in.dense[0].in, in.dense[0].inputs);
  }

  template <class T>
  static void forward(const ProgramTile<T>& t, const ProgramInstruction& in) {
    gather(t, in, t.state, inputs(t, in));
    for (int64_t b = 0; in.context && b < t.blocks; ++b) {
      for (int64_t c = 0; c < t.context.count; ++c) copy_column(t.context.at(b, c), inputs(t, in).at(b, in.count + c));
    }
    for (int64_t l = 0; l < in.layers; ++l) {
      const ProgramDense& d = in.dense[l];
      const Columns<T> x = t.taped_at(d.in, d.inputs), z = t.taped_at(d.before, d.size);
      if (d.activation == Activation::relu || d.activation == Activation::identity) {
        const bool relu = d.activation == Activation::relu;
        relu ? product<true>(factor<T>(d), x, z, t.blocks) : product<false>(factor<T>(d), x, z, t.blocks);
      } else {
        product<false>(factor<T>(d), x, z, t.blocks);
        T* h = t.taped_at(d.out, d.size).data;
        as_constant(d.activation, [&](auto a) { activate_all<a.value>(z.data, T(d.arg), d.size * t.padded(), h); });
      }
    }
  }

  // z and h may be the same
  template <Activation A, class T>
  static void activate_all(const T* z, T arg, int64_t count, T* h) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      h[i] = activate<A>(z[i], arg);
    }
  }

  // turns the gradient of h into that of z
  template <Activation A, class T>
  static void pull_activation(const T* z, const T* h, T arg, int64_t count, T* __restrict g) {
    if constexpr (A == Activation::identity) return;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      g[i] = activation_grad<A>(g[i], z[i], h[i], arg);
    }
  }

  template <class T>
  static void backward(const ProgramTile<T>& t, const ProgramInstruction& in) {
    T *g = t.grad_params.data, *other = t.grad_other.data;
    for (int64_t l = in.layers - 1; l >= 0; --l) {
      const ProgramDense& d = in.dense[l];
      const T *z = t.taped_at(d.before, d.size).data, *h = t.taped_at(d.out, d.size).data;
      as_constant(d.activation, [&](auto a) { pull_activation<a.value>(z, h, T(d.arg), d.size * t.padded(), g); });
      add_weight_gradients(t, d, t.taped_at(d.in, d.inputs), Columns<T>{g, d.size});
      product<false>(transposed_factor<T>(d), Columns<T>{g, d.size}, Columns<T>{other, d.inputs}, t.blocks);
      T* next = other;
      other = g;
      g = next;
    }
    const Columns<T> gx{g, in.dense[0].inputs};
    for_each_column(t, in, [&](int64_t b, int64_t c, int64_t i) { add_column(gx.at(b, i), t.grad.at(b, c)); });
    for (int64_t b = 0; in.context && b < t.blocks; ++b) {
      for (int64_t c = 0; c < t.context.count; ++c) add_column(gx.at(b, in.count + c), t.grad_context.at(b, c));
    }
  }
};

}  // namespace pyflow::PYFLOW_ISA
