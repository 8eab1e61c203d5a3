// What a part of a net does to a tile: PartRule<P>::forward and PartRule<P>::backward, one file per part.
#pragma once

#include "product.h"

namespace pyflow::PYFLOW_ISA {

// arrays of gradients that are not in use
template <class T>
class Arrays {
 public:
  explicit Arrays(const ProgramTile<T>& t) {
    for (int64_t k = t.back->arrays - 1; k > 0; --k) give(t.array(k, 0).data);
  }
  T* take() { return free_[--count_]; }
  void give(T* array) { free_[count_++] = array; }

 private:
  T* free_[kProgramMostArrays];
  int64_t count_ = 0;
};

// backward: g is an array with the gradient of what the part returns; the result that of what it takes
template <Part P>
struct PartRule;

template <class T>
T* pull_parts(const ProgramTile<T>& t, const ProgramPart* parts, int64_t count, Arrays<T>& arrays, T* g);

template <class T>
Columns<T> input_of(const ProgramTile<T>& t, const ProgramPart& part) {
  return t.taped_at(part.in, part.inputs);
}

template <class T>
Columns<T> output_of(const ProgramTile<T>& t, const ProgramPart& part) {
  return t.taped_at(part.out, part.size);
}

template <class T>
PYFLOW_FN T entry(const ProgramWeight& w, int64_t i, T absent) {
  return w.data ? ((const T*)w.data)[i] : absent;
}

template <class T>
void copy(const T* from, T* to, int64_t count) {
  if (from == to) return;
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// z and h may be the same
template <Activation A, class T>
void activate_all(const T* z, T arg, int64_t count, T* h) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    h[i] = activate<A>(z[i], arg);
  }
}

template <class T>
void activate_all(const ProgramTile<T>& t, const ProgramPart& part, const T* z, T* h) {
  as_constant(part.activation, [&](auto a) { activate_all<a.value>(z, T(part.arg), part.size * t.padded(), h); });
}

// turns the gradient of h into that of z
template <Activation A, class T>
void pull_activation(const T* z, const T* h, T arg, int64_t count, T* __restrict g) {
  if constexpr (A == Activation::identity) return;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    g[i] = activation_grad<A>(g[i], z[i], h[i], arg);
  }
}

template <class T>
void pull_activation(const ProgramTile<T>& t, const ProgramPart& part, const T* z, const T* h, T* g) {
  as_constant(part.activation, [&](auto a) { pull_activation<a.value>(z, h, T(part.arg), part.size * t.padded(), g); });
}

// h = act(W from + b); a factor that adds does so to what the context gives
template <class T>
void run_dense(const ProgramTile<T>& t, const ProgramPart& part, const Factor<T>& f, const Columns<T>& from,
               const Columns<T>& h) {
  const bool relu = part.activation == Activation::relu;
  const Columns<T> z = relu ? h : t.taped_at(part.before, part.size);
  if (f.adds) load_given(t, t.args.products, part.once, z);
  if (relu) return product<true>(f, from, z, t.blocks);
  product<false>(f, from, z, t.blocks);
  if (part.activation != Activation::identity) activate_all(t, part, z.data, h.data);
}

// whether the products of the context have the terms of its columns among the part's inputs
template <class T>
PYFLOW_FN bool is_given(const ProgramTile<T>& t, const ProgramPart& part) {
  return part.joins && t.args.products.data;
}

// g: the gradient of h, then of W from + b; adds those of the weights
template <class T>
void pull_dense(const ProgramTile<T>& t, const ProgramPart& part, const Columns<T>& from, const Columns<T>& h, T* g) {
  pull_activation(t, part, t.taped_at(part.before, part.size).data, h.data, g);
  add_weight_gradients(t, part, from, Columns<T>{g, part.size});
}

}  // namespace pyflow::PYFLOW_ISA
