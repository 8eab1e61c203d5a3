// x = x e^{scale}, scales from the last conditioner.
#pragma once

#include "rule.h"

namespace pyflow::PYFLOW_ISA {

template <>
struct Rule<Instruction::multiplicative> {
  template <class T>
  static void run(const ProgramTile<T>& t, const ProgramInstruction& in) {
    const Columns<T> scales = t.taped_at(in.params, in.count);
    const T sign = in.inverse ? T(-1) : T(1);
    for (int64_t b = 0; b < t.blocks; ++b) {
      alignas(64) T sum[kWidth<T>] = {};
      for (int64_t i = 0; i < in.count; ++i) {
        T* __restrict x = t.state.at(b, in.columns[i]);
        const T* __restrict s = scales.at(b, i);
#pragma omp simd
        for (int r = 0; r < kWidth<T>; ++r) {
          const T g = sign * s[r];
          x[r] *= exp_(g);
          sum[r] += g;
        }
      }
      add_logdet(t, b, sum);
    }
  }

  template <class T>
  static void forward(const ProgramTile<T>& t, const ProgramInstruction& in) {
    transform_once(t, in, [&] { run(t, in); });
  }

  template <class T>
  static void backward(const ProgramTile<T>& t, const ProgramInstruction& in) {
    const Columns<T> saved = t.taped_at(in.saved, in.count), scales = t.taped_at(in.params, in.count);
    const Columns<T> gscales = t.array(0, in.count);
    const T sign = in.inverse ? T(-1) : T(1);
    for_each_column(t, in, [&](int64_t b, int64_t c, int64_t i) {
      T* __restrict g = t.grad.at(b, c);
      T* __restrict gscale = gscales.at(b, i);
      const T* __restrict x = saved.at(b, i), * __restrict s = scales.at(b, i);
      const T* __restrict gl = t.grad_logdet + b * kWidth<T>;
#pragma omp simd
      for (int r = 0; r < kWidth<T>; ++r) {
        g[r] *= exp_(sign * s[r]);
        gscale[r] = sign * fma_(g[r], x[r], gl[r]);
      }
    });
  }
};

}  // namespace pyflow::PYFLOW_ISA
