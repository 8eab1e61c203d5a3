// h = (h - mean) / sqrt(variance + eps) weight + bias, over the columns.
#pragma once

#include "../part.h"

namespace pyflow::PYFLOW_ISA {

template <>
struct PartRule<Part::norm> {
  template <class T>
  static T over(const ProgramPart& part) {
    return T(part.size - int64_t(part.unbiased));
  }

  // the mean of a block's columns, and 1 / sqrt(variance + eps)
  template <class T>
  static void measure(const ProgramPart& part, const Columns<T>& h, int64_t b, T* __restrict mean, T* __restrict rate) {
    const T share = T(1) / T(part.size), divisor = over<T>(part), eps = T(part.eps);
    alignas(64) T sum[kWidth<T>] = {}, squares[kWidth<T>] = {};
    for (int64_t i = 0; i < part.size; ++i) add_column(h.at(b, i), sum);
    for (int r = 0; r < kWidth<T>; ++r) mean[r] = sum[r] * share;
    for (int64_t i = 0; i < part.size; ++i) {
      const T* __restrict x = h.at(b, i);
#pragma omp simd
      for (int r = 0; r < kWidth<T>; ++r) {
        const T from_mean = x[r] - mean[r];
        squares[r] = fma_(from_mean, from_mean, squares[r]);
      }
    }
#pragma omp simd
    for (int r = 0; r < kWidth<T>; ++r) {
      rate[r] = T(1) / sqrt_(squares[r] / divisor + eps);
    }
  }

  template <class T>
  static void forward(const ProgramTile<T>& t, const ProgramPart& part) {
    const Columns<T> from = input_of(t, part), to = output_of(t, part);
    alignas(64) T mean[kWidth<T>], rate[kWidth<T>];
    for (int64_t b = 0; b < t.blocks; ++b) {
      measure(part, from, b, mean, rate);
      for (int64_t i = 0; i < part.size; ++i) {
        const T weight = entry(part.weight, i, T(1)), bias = entry(part.bias, i, T(0));
        const T* x = from.at(b, i);
        T* y = to.at(b, i);
#pragma omp simd
        for (int r = 0; r < kWidth<T>; ++r) {
          y[r] = fma_((x[r] - mean[r]) * rate[r], weight, bias);
        }
      }
    }
  }

  // g -> g weight; adds to sums over the columns of it, and of its product with the normalised h
  template <class T>
  static void pull_weight(const ProgramTile<T>& t, const ProgramPart& part, const Columns<T>& from, int64_t b,
                          const T* __restrict mean, const T* __restrict rate, T* g, T* __restrict sum,
                          T* __restrict along) {
    alignas(64) T product[kWidth<T>];
    for (int64_t i = 0; i < part.size; ++i) {
      const T weight = entry(part.weight, i, T(1));
      const T* __restrict x = from.at(b, i);
      T* __restrict gi = g + i * kWidth<T>;
#pragma omp simd
      for (int r = 0; r < kWidth<T>; ++r) {
        product[r] = gi[r] * ((x[r] - mean[r]) * rate[r]);
        along[r] = fma_(product[r], weight, along[r]);
        gi[r] *= weight;
        sum[r] += gi[r];
      }
      if (t.sums && part.weight.data) add_lanes(b, product, lanes_of(t, part.weight.place, i));
    }
  }

  template <class T>
  static T* backward(const ProgramTile<T>& t, const ProgramPart& part, Arrays<T>&, T* g) {
    const Columns<T> from = input_of(t, part), grad{g, part.size};
    add_lanes(t, part.bias, grad);
    const T share = T(1) / T(part.size), divisor = over<T>(part);
    alignas(64) T mean[kWidth<T>], rate[kWidth<T>];
    for (int64_t b = 0; b < t.blocks; ++b) {
      alignas(64) T sum[kWidth<T>] = {}, along[kWidth<T>] = {};
      measure(part, from, b, mean, rate);
      pull_weight(t, part, from, b, mean, rate, grad.at(b, 0), sum, along);
      for (int64_t i = 0; i < part.size; ++i) {
        const T* __restrict x = from.at(b, i);
        T* __restrict gi = grad.at(b, i);
#pragma omp simd
        for (int r = 0; r < kWidth<T>; ++r) {
          const T normal = (x[r] - mean[r]) * rate[r];
          gi[r] = rate[r] * (gi[r] - sum[r] * share - normal * (along[r] / divisor));
        }
      }
    }
    return g;
  }
};

}  // namespace pyflow::PYFLOW_ISA
