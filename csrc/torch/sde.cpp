#include "../args/sde.h"

#include "random.h"

namespace pyflow {
namespace {

using Optional = std::optional<Tensor>;
using OptionalType = std::optional<ScalarType>;

// rows are samples, elements in C order: the order of the noise
Layout layout_of(const Tensor& x) { return Layout(x, x.dim() > 0 ? x.dim() - 1 : 0, true); }

void set_coefficients(SdeArgs& args, const Tensor& a, const Optional& b, const Tensor& c) {
  args.a = row_view(a);
  if (b) args.b = row_view(*b);
  args.c = row_view(c);
}

void set_noise(SdeArgs& a, Layout& layout, const Optional& seed, const Optional& step, const Optional& noise,
               int64_t purpose) {
  if (noise) {
    layout.add(a.noise, *noise);
  } else {
    STD_TORCH_CHECK(seed && step, "pyflow: neither noise nor a seed and a step");
    a.stream = random_stream(*seed, *step, Purpose(purpose));
  }
}

// a result, or an empty tensor if it is not requested (no dtype)
Tensor add_output(View& view, Layout& layout, const Tensor& like, const OptionalType& dtype) {
  if (!dtype) return new_none(like, like.scalar_type());
  Tensor out = *dtype == like.scalar_type() ? new_like(like) : new_empty(like, like.sizes().data(), like.dim(), *dtype);
  layout.add_output(view, out);
  return out;
}

std::tuple<Tensor, Tensor> sde_step(Tensor x, Optional score, Tensor a, Optional b, Tensor c, Optional seed,
                                    Optional step, Optional noise, int64_t purpose, bool return_mean) {
  SdeArgs args{};
  Layout layout = layout_of(x);
  args.f64 = is_f64(x);
  layout.add(args.x, x);
  if (score) layout.add(args.score, *score);
  set_noise(args, layout, seed, step, noise, purpose);
  set_coefficients(args, a, b, c);
  const ScalarType dtype = x.scalar_type();
  Tensor y = add_output(args.y, layout, x, dtype);
  Tensor mean = add_output(args.mean, layout, x, return_mean ? OptionalType(dtype) : std::nullopt);
  plan(args, layout);
  if (x.numel() > 0) PYFLOW_RUN(sde_step, args, x);
  return {y, mean};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sde_step_backward(Optional gy, Optional gmean, Optional x, Optional score,
                                                             Tensor a, Optional b, Tensor c, Optional seed,
                                                             Optional step, Optional noise, int64_t purpose,
                                                             OptionalType x_dtype, OptionalType score_dtype,
                                                             OptionalType noise_dtype, bool f64) {
  SdeArgs args{};
  const Tensor& lead = gy ? *gy : *gmean;
  Layout layout = layout_of(lead);
  args.f64 = f64;
  if (gy) layout.add(args.gy, *gy);
  if (gmean) layout.add(args.gmean, *gmean);
  set_coefficients(args, a, b, c);
  if (x) {
    layout.add(args.x, *x);
    if (score) layout.add(args.score, *score);
    set_noise(args, layout, seed, step, noise, purpose);
  }
  Tensor gx = add_output(args.gx, layout, lead, x_dtype);
  Tensor gscore = add_output(args.gscore, layout, lead, score_dtype);
  Tensor gnoise = add_output(args.gnoise, layout, lead, noise_dtype);
  plan(args, layout);
  std::optional<SumTensors> sums;
  if (x) sums.emplace(args.sums, lead, args.space, args.plan, compute_type(f64), 3);
  if (lead.numel() > 0) PYFLOW_RUN(sde_step_backward, args, lead);
  if (sums) sums->finish();
  return {gx, gscore, gnoise, sums ? sums->out : new_none(lead, compute_type(f64))};
}

// returns the losses, or with a.gx the gradients of std
Tensor run_loss(SdeArgs& a, Layout& layout, const Tensor& pred, const Optional& std, const Tensor& seed,
                const Tensor& step) {
  a.f64 = is_f64(pred);
  layout.add(a.x, pred);
  a.score_given = std.has_value();
  if (std) a.c = row_view(*std);
  a.stream = random_stream(seed, step, Purpose::noise);
  plan(a, layout);
  SumTensors sums(a.sums, pred, &a.space.rows, 1, a.space, a.plan, compute_type(a.f64));
  if (pred.numel() > 0) PYFLOW_RUN(denoising_loss, a, pred);
  sums.finish();
  return sums.out;
}

Tensor denoising_loss(Tensor pred, Optional std, Tensor seed, Tensor step) {
  SdeArgs a{};
  Layout layout = layout_of(pred);
  return run_loss(a, layout, pred, std, seed, step);
}

std::tuple<Tensor, Tensor> denoising_loss_backward(Tensor grad, Tensor pred, Optional std, Tensor seed, Tensor step) {
  SdeArgs a{};
  Layout layout = layout_of(pred);
  a.a = row_view(grad);
  Tensor gpred = add_output(a.gx, layout, pred, pred.scalar_type());
  Tensor gstd = run_loss(a, layout, pred, std, seed, step);
  return {gpred, gstd};
}

Tensor langevin_squares(Tensor score, Optional seed, Optional step, Optional noise, int64_t purpose) {
  SdeArgs a{};
  Layout layout = layout_of(score);
  a.f64 = is_f64(score);
  layout.add(a.score, score);
  set_noise(a, layout, seed, step, noise, purpose);
  plan(a, layout);
  SumTensors sums(a.sums, score, a.space, a.plan, compute_type(a.f64), 2);
  if (score.numel() > 0) PYFLOW_RUN(langevin_squares, a, score);
  sums.finish();
  return sums.out;
}

}  // namespace

PYFLOW_OPERATORS(m) {
  m.impl("sde_step", TORCH_BOX(&sde_step));
  m.impl("sde_step_backward", TORCH_BOX(&sde_step_backward));
  m.impl("denoising_loss", TORCH_BOX(&denoising_loss));
  m.impl("denoising_loss_backward", TORCH_BOX(&denoising_loss_backward));
  m.impl("langevin_squares", TORCH_BOX(&langevin_squares));
}

}  // namespace pyflow
