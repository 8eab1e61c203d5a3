#include "../args/coupling.h"

#include "device.h"

namespace pyflow {
namespace {

using Optional = std::optional<Tensor>;

struct Map {
  int64_t scale_map;
  double arg;
  bool shift_first, inverse;
};

// adds x and sets what all affine operators share
void set_affine(CouplingArgs& a, Layout& layout, const Map& m, const Tensor& x) {
  layout.add(a.x, x);
  a.f64 = is_f64(x);
  a.affine = true;
  a.scale_map = resolve(m.scale_map, m.arg);
  a.map_arg = m.arg;
  a.shift_first = m.shift_first;
  a.inverse = m.inverse;
}

// adds the views of shift and scale in packed parameters
void add_packed(Layout& layout, View& shift, View& scale, const Tensor& params, int64_t packing, int64_t dim) {
  const Packing p = Packing(packing);
  const bool interleaved = p == Packing::interleaved, scale_first = p == Packing::scale_shift;
  const int64_t second = interleaved ? 1 : params.size(dim) / 2, step = interleaved ? 2 : 1;
  layout.add_slice(shift, params, dim, scale_first ? second : 0, step);
  layout.add_slice(scale, params, dim, scale_first ? 0 : second, step);
}

// expects x and the parameters in `layout`; adds y and mask and plans the call
Tensor plan_forward(CouplingForward& a, Layout& layout, const Tensor& x, const Optional& mask) {
  Tensor y = new_like(x);
  layout.add_output(a.y, y);
  if (mask) layout.add(a.mask, *mask);
  plan(a, layout);
  return y;
}

Tensor additive_coupling(Tensor x, Tensor shift, Optional mask, bool inverse) {
  CouplingForward a{};
  // a single dim is one row on a GPU, which splits long rows, and a column on a CPU, which splits columns
  Layout layout(x, x.dim() > 1 ? x.dim() - 1 : kCuda ? x.dim() : 0);
  a.f64 = is_f64(x);
  a.inverse = inverse;
  layout.add(a.x, x);
  layout.add(a.shift, shift);
  Tensor y = plan_forward(a, layout, x, mask);
  if (x.numel() > 0) PYFLOW_RUN(coupling_forward, a, x);
  return y;
}

std::tuple<Tensor, Tensor> run_affine(CouplingForward& a, Layout& layout, const Tensor& x, const Optional& mask,
                                      int64_t event_dims) {
  Tensor y = plan_forward(a, layout, x, mask);
  SumTensors logdet(a.logdet, x, x.sizes().data(), x.dim() - event_dims, a.space, a.plan, compute_type(a.f64));
  if (x.numel() > 0) PYFLOW_RUN(coupling_forward, a, x);
  logdet.finish();
  return {y, logdet.out};
}

std::tuple<Tensor, Tensor> affine_coupling(Tensor x, Tensor shift, Tensor scale, Optional mask, int64_t scale_map,
                                           double map_arg, bool shift_first, bool inverse, int64_t event_dims) {
  CouplingForward a{};
  Layout layout(x, event_dims);
  set_affine(a, layout, {scale_map, map_arg, shift_first, inverse}, x);
  layout.add(a.shift, shift);
  layout.add(a.scale, scale);
  return run_affine(a, layout, x, mask, event_dims);
}

std::tuple<Tensor, Tensor> affine_coupling_packed(Tensor x, Tensor params, Optional mask, int64_t packing, int64_t dim,
                                                  int64_t scale_map, double map_arg, bool shift_first, bool inverse,
                                                  int64_t event_dims) {
  CouplingForward a{};
  Layout layout(x, event_dims);
  set_affine(a, layout, {scale_map, map_arg, shift_first, inverse}, x);
  add_packed(layout, a.shift, a.scale, params, packing, dim);
  return run_affine(a, layout, x, mask, event_dims);
}

// expects x, the parameters and their gradients in `layout`; adds the other views
Tensor run_backward(CouplingBackward& a, Layout& layout, const Optional& gy, const Optional& gl, const Tensor& x,
                    const Optional& mask) {
  Tensor gx = new_like(x);
  layout.add_output(a.gx, gx);
  if (gy) layout.add(a.gy, *gy);
  if (gl) layout.add_rows(a.gl, *gl);
  if (mask) layout.add(a.mask, *mask);
  plan(a, layout);
  if (x.numel() > 0) PYFLOW_RUN(coupling_backward, a, x);
  return gx;
}

std::tuple<Tensor, Tensor, Tensor> affine_coupling_backward(Optional gy, Optional gl, Tensor x, Optional shift,
                                                            Tensor scale, Optional mask, int64_t scale_map,
                                                            double map_arg, bool shift_first, bool inverse,
                                                            int64_t event_dims, std::optional<ScalarType> shift_dtype) {
  CouplingBackward a{};
  Layout layout(x, event_dims);
  set_affine(a, layout, {scale_map, map_arg, shift_first, inverse}, x);
  Tensor gshift = shift_dtype ? new_empty(x, x.sizes().data(), x.dim(), *shift_dtype) : new_none(x, x.scalar_type());
  Tensor gscale = new_like(scale);
  if (shift) layout.add(a.shift, *shift);
  layout.add(a.scale, scale);
  if (shift_dtype) layout.add_output(a.gshift, gshift);
  layout.add_output(a.gscale, gscale);
  Tensor gx = run_backward(a, layout, gy, gl, x, mask);
  return {gx, gshift, gscale};
}

std::tuple<Tensor, Tensor> affine_coupling_packed_backward(Optional gy, Optional gl, Tensor x, Tensor params,
                                                           Optional mask, int64_t packing, int64_t dim,
                                                           int64_t scale_map, double map_arg, bool shift_first,
                                                           bool inverse, int64_t event_dims) {
  CouplingBackward a{};
  Layout layout(x, event_dims);
  set_affine(a, layout, {scale_map, map_arg, shift_first, inverse}, x);
  Tensor gparams = new_like(params);
  add_packed(layout, a.shift, a.scale, params, packing, dim);
  // not read where the gradient does not contain it
  if (shift_first == inverse) a.shift.data = nullptr;
  add_packed(layout, a.gshift, a.gscale, gparams, packing, dim);
  a.gshift.stream = a.gscale.stream = streams(gparams);
  Tensor gx = run_backward(a, layout, gy, gl, x, mask);
  return {gx, gparams};
}

}  // namespace

PYFLOW_OPERATORS(m) {
  m.impl("additive_coupling", TORCH_BOX(&additive_coupling));
  m.impl("affine_coupling", TORCH_BOX(&affine_coupling));
  m.impl("affine_coupling_packed", TORCH_BOX(&affine_coupling_packed));
  m.impl("affine_coupling_backward", TORCH_BOX(&affine_coupling_backward));
  m.impl("affine_coupling_packed_backward", TORCH_BOX(&affine_coupling_packed_backward));
}

}  // namespace pyflow
