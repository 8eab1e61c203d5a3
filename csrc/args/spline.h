// Arguments of the spline kernels.
#pragma once

#include "../cpu/dispatch.h"
#include "../cuda/shared.h"
#include "../ops/spline.h"
#include "../tiles/plan.h"

// what the slopes among the parameters of an element are, for K bins: none: K + 1, one per knot; linear: K - 1, the
// outer ones are 1; circular: K, the last knot has the slope of the first; mixed: K + 1, linear or circular by feature
#define PYFLOW_SPLINE_TAILS(F) \
  F(none)                      \
  F(linear)                    \
  F(circular)                  \
  F(mixed)

namespace pyflow {

PYFLOW_ENUM(SplineTails, PYFLOW_SPLINE_TAILS)

constexpr int64_t kMostFeatures = 2048;  // of mixed tails

// how parameters become splines
struct SplineForm {
  SplineVariant variant;
  SplineTails tails;
  int bins;
  bool inverse;
  SplineConstants<double> constants;  // rounded to the compute type by kernels
};

struct SplineArgs : SplineForm {
  Space space;
  Plan plan;
  bool f64;          // compute type: double for float64 x, float for everything else
  double low, high;  // the ends of the domain and range; not used with `bounds`
  // of the last dim of x. The feature of an element is (row * cols + col) % features. 1 without bounds and mixed tails,
  // else rows and columns are in C order.
  int64_t features;
  View bounds;                          // may be absent; (features,) of the compute type, stride[0] apart
  uint32_t linear[kMostFeatures / 32];  // mixed tails: bit f % 32 of word f / 32 says that feature f is linear
  View x, mask;                         // mask may be absent; true: x passes through
  // params has the strides of its leading dims, those of x, and points to the first parameter of an element; the others
  // follow `step` elements apart: K widths, K heights, then slopes
  View params;
  int64_t step;
};

struct SplineForward : SplineArgs {
  View y;
  RowSums logdet;
};

struct SplineBackward : SplineArgs {
  View gy, gl;  // either may be absent; gl has row dims only
  View gx;
  View gparams;  // as params, with its own strides; every element is written
  int64_t gstep;
};

// K widths, K heights and the slopes
PYFLOW_FN int spline_params(int bins, SplineTails tails) {
  return 3 * bins + (tails == SplineTails::linear ? -1 : tails == SplineTails::circular ? 0 : 1);
}

PYFLOW_FN SplineConstants<double> spline_constants(SplineVariant v, int bins, double param_scale, double min_bin,
                                                   double min_slope) {
  if (v == SplineVariant::zuko) return {1, -log_(min_slope), 0, 1, min_slope};
  return {param_scale, 1, min_bin, 1 - bins * min_bin, min_slope};
}

PYFLOW_CPU_KERNEL(spline_forward, SplineForward)
PYFLOW_CPU_KERNEL(spline_backward, SplineBackward)

namespace cuda {
void spline_forward(const SplineForward&, Stream);
void spline_backward(const SplineBackward&, Stream);
}  // namespace cuda

}  // namespace pyflow
