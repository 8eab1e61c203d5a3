// Kernels of HSIC: what of two rows is summed over the features, the kernel of that sum, and its derivative.
#pragma once

#include "../math/exp.h"

namespace pyflow {

// the order is HSIC_KERNELS of the operator schemas
enum class GramKernel : int { rbf, laplacian, polynomial, delta, precomputed };

PYFLOW_FN bool of_distances(GramKernel kernel) { return kernel == GramKernel::rbf || kernel == GramKernel::laplacian; }

// At wide bandwidths the sums of K cancel: K - 1 takes its place, for which HSIC is the same; at narrow ones K - 1
// would lose what K keeps. The mean squared distance is twice the sum of the features' variances, here in units of the
// squared bandwidth; that of absolute ones, of normal data, 2 / sqrt(pi) times the sum of their deviations.
constexpr double kWideVariance = 2;
constexpr double kWideDeviation = 1.7724538509055159;

// what is summed over the features
enum class RawSum : int { product, square, distance, mismatch, none };

// up to here an rbf kernel sums squared differences, which are exact for near rows; above it uses dot products, one
// operation a feature
constexpr int kSquaresUpTo = 8;

PYFLOW_FN RawSum raw_sum(GramKernel kernel, int64_t dim) {
  switch (kernel) {
    case GramKernel::rbf: return dim <= kSquaresUpTo ? RawSum::square : RawSum::product;
    case GramKernel::laplacian: return RawSum::distance;
    case GramKernel::polynomial: return RawSum::product;
    case GramKernel::delta: return RawSum::mismatch;
    default: return RawSum::none;
  }
}

// Half the squared length of a row, centred and in units of the bandwidth, above which its rounding shows in distances
// to rows near it: differences of the rows as they came take the place of what is packed. A row far from a near one is
// far enough that K is 0 whatever the rounding.
template <class T>
constexpr double kApart = sizeof(T) == 4 ? 0x1p6 : 0x1p16;

template <RawSum R, class T>
PYFLOW_FN T accumulate(T sum, T a, T b) {
  if constexpr (R == RawSum::product) return fma_(a, b, sum);
  if constexpr (R == RawSum::square) return fma_(a - b, a - b, sum);
  if constexpr (R == RawSum::distance) return sum + abs_(a - b);
  return sum + T(a != b);
}

// the kernel less `shift`; `halves` are both rows' |z|^2 / 2
template <class T>
PYFLOW_FN T rbf_of_product(T product, T halves, T shift) {
  const T exponent = product - halves;
  // rounding may leave a distance below 0
  return exp_less(exponent > T(0) ? T(0) : exponent, shift);
}

}  // namespace pyflow
