// x = spline of x, its numbers from the last conditioner, or for every row those of a weight.
#pragma once

#include "../spline_bins.h"
#include "rule.h"

namespace pyflow::PYFLOW_ISA {

template <>
struct Rule<Instruction::spline> {
  static int64_t numbers(const ProgramInstruction& in) { return spline_params(in.spline.bins, in.spline.tails); }

  // of column i
  template <class T>
  static void set_column(const ProgramInstruction& in, int64_t i, Ends<T, kWidth<T>>& e) {
    set_ends(in.ends[i].low, in.ends[i].high, in.ends[i].linear, e);
  }

  // what the conditioner computed for column i
  template <class T>
  static Rows<T, kWidth<T>> of_column(const ProgramInstruction& in, const Columns<T>& all, int64_t b, int64_t i) {
    return (Rows<T, kWidth<T>>)all.at(b, i * numbers(in));
  }

  template <class T>
  static void copy_rows(Rows<T, kWidth<T>> from, int64_t count, Rows<T, kWidth<T>> to) {
    __builtin_memcpy(to, from, sizeof *to * size_t(count));
  }

  // the numbers of the weight for column i, the same in all lanes
  template <class T>
  static void fill_rows(const ProgramInstruction& in, int64_t i, Rows<T, kWidth<T>> to) {
    const T* from = (const T*)in.numbers.data + i * numbers(in);
    for (int64_t j = 0; j < numbers(in); ++j) fill(to[j], from[j], kWidth<T>);
  }

  // 0 outside of the ends
  template <class T>
  static void clear_outside(const Used<T, kWidth<T>>& used, T* __restrict values) {
#pragma omp simd
    for (int r = 0; r < kWidth<T>; ++r) values[r] = used.used[r] == T(0) ? T(0) : values[r];
  }

  template <SplineVariant V, bool Inverse, class T>
  static void run(const ProgramTile<T>& t, const ProgramInstruction& in) {
    constexpr int W = kWidth<T>;
    const SplineForm& form = in.spline;
    const SplineConstants<T> c = constants_of<T>(form);
    const Columns<T> params = t.taped_at(in.params, in.count * numbers(in));
    alignas(64) T own[kMostParams][W], y[W], g[W], sum[kProgramMostRows] = {};
    alignas(64) const T mask[W] = {};
    Ends<T, W> e;
    Bins<T, W> bins;
    Used<T, W> used;
    Totals<T, W> total;
    Ahead none{};
    for (int64_t i = 0; i < in.count; ++i) {
      set_column(in, i, e);
      if (in.numbers.data) {
        fill_rows<T>(in, i, own);
        softmaxes<V>(form, c, own, none, total);
      }
      for (int64_t b = 0; b < t.blocks; ++b) {
        Rows<T, W> p = own;
        if (!in.numbers.data) {
          const Rows<T, W> given = of_column(in, params, b, i);
          // the backward needs them as they are
          const bool needed = t.back || is_kept(in.params);
          p = needed ? own : given;
          if (needed) copy_rows<T>(given, numbers(in), own);
          softmaxes<V>(form, c, p, none, total);
        }
        T* x = t.state.at(b, in.columns[i]);
        set_used(form, e, x, mask, used);
        find_bins<V, Inverse>(form, c, e, x, p, p + 2 * form.bins, total, bins);
        set_slopes<V>(bins, c);
        transform<Inverse>(bins, used, x, y, g);
        if (in.zero_outside) clear_outside(used, y);
        copy_column(y, x);
        add_column(g, sum + b * W);
      }
    }
    for (int64_t b = 0; b < t.blocks; ++b) add_logdet(t, b, sum + b * W);
  }

  template <class T>
  static void turn(const ProgramTile<T>& t, const ProgramInstruction& in) {
    for_each_column(t, in, [&](int64_t b, int64_t c, int64_t i) {
      T* __restrict x = t.state.at(b, c);
      const T bound = T(in.ends[i].high);
#pragma omp simd
      for (int r = 0; r < kWidth<T>; ++r) {
        x[r] = wrap(x[r], bound);
      }
    });
  }

  template <class T>
  static void forward(const ProgramTile<T>& t, const ProgramInstruction& in) {
    if (in.turned && !in.spline.inverse) turn(t, in);
    transform_once(t, in, [&] {
      with_form(in.spline, [&](auto variant, auto inverse) { run<variant.value, inverse.value>(t, in); });
      if (in.turned && in.spline.inverse) turn(t, in);
    });
  }

  template <SplineVariant V, bool Inverse, class T>
  static void pull(const ProgramTile<T>& t, const ProgramInstruction& in) {
    constexpr int W = kWidth<T>;
    const SplineForm& form = in.spline;
    const SplineConstants<T> c = constants_of<T>(form);
    const int64_t count = numbers(in);
    const Columns<T> saved = t.taped_at(in.saved, in.count), params = t.taped_at(in.params, in.count * count);
    const Columns<T> gparams = t.array(0, in.count * count);
    alignas(64) T own[kMostParams][W], parts[2 * kMostBins][W], of_own[kMostParams][W], gx[W];
    alignas(64) const T mask[W] = {};
    Ends<T, W> e;
    Bins<T, W> bins;
    Used<T, W> used;
    Totals<T, W> total;
    BinGrads<T, W> d;
    Ahead none{};
    for (int64_t i = 0; i < in.count; ++i) {
      set_column(in, i, e);
      if (in.numbers.data) {
        fill_rows<T>(in, i, own);
        copy_rows<T>(own, 2 * form.bins, parts);
        softmaxes<V>(form, c, parts, none, total);
      }
      for (int64_t b = 0; b < t.blocks; ++b) {
        Rows<T, W> p = own, grad = of_own;
        if (!in.numbers.data) {
          p = of_column(in, params, b, i);
          grad = of_column(in, gparams, b, i);
          copy_rows<T>(p, 2 * form.bins, parts);
          softmaxes<V>(form, c, parts, none, total);
        }
        const T* x = saved.at(b, i);
        T* g = t.grad.at(b, in.columns[i]);
        set_used(form, e, x, mask, used);
        find_bins<V, Inverse>(form, c, e, x, parts, p + 2 * form.bins, total, bins);
        set_slope_rates<V>(bins, c, d.d0, d.d1);
        set_slopes<V>(bins, c);
        bin_gradients<Inverse>(bins, form.bins, used, x, g, t.grad_logdet + b * W, d, gx);
        if (in.zero_outside) clear_outside(used, gx);
        copy_column(gx, g);
        copy_rows<T>(p, 2 * form.bins, grad);
        logit_gradients<V>(grad, parts, form.bins, c, total.w, e, used, bins.k, d.x0, d.x1, none);
        logit_gradients<V>(grad + form.bins, parts + form.bins, form.bins, c, total.h, e, used, bins.k, d.y0, d.y1,
                           none);
        slope_gradients(grad + 2 * form.bins, count - 2 * form.bins, used, bins, d);
        for (int64_t j = 0; in.numbers.data && t.sums && j < count; ++j) {
          add_lanes(b, grad[j], lanes_of(t, in.numbers.place, i * count + j));
        }
      }
    }
  }

  template <class T>
  static void backward(const ProgramTile<T>& t, const ProgramInstruction& in) {
    with_form(in.spline, [&](auto variant, auto inverse) { pull<variant.value, inverse.value>(t, in); });
  }
};

}  // namespace pyflow::PYFLOW_ISA
