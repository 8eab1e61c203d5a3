#include "../cpu/sde.h"

#include "../cpu/dispatch.h"
#include "noise.h"

namespace pyflow {
namespace {

using Optional = std::optional<Tensor>;
using Kernel = void (*)(const SdeArgs&, int64_t, int64_t);

// 0-d, or one value per row
void set_coefficient(View& view, const Optional& t) {
  if (!t) return;
  view.data = (char*)t->data_ptr();
  view.dtype = dtype_of(*t);
  view.stride[0] = t->dim() > 0 ? t->stride(0) : 0;
}

// rows are samples, elements in C order: the order of the noise
Layout layout_of(const Tensor& x) { return Layout(x, x.dim() > 0 ? x.dim() - 1 : 0, true); }

void set_noise(SdeArgs& a, Layout& layout, const Optional& seed, const Optional& step, const Optional& noise,
               int64_t purpose) {
  if (noise) {
    layout.add(a.noise, *noise);
  } else {
    STD_TORCH_CHECK(seed && step, "pyflow: neither noise nor a seed and a step");
    a.stream = stream_of(*seed, *step, purpose);
  }
}

// a result, or an empty tensor if it is not requested (no dtype)
Tensor add_output(View& view, Layout& layout, const Tensor& like, const std::optional<ScalarType>& dtype) {
  const int64_t none = 0;
  if (!dtype) return new_empty(like, &none, 1, like.scalar_type());
  Tensor out = *dtype == like.scalar_type() ? new_like(like) : new_empty(like, like.sizes().data(), like.dim(), *dtype);
  layout.add(view, out);
  view.stream = streams(out);
  return out;
}

ScalarType sum_dtype(const SdeArgs& a) { return a.f64 ? ScalarType::Double : ScalarType::Float; }

// call after every view was added to the layout
void plan(SdeArgs& a, Layout& layout) {
  a.space = layout.merge();
  a.plan = plan_of(a.space, layout.flat());
}

void run(const SdeArgs& a, Kernel kernel) {
  if (a.space.rows * a.space.cols == 0) return;
  torch::stable::parallel_for(0, a.plan.units, a.plan.grain,
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

template <class T>
void add_segments(const SdeArgs& a, int count, T* out) {
  for (int which = 0; which < count; ++which) {
    for (int64_t r = 0; r < a.space.rows; ++r) {
      const double* sums = a.sums + r * a.plan.segments * kSums + which;
      double total = a.space.cols > 0 ? sums[0] : 0.0;
      for (int64_t i = 1; i < a.plan.segments; ++i) total += sums[i * kSums];
      out[which * a.space.rows + r] = T(total);
    }
  }
}

// runs a kernel that sums; returns (count, rows) of the compute type
Tensor run_sums(SdeArgs& a, Kernel kernel, const Tensor& like, int count) {
  const int64_t partials = a.space.rows * a.plan.segments * kSums, sizes[] = {count, a.space.rows};
  Tensor partial = new_empty(like, &partials, 1, ScalarType::Double);
  a.sums = (double*)partial.data_ptr();
  run(a, kernel);
  Tensor out = new_empty(like, sizes, 2, sum_dtype(a));
  a.f64 ? add_segments(a, count, (double*)out.data_ptr()) : add_segments(a, count, (float*)out.data_ptr());
  return out;
}

std::tuple<Tensor, Tensor> sde_step(Tensor x, Optional score, Tensor a, Optional b, Tensor c, Optional seed,
                                    Optional step, Optional noise, int64_t purpose, bool return_mean) {
  SdeArgs args{};
  Layout layout = layout_of(x);
  args.f64 = x.scalar_type() == ScalarType::Double;
  layout.add(args.x, x);
  if (score) layout.add(args.score, *score);
  set_noise(args, layout, seed, step, noise, purpose);
  set_coefficient(args.a, a);
  set_coefficient(args.b, b);
  set_coefficient(args.c, c);
  const ScalarType dtype = x.scalar_type();
  Tensor y = add_output(args.y, layout, x, dtype);
  Tensor mean = add_output(args.mean, layout, x, return_mean ? std::optional<ScalarType>(dtype) : std::nullopt);
  plan(args, layout);
  run(args, cpu_table()->sde_step);
  return {y, mean};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sde_step_backward(Optional gy, Optional gmean, Optional x, Optional score,
                                                             Tensor a, Optional b, Tensor c, Optional seed,
                                                             Optional step, Optional noise, int64_t purpose,
                                                             std::optional<ScalarType> x_dtype,
                                                             std::optional<ScalarType> score_dtype,
                                                             std::optional<ScalarType> noise_dtype, bool f64) {
  SdeArgs args{};
  const Tensor& lead = gy ? *gy : *gmean;
  Layout layout = layout_of(lead);
  args.f64 = f64;
  if (gy) layout.add(args.gy, *gy);
  if (gmean) layout.add(args.gmean, *gmean);
  set_coefficient(args.a, a);
  set_coefficient(args.b, b);
  set_coefficient(args.c, c);
  if (x) {
    layout.add(args.x, *x);
    if (score) layout.add(args.score, *score);
    set_noise(args, layout, seed, step, noise, purpose);
  }
  Tensor gx = add_output(args.gx, layout, lead, x_dtype);
  Tensor gscore = add_output(args.gscore, layout, lead, score_dtype);
  Tensor gnoise = add_output(args.gnoise, layout, lead, noise_dtype);
  plan(args, layout);
  const Kernel kernel = cpu_table()->sde_step_backward;
  if (x) return {gx, gscore, gnoise, run_sums(args, kernel, lead, 3)};
  run(args, kernel);
  const int64_t none = 0;
  return {gx, gscore, gnoise, new_empty(lead, &none, 1, sum_dtype(args))};
}

// returns (1, rows)
Tensor run_loss(SdeArgs& a, Layout& layout, const Tensor& pred, const Optional& std, const Tensor& seed,
                const Tensor& step) {
  a.f64 = pred.scalar_type() == ScalarType::Double;
  layout.add(a.x, pred);
  set_coefficient(a.c, std);
  a.stream = stream_of(seed, step, 0);
  plan(a, layout);
  return run_sums(a, cpu_table()->denoising_loss, pred, 1);
}

Tensor denoising_loss(Tensor pred, Optional std, Tensor seed, Tensor step) {
  SdeArgs a{};
  Layout layout = layout_of(pred);
  return torch::stable::select(run_loss(a, layout, pred, std, seed, step), 0, 0);
}

std::tuple<Tensor, Tensor> denoising_loss_backward(Tensor grad, Tensor pred, Optional std, Tensor seed, Tensor step) {
  SdeArgs a{};
  Layout layout = layout_of(pred);
  set_coefficient(a.a, grad);
  Tensor gpred = add_output(a.gx, layout, pred, pred.scalar_type());
  const Tensor sums = run_loss(a, layout, pred, std, seed, step);
  return {gpred, torch::stable::select(sums, 0, 0)};
}

Tensor langevin_squares(Tensor score, Optional seed, Optional step, Optional noise, int64_t purpose) {
  SdeArgs a{};
  Layout layout = layout_of(score);
  a.f64 = score.scalar_type() == ScalarType::Double;
  layout.add(a.score, score);
  set_noise(a, layout, seed, step, noise, purpose);
  plan(a, layout);
  return run_sums(a, cpu_table()->langevin_squares, score, 2);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyflow, CPU, m) {
  m.impl("sde_step", TORCH_BOX(&sde_step));
  m.impl("sde_step_backward", TORCH_BOX(&sde_step_backward));
  m.impl("denoising_loss", TORCH_BOX(&denoising_loss));
  m.impl("denoising_loss_backward", TORCH_BOX(&denoising_loss_backward));
  m.impl("langevin_squares", TORCH_BOX(&langevin_squares));
}

}  // namespace pyflow
