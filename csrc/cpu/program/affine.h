// x = x e^{g(scale)} + shift, shift and scale from the last conditioner.
#pragma once

#include "rule.h"

namespace pyflow::PYFLOW_ISA {

template <>
struct Rule<Instruction::affine> {
  // places of shift and scale of column i
  static int64_t shift_at(const ProgramInstruction& in, int64_t i) { return in.shift_from + in.params_step * i; }
  static int64_t scale_at(const ProgramInstruction& in, int64_t i) { return in.scale_from + in.params_step * i; }

  template <ScaleMap M, bool Inverse, bool ShiftFirst, class T>
  static void run(const ProgramTile<T>& t, const ProgramInstruction& in) {
    const Columns<T> params = t.taped_at(in.params, 2 * in.count);
    const T arg = T(in.map_arg), sign = Inverse ? T(-1) : T(1);
    for (int64_t b = 0; b < t.blocks; ++b) {
      alignas(64) T sum[kWidth<T>] = {};
      for (int64_t i = 0; i < in.count; ++i) {
        T* __restrict x = t.state.at(b, in.columns[i]);
        const T* __restrict shift = params.at(b, shift_at(in, i)), * __restrict s = params.at(b, scale_at(in, i));
#pragma omp simd
        for (int r = 0; r < kWidth<T>; ++r) {
          const T g = sign * log_scale<M>(s[r], arg);
          x[r] = couple<Inverse, ShiftFirst>(x[r], shift[r], exp_(g));
          sum[r] += g;
        }
      }
      add_logdet(t, b, sum);
    }
  }

  template <ScaleMap M, class T>
  static void run_map(const ProgramTile<T>& t, const ProgramInstruction& in) {
    if (in.inverse) return in.shift_first ? run<M, true, true>(t, in) : run<M, true, false>(t, in);
    return in.shift_first ? run<M, false, true>(t, in) : run<M, false, false>(t, in);
  }

  template <class T>
  static void forward(const ProgramTile<T>& t, const ProgramInstruction& in) {
    transform_once(t, in, [&] { as_constant(in.map, [&](auto map) { run_map<map.value>(t, in); }); });
  }

  template <ScaleMap M, bool Inverse, bool ShiftFirst, class T>
  static void pull(const ProgramTile<T>& t, const ProgramInstruction& in) {
    const Columns<T> saved = t.taped_at(in.saved, in.count), params = t.taped_at(in.params, 2 * in.count);
    const Columns<T> gparams = t.array(0, 2 * in.count);
    const T arg = T(in.map_arg), sign = Inverse ? T(-1) : T(1);
    for_each_column(t, in, [&](int64_t b, int64_t c, int64_t i) {
      T* __restrict g = t.grad.at(b, c);
      const T* __restrict x = saved.at(b, i), * __restrict gl = t.grad_logdet + b * kWidth<T>;
      const T* __restrict shift = params.at(b, shift_at(in, i)), * __restrict s = params.at(b, scale_at(in, i));
      T* __restrict gshift = gparams.at(b, shift_at(in, i)), * __restrict gscale = gparams.at(b, scale_at(in, i));
#pragma omp simd
      for (int r = 0; r < kWidth<T>; ++r) {
        const LogScale<T> v = log_scale_slope<M>(s[r], arg);
        const CouplingGrad<T> grad =
            couple_backward<Inverse, ShiftFirst>(g[r], gl[r], x[r], shift[r], exp_(sign * v.g), v.slope);
        g[r] = grad.x;
        gshift[r] = grad.shift;
        gscale[r] = grad.scale;
      }
    });
  }

  template <ScaleMap M, class T>
  static void pull_map(const ProgramTile<T>& t, const ProgramInstruction& in) {
    if (in.inverse) return in.shift_first ? pull<M, true, true>(t, in) : pull<M, true, false>(t, in);
    return in.shift_first ? pull<M, false, true>(t, in) : pull<M, false, false>(t, in);
  }

  template <class T>
  static void backward(const ProgramTile<T>& t, const ProgramInstruction& in) {
    as_constant(in.map, [&](auto map) { pull_map<map.value>(t, in); });
  }
};

}  // namespace pyflow::PYFLOW_ISA
