// Kernel functions of HSIC: the sum over the features of two rows (the raw sum), and the kernel value of that sum.
#pragma once

#include "../math/exp.h"
#include "../tiles/enum.h"

// in the order of HSIC_KERNELS in pyflow/_schemas.py
#define PYFLOW_HSIC_KERNEL_NAMES(F) \
  F(rbf)                            \
  F(laplacian)                      \
  F(polynomial)                     \
  F(delta)                          \
  F(precomputed)

namespace pyflow {

PYFLOW_ENUM(GramKernel, PYFLOW_HSIC_KERNEL_NAMES)

PYFLOW_FN bool of_distances(GramKernel kernel) { return kernel == GramKernel::rbf || kernel == GramKernel::laplacian; }

// At wide bandwidths sums of K cancel, so K - 1 is used instead, which gives the same HSIC; at narrow bandwidths K - 1
// loses digits that K keeps. K - 1 is used up to these limits: rbf, the sum of the feature variances over the squared
// bandwidth (half the mean squared distance); laplacian, the sum of the feature standard deviations over the bandwidth
// (for normal data the mean absolute distance is 2 / sqrt(pi) times that).
constexpr double kWideVariance = 2;
constexpr double kWideDeviation = 1.7724538509055159;

// the term that is summed over the features
enum class RawSum : int { product, square, distance, mismatch, none };

// up to this dimension an rbf kernel sums squared differences, which are exact for near rows; above it uses dot
// products, one operation per feature
constexpr int kSquaresUpTo = 8;

PYFLOW_FN RawSum raw_sum(GramKernel kernel, int64_t dim) {
  switch (kernel) {
    case GramKernel::rbf: return dim <= kSquaresUpTo ? RawSum::square : RawSum::product;
    case GramKernel::laplacian: return RawSum::distance;
    case GramKernel::polynomial: return RawSum::product;
    case GramKernel::delta: return RawSum::mismatch;
    case GramKernel::precomputed: break;
  }
  return RawSum::none;
}

// Limit of |z|^2 / 2 for a row z, centred and in units of the bandwidth. Above it the rounding of packed rows shows in
// the distance of two near rows, so differences of the original rows are used. If one of two rows is above the limit
// and the other near the centre, K is 0 whatever the rounding.
template <class T>
constexpr double kApart = sizeof(T) == 4 ? 0x1p6 : 0x1p16;

template <RawSum R, class T>
PYFLOW_FN T accumulate(T sum, T a, T b) {
  if constexpr (R == RawSum::product) return fma_(a, b, sum);
  if constexpr (R == RawSum::square) return fma_(a - b, a - b, sum);
  if constexpr (R == RawSum::distance) return sum + abs_(a - b);
  return sum + T(a != b);
}

// rbf kernel minus `shift` from a dot product; `halves` is the sum of both rows' |z|^2 / 2
template <class T>
PYFLOW_FN T rbf_of_product(T product, T halves, T shift) {
  const T exponent = product - halves;
  // rounding can make the squared distance negative
  return exp_less(exponent > T(0) ? T(0) : exponent, shift);
}

}  // namespace pyflow
