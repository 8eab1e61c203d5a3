#include "../cpu/coupling.h"

#include "../cpu/dispatch.h"
#include "tensor.h"

namespace pyflow {
namespace {

// offsets and step of shift and scale inside the packed parameters
struct Packing {
  int64_t shift_offset, scale_offset, step;
};

// cases in the order of `packing` in the operator schema
Packing packing_of(int64_t packing, int64_t half) {
  switch (packing) {
    case 0: return {0, half, 1};  // shift_scale
    case 1: return {half, 0, 1};  // scale_shift
    default: return {0, 1, 2};    // interleaved
  }
}

struct Map {
  int64_t scale_map;
  double arg;
  bool shift_first, inverse;
};

void set_map(CouplingArgs& a, const Map& m, const Tensor& x) {
  a.f64 = x.scalar_type() == ScalarType::Double;
  a.scale_map = resolve(m.scale_map, m.arg);
  a.map_arg = m.arg;
  a.shift_first = m.shift_first;
  a.inverse = m.inverse;
}

// expects x and the parameters in `layout`; adds y and mask
std::tuple<Tensor, Tensor> run_forward(CouplingForward& a, Layout& layout, const Tensor& x,
                                       const std::optional<Tensor>& mask, int64_t event_dims) {
  const ScalarType sum_dtype = a.f64 ? ScalarType::Double : ScalarType::Float;
  Tensor y = new_like(x);
  layout.add(a.y, y);
  a.y.stream = streams(y);
  if (mask) layout.add(a.mask, *mask);
  a.space = layout.merge();
  a.plan = plan_of(a.space, layout.flat());
  int64_t sizes[64];
  for (int64_t d = 0; d < x.dim() - event_dims; ++d) sizes[d] = x.size(d);
  Tensor logdet = new_empty(x, sizes, a.affine ? x.dim() - event_dims : 0, sum_dtype);
  a.logdet = logdet.data_ptr();
  a.partial = nullptr;
  Tensor partial = logdet;
  if (a.plan.segments > 1) {
    const int64_t count = a.space.rows * a.plan.segments;
    partial = new_empty(x, &count, 1, ScalarType::Double);
    a.partial = (double*)partial.data_ptr();
  }
  const auto kernel = cpu_table()->coupling_forward;
  if (x.numel() > 0) {
    torch::stable::parallel_for(0, a.plan.units, a.plan.grain,
                                [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  }
  if (a.affine && (a.partial || x.numel() == 0)) {
    for (int64_t r = 0; r < a.space.rows; ++r) {
      double total = 0;
      for (int64_t i = 0; a.partial && i < a.plan.segments; ++i) total += a.partial[r * a.plan.segments + i];
      a.f64 ? ((double*)a.logdet)[r] = total : ((float*)a.logdet)[r] = float(total);
    }
  }
  return {y, logdet};
}

Tensor additive_coupling(Tensor x, Tensor shift, std::optional<Tensor> mask, bool inverse) {
  CouplingForward a{};
  Layout layout(x, x.dim() > 0 ? x.dim() - 1 : 0);
  set_map(a, {0, 0, false, inverse}, x);
  layout.add(a.x, x);
  layout.add(a.shift, shift);
  return std::get<0>(run_forward(a, layout, x, mask, 0));
}

std::tuple<Tensor, Tensor> affine_coupling(Tensor x, Tensor shift, Tensor scale, std::optional<Tensor> mask,
                                           int64_t scale_map, double map_arg, bool shift_first, bool inverse,
                                           int64_t event_dims) {
  CouplingForward a{};
  Layout layout(x, event_dims);
  set_map(a, {scale_map, map_arg, shift_first, inverse}, x);
  layout.add(a.x, x);
  layout.add(a.shift, shift);
  layout.add(a.scale, scale);
  a.affine = true;
  return run_forward(a, layout, x, mask, event_dims);
}

std::tuple<Tensor, Tensor> affine_coupling_packed(Tensor x, Tensor params, std::optional<Tensor> mask, int64_t packing,
                                                  int64_t dim, int64_t scale_map, double map_arg, bool shift_first,
                                                  bool inverse, int64_t event_dims) {
  CouplingForward a{};
  Layout layout(x, event_dims);
  const Packing p = packing_of(packing, x.size(dim));
  set_map(a, {scale_map, map_arg, shift_first, inverse}, x);
  layout.add(a.x, x);
  layout.add_slice(a.shift, params, dim, p.shift_offset, p.step);
  layout.add_slice(a.scale, params, dim, p.scale_offset, p.step);
  a.affine = true;
  return run_forward(a, layout, x, mask, event_dims);
}

// expects x, the parameters and their gradients in `layout`; adds the other views
Tensor run_backward(CouplingBackward& a, Layout& layout, const std::optional<Tensor>& gy,
                    const std::optional<Tensor>& gl, const Tensor& x, const std::optional<Tensor>& mask) {
  Tensor gx = new_like(x);
  layout.add(a.gx, gx);
  a.gx.stream = streams(gx);
  if (gy) layout.add(a.gy, *gy);
  if (gl) layout.add_rows(a.gl, *gl);
  if (mask) layout.add(a.mask, *mask);
  a.space = layout.merge();
  a.plan = plan_of(a.space, layout.flat());
  const auto kernel = cpu_table()->coupling_backward;
  if (x.numel() > 0) {
    torch::stable::parallel_for(0, a.plan.units, a.plan.grain,
                                [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  }
  return gx;
}

std::tuple<Tensor, Tensor, Tensor> affine_coupling_backward(std::optional<Tensor> gy, std::optional<Tensor> gl,
                                                            Tensor x, std::optional<Tensor> shift, Tensor scale,
                                                            std::optional<Tensor> mask, int64_t scale_map,
                                                            double map_arg, bool shift_first, bool inverse,
                                                            int64_t event_dims, std::optional<ScalarType> shift_dtype) {
  CouplingBackward a{};
  Layout layout(x, event_dims);
  set_map(a, {scale_map, map_arg, shift_first, inverse}, x);
  const int64_t none = 0;
  Tensor gshift =
      shift_dtype ? new_empty(x, x.sizes().data(), x.dim(), *shift_dtype) : new_empty(x, &none, 1, x.scalar_type());
  Tensor gscale = new_like(scale);
  layout.add(a.x, x);
  if (shift) layout.add(a.shift, *shift);
  layout.add(a.scale, scale);
  if (shift_dtype) layout.add(a.gshift, gshift);
  layout.add(a.gscale, gscale);
  a.gshift.stream = streams(gshift);
  a.gscale.stream = streams(gscale);
  Tensor gx = run_backward(a, layout, gy, gl, x, mask);
  return {gx, gshift, gscale};
}

std::tuple<Tensor, Tensor> affine_coupling_packed_backward(std::optional<Tensor> gy, std::optional<Tensor> gl, Tensor x,
                                                           Tensor params, std::optional<Tensor> mask, int64_t packing,
                                                           int64_t dim, int64_t scale_map, double map_arg,
                                                           bool shift_first, bool inverse, int64_t event_dims) {
  CouplingBackward a{};
  Layout layout(x, event_dims);
  const Packing p = packing_of(packing, x.size(dim));
  set_map(a, {scale_map, map_arg, shift_first, inverse}, x);
  Tensor gparams = new_like(params);
  layout.add(a.x, x);
  if (shift_first != inverse) layout.add_slice(a.shift, params, dim, p.shift_offset, p.step);
  layout.add_slice(a.scale, params, dim, p.scale_offset, p.step);
  layout.add_slice(a.gshift, gparams, dim, p.shift_offset, p.step);
  layout.add_slice(a.gscale, gparams, dim, p.scale_offset, p.step);
  a.gshift.stream = a.gscale.stream = streams(gparams);
  Tensor gx = run_backward(a, layout, gy, gl, x, mask);
  return {gx, gparams};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyflow, CPU, m) {
  m.impl("additive_coupling", TORCH_BOX(&additive_coupling));
  m.impl("affine_coupling", TORCH_BOX(&affine_coupling));
  m.impl("affine_coupling_packed", TORCH_BOX(&affine_coupling_packed));
  m.impl("affine_coupling_backward", TORCH_BOX(&affine_coupling_backward));
  m.impl("affine_coupling_packed_backward", TORCH_BOX(&affine_coupling_packed_backward));
}

}  // namespace pyflow
