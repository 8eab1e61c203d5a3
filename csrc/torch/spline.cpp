#include "../args/spline.h"

#include <algorithm>
#include <vector>

#include "device.h"

namespace pyflow {
namespace {

using Optional = std::optional<Tensor>;
using Tails = std::vector<int64_t>;  // indices into TAILS: linear, circular

struct Options {
  double bound;
  int64_t bins;
  const Tails& tails;
  int64_t form;
  double param_scale, min_bin, min_slope;
  bool inverse;
};

SplineTails tails_of(const Options& o, int64_t params) {
  if (o.tails.empty()) return SplineTails::none;
  // a list of one is that of a single feature
  if (o.tails.size() > 1 || params == 3 * o.bins + 1) return SplineTails::mixed;
  return o.tails[0] == 0 ? SplineTails::linear : SplineTails::circular;
}

// features are counted in C order
bool by_feature(const Tails& tails, const Optional& bounds) { return (bounds && !tails.empty()) || tails.size() > 1; }

// adds x, parameters and mask, and sets what forward and backward share
void set(SplineArgs& a, Layout& layout, const Options& o, const Tensor& x, const Tensor& params, const Optional& bounds,
         const Optional& mask) {
  const int64_t last = params.size(params.dim() - 1);
  STD_TORCH_CHECK(o.bins >= 2 && o.bins <= kMostBins, "pyflow: a spline kernel takes 2 to ", kMostBins, " bins");
  STD_TORCH_CHECK(int64_t(o.tails.size()) <= kMostFeatures, "pyflow: a spline kernel takes at most ", kMostFeatures,
                  " tails");
  a.f64 = is_f64(x);
  a.inverse = o.inverse;
  a.variant = SplineVariant(o.form);
  a.bins = int(o.bins);
  a.tails = tails_of(o, last);
  STD_TORCH_CHECK(last == spline_params(a.bins, a.tails), "pyflow: a spline of ", o.bins, " bins has no ", last,
                  " parameters");
  a.constants = spline_constants(a.variant, a.bins, o.param_scale, o.min_bin, o.min_slope);
  a.low = a.tails == SplineTails::none ? 0 : -o.bound;
  a.high = a.tails == SplineTails::none ? 1 : o.bound;
  a.features = by_feature(o.tails, bounds) && x.dim() > 0 ? x.size(x.dim() - 1) : 1;
  if (bounds && !o.tails.empty()) {
    a.bounds.data = (char*)bounds->data_ptr();
    a.bounds.dtype = dtype_of(*bounds);
    a.bounds.stride[0] = bounds->stride(0);
  }
  for (size_t f = 0; f < o.tails.size(); ++f) a.linear[f / 32] |= uint32_t(o.tails[f] == 0) << (f % 32);
  layout.add(a.x, x);
  layout.add(a.params, params);
  a.step = params.stride(params.dim() - 1);
  if (mask) layout.add(a.mask, *mask);
}

void plan_groups(SplineArgs& a, Layout& layout) {
  a.space = layout.merge();
  // the cost of loading short rows together does not count here
  a.plan = plan_of(a.space, true);
  a.plan.grain = std::max<int64_t>(1, a.plan.grain / (2 * a.bins));
}

std::tuple<Tensor, Tensor> rq_spline(Tensor x, Tensor params, Optional bounds, Optional mask, double bound,
                                     int64_t bins, Tails tails, int64_t form, double param_scale, double min_bin,
                                     double min_slope, bool inverse, int64_t event_dims) {
  SplineForward a{};
  Layout layout(x, event_dims, by_feature(tails, bounds));
  set(a, layout, {bound, bins, tails, form, param_scale, min_bin, min_slope, inverse}, x, params, bounds, mask);
  Tensor y = new_like(x);
  layout.add_output(a.y, y);
  plan_groups(a, layout);
  SumTensors logdet(a.logdet, x, x.sizes().data(), x.dim() - event_dims, a.space, a.plan, compute_type(a.f64));
  if (x.numel() > 0) PYFLOW_RUN(spline_forward, a, x);
  logdet.finish();
  return {y, logdet.out};
}

std::tuple<Tensor, Tensor> rq_spline_backward(Optional gy, Optional gl, Tensor x, Tensor params, Optional bounds,
                                              Optional mask, double bound, int64_t bins, Tails tails, int64_t form,
                                              double param_scale, double min_bin, double min_slope, bool inverse,
                                              int64_t event_dims) {
  SplineBackward a{};
  Layout layout(x, event_dims, by_feature(tails, bounds));
  set(a, layout, {bound, bins, tails, form, param_scale, min_bin, min_slope, inverse}, x, params, bounds, mask);
  Tensor gx = new_like(x), gparams = new_like(params);
  layout.add_output(a.gx, gx);
  layout.add(a.gparams, gparams);
  a.gstep = gparams.stride(gparams.dim() - 1);
  if (gy) layout.add(a.gy, *gy);
  if (gl) layout.add_rows(a.gl, *gl);
  plan_groups(a, layout);
  if (x.numel() > 0) PYFLOW_RUN(spline_backward, a, x);
  return {gx, gparams};
}

}  // namespace

PYFLOW_OPERATORS(m) {
  m.impl("rq_spline", TORCH_BOX(&rq_spline));
  m.impl("rq_spline_backward", TORCH_BOX(&rq_spline_backward));
}

}  // namespace pyflow
