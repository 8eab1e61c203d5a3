// Adds the log-density of some columns.
#pragma once

#include "rule.h"

namespace pyflow::PYFLOW_ISA {

template <>
struct Rule<Instruction::prior> {
  template <Prior P, class T>
  static void run(const ProgramTile<T>& t, const ProgramInstruction& in) {
    for (int64_t b = 0; b < t.blocks; ++b) {
      alignas(64) T sum[kWidth<T>] = {};
      for (int64_t i = 0; i < in.count; ++i) {
        const T* __restrict z = t.state.at(b, in.columns[i]);
#pragma omp simd
        for (int r = 0; r < kWidth<T>; ++r) {
          sum[r] += prior_log_density<P>(z[r]);
        }
      }
      add_logdet(t, b, sum);
    }
    add_logdet(t, double(in.count) * kPriorConstant<P>);
  }

  template <class T>
  static void forward(const ProgramTile<T>& t, const ProgramInstruction& in) {
    save(t, in);
    as_constant(in.prior, [&](auto prior) { run<prior.value>(t, in); });
  }

  template <Prior P, class T>
  static void pull(const ProgramTile<T>& t, const ProgramInstruction& in) {
    const Columns<T> saved = t.taped_at(in.saved, in.count);
    for_each_column(t, in, [&](int64_t b, int64_t c, int64_t i) {
      T* __restrict g = t.grad.at(b, c);
      const T* __restrict z = saved.at(b, i), * __restrict gl = t.grad_logdet + b * kWidth<T>;
#pragma omp simd
      for (int r = 0; r < kWidth<T>; ++r) {
        g[r] = fma_(gl[r], prior_score<P>(z[r]), g[r]);
      }
    });
  }

  template <class T>
  static void backward(const ProgramTile<T>& t, const ProgramInstruction& in) {
    as_constant(in.prior, [&](auto prior) { pull<prior.value>(t, in); });
  }
};

}  // namespace pyflow::PYFLOW_ISA
