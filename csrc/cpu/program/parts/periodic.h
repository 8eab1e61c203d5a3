// h_i = sine sin(scale h_i) + cosine cos(scale h_i) + bias for some columns.
#pragma once

#include "../../../math/angle.h"
#include "../part.h"

namespace pyflow::PYFLOW_ISA {

template <>
struct PartRule<Part::periodic> {
  template <class T>
  static void forward(const ProgramTile<T>& t, const ProgramPart& part) {
    const Columns<T> from = input_of(t, part), to = output_of(t, part);
    copy(from.data, to.data, part.size * t.padded());
    for (int64_t b = 0; b < t.blocks; ++b) {
      for (int64_t i = 0; i < part.count; ++i) {
        const T scale = entry(part.factor, i, T(1)), sine = entry(part.sine, i, T(0));
        const T cosine = entry(part.cosine, i, T(0)), bias = entry(part.shift, i, T(0));
        const T* x = from.at(b, part.columns[i]);
        T* y = to.at(b, part.columns[i]);
#pragma omp simd
        for (int r = 0; r < kWidth<T>; ++r) {
          const Angle<T> a = angle(scale * x[r]);
          y[r] = fma_(sine, a.sin, fma_(cosine, a.cos, bias));
        }
      }
    }
  }

  // turns the gradient of what comes of x, entry i of the columns, into that of x; adds those of the weights
  template <class T>
  static void pull_column(const ProgramTile<T>& t, const ProgramPart& part, int64_t b, int64_t i, const T* __restrict x,
                          T* __restrict g) {
    const T scale = entry(part.factor, i, T(1)), sine = entry(part.sine, i, T(0)), cosine = entry(part.cosine, i, T(0));
    alignas(64) T of_sine[kWidth<T>], of_cosine[kWidth<T>];
    if (t.sums && part.shift.data) add_lanes(b, g, lanes_of(t, part.shift.place, i));
#pragma omp simd
    for (int r = 0; r < kWidth<T>; ++r) {
      const Angle<T> a = angle(scale * x[r]);
      of_sine[r] = g[r] * a.sin;
      of_cosine[r] = g[r] * a.cos;
      g[r] = scale * fma_(sine, of_cosine[r], -cosine * of_sine[r]);
    }
    if (!t.sums) return;
    add_lanes(b, of_sine, lanes_of(t, part.sine.place, i));
    add_lanes(b, of_cosine, lanes_of(t, part.cosine.place, i));
  }

  template <class T>
  static T* backward(const ProgramTile<T>& t, const ProgramPart& part, Arrays<T>&, T* g) {
    const Columns<T> from = input_of(t, part), grad{g, part.size};
    for (int64_t b = 0; b < t.blocks; ++b) {
      for (int64_t i = 0; i < part.count; ++i) {
        pull_column(t, part, b, i, from.at(b, part.columns[i]), grad.at(b, part.columns[i]));
      }
    }
    return g;
  }
};

}  // namespace pyflow::PYFLOW_ISA
