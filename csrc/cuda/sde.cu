// SDE steps on an NVIDIA GPU: each thread handles four neighbours, whose noise takes one Philox block, or two.
#include "../ops/sde.h"
#include "random.h"

namespace pyflow::cuda {
namespace {

using Optional = std::optional<Tensor>;

// a caller's number arrives as a 0-d CPU tensor and is passed by value
struct Coefficient {
  View view;  // one value per row, stride[0] apart; without data: `value`
  double value;
};

struct Args {
  Space space;
  Cut cut;
  Stream stream;
  View x, score, noise;     // loss: x is the prediction; absent noise is drawn from the stream
  Coefficient a, b, c;      // loss: c is std, and a is the gradient of the loss
  View y, mean;             // forward
  View gy, gmean;           // backward, either may be absent
  View gx, gscore, gnoise;  // absent if not requested
  bool score_given;         // loss: pred is a score, and std is used
  void* sums;               // (count, rows, segments) of the compute type, or null
};

template <class T>
__device__ T value_of(const Coefficient& c, int64_t row) {
  return c.view.data ? read<T>(c.view, row * c.view.stride[0]) : T(c.value);
}

// loads four neighbours of a row, as one vector if N == kEach, else one by one
template <int N, class T>
__device__ Group<T, kEach> load_group(const Args& a, const View& v, const Spot& p) {
  Group<T, kEach> out{};
  if constexpr (N == kEach) {
    return load<kEach, T>(a.space, v, p);
  } else {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      out.v[i] = load<1, T>(a.space, v, {p.row, p.col + i, p.inside && p.col + i < a.space.cols}).v[0];
    }
    return out;
  }
}

template <int N, class T>
__device__ void store_group(const Args& a, const View& v, const Spot& p, const Group<T, kEach>& values) {
  if constexpr (N == kEach) {
    store(a.space, v, p, values);
  } else {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const Spot q{p.row, p.col + i, p.inside && p.col + i < a.space.cols};
      store(a.space, v, q, Group<T, 1>{{values.v[i]}});
    }
  }
}

template <int N, class T>
__device__ Group<T, kEach> noise_group(const Args& a, const Spot& p) {
  if (a.noise.data) return load_group<N, T>(a, a.noise, p);
  const Four z = draw<NoiseKind::normal>(a.stream, a.space, p.row, p.col);
  return {{T(z.v[0]), T(z.v[1]), T(z.v[2]), T(z.v[3])}};
}

// calls f(spot) for each group of four columns of this thread; spot is the first
template <class F>
__device__ void for_each_four(const Args& a, F f) {
  const int64_t first = blockIdx.x % a.cut.segments * a.cut.segment;
  for (int64_t c = 0; c < a.cut.segment; c += a.cut.cols) {
    f(spot(a.space, a.cut, blockIdx.x / a.cut.segments, first + c, 0));
  }
}

// columns outside the row add 0
template <class T>
__device__ void add_products(const Args& a, const Spot& p, const Group<T, kEach>& u, const Group<T, kEach>& v,
                             Group<T, kEach>& acc) {
#pragma unroll
  for (int i = 0; i < kEach; ++i) acc.v[i] += p.inside && p.col + i < a.space.cols ? u.v[i] * v.v[i] : T(0);
}

// stores a row's sum over the block's segment
template <class T>
__device__ void put(const Args& a, int which, const Group<T, kEach>& acc) {
  const T sum = fold(acc, int(a.cut.cols));
  __syncthreads();  // the next fold reuses the shared memory
  const int width = int(a.cut.cols) / kEach;
  const int64_t row = blockIdx.x / a.cut.segments * a.cut.rows + threadIdx.x / width;
  if (threadIdx.x % width == 0 && row < a.space.rows) {
    ((T*)a.sums)[(which * a.space.rows + row) * a.cut.segments + blockIdx.x % a.cut.segments] = sum;
  }
}

template <int N, class T>
__global__ void __launch_bounds__(kThreads, 2) step_kernel(const __grid_constant__ Args a) {
  for_each_four(a, [&](const Spot& p) {
    if (!p.inside) return;
    const T of_x = value_of<T>(a.a, p.row), of_z = value_of<T>(a.c, p.row);
    const auto x = load_group<N, T>(a, a.x, p);
    Group<T, kEach> mean, y;
    if (a.score.data) {
      const T of_score = value_of<T>(a.b, p.row);
      const auto score = load_group<N, T>(a, a.score, p);
#pragma unroll
      for (int i = 0; i < kEach; ++i) mean.v[i] = drift(x.v[i], score.v[i], of_x, of_score);
    } else {
#pragma unroll
      for (int i = 0; i < kEach; ++i) mean.v[i] = of_x * x.v[i];
    }
    const auto z = noise_group<N, T>(a, p);
#pragma unroll
    for (int i = 0; i < kEach; ++i) y.v[i] = diffuse(mean.v[i], of_z, z.v[i]);
    if (a.mean.data) store_group<N>(a, a.mean, p, mean);
    store_group<N>(a, a.y, p, y);
  });
}

template <class T>
__device__ Group<T, kEach> scaled(const Group<T, kEach>& v, T by) {
  return {{by * v.v[0], by * v.v[1], by * v.v[2], by * v.v[3]}};
}

template <int N, class T>
__global__ void __launch_bounds__(kThreads, 2) step_backward_kernel(const __grid_constant__ Args a) {
  Group<T, kEach> of_a{}, of_b{}, of_c{};
  for_each_four(a, [&](const Spot& p) {
    if (!p.inside) return;
    Group<T, kEach> gy{}, total{};
    if (a.gy.data) total = gy = load_group<N, T>(a, a.gy, p);
    if (a.gmean.data) {
      const auto gmean = load_group<N, T>(a, a.gmean, p);
#pragma unroll
      for (int i = 0; i < kEach; ++i) total.v[i] += gmean.v[i];
    }
    if (a.gx.data) store_group<N>(a, a.gx, p, scaled(total, value_of<T>(a.a, p.row)));
    if (a.gscore.data) store_group<N>(a, a.gscore, p, scaled(total, value_of<T>(a.b, p.row)));
    if (a.gnoise.data) store_group<N>(a, a.gnoise, p, scaled(gy, value_of<T>(a.c, p.row)));
    if (!a.sums) return;
    add_products(a, p, total, load_group<N, T>(a, a.x, p), of_a);
    if (a.score.data) add_products(a, p, total, load_group<N, T>(a, a.score, p), of_b);
    if (a.gy.data) add_products(a, p, gy, noise_group<N, T>(a, p), of_c);
  });
  if (!a.sums) return;
  put(a, 0, of_a);
  put(a, 1, of_b);
  put(a, 2, of_c);
}

// loss; with gx its backward, where the sums are the gradient of std
template <int N, class T>
__global__ void __launch_bounds__(kThreads, 2) loss_kernel(const __grid_constant__ Args a) {
  Group<T, kEach> acc{};
  for_each_four(a, [&](const Spot& p) {
    if (!p.inside) return;
    const auto pred = load_group<N, T>(a, a.x, p);
    const Four z = draw<NoiseKind::normal>(a.stream, a.space, p.row, p.col);
    const T std = a.score_given ? value_of<T>(a.c, p.row) : T(1);
    Group<T, kEach> r;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      r.v[i] = a.score_given ? residual<true>(pred.v[i], std, T(z.v[i])) : residual<false>(pred.v[i], std, T(z.v[i]));
    }
    if (!a.gx.data) return add_products(a, p, scaled(r, T(0.5)), r, acc);
    const T grad = value_of<T>(a.a, p.row);
    store_group<N>(a, a.gx, p, scaled(r, grad * std));
    add_products(a, p, scaled(pred, grad), r, acc);
  });
  put(a, 0, acc);
}

template <int N, class T>
__global__ void __launch_bounds__(kThreads, 2) squares_kernel(const __grid_constant__ Args a) {
  Group<T, kEach> of_score{}, of_noise{};
  for_each_four(a, [&](const Spot& p) {
    if (!p.inside) return;
    const auto score = load_group<N, T>(a, a.score, p);
    const auto z = noise_group<N, T>(a, p);
    add_products(a, p, score, score, of_score);
    add_products(a, p, z, z, of_noise);
  });
  put(a, 0, of_score);
  put(a, 1, of_noise);
}

bool vectors(const Args& a) {
  for (const View* v : {&a.x, &a.score, &a.noise, &a.y, &a.mean, &a.gy, &a.gmean, &a.gx, &a.gscore, &a.gnoise}) {
    if (!whole_vectors(a.space, *v)) return false;
  }
  return true;
}

#define PYFLOW_LAUNCH(kernel, f64, a, on) \
  launch(f64 ? kernel<1, double> : vectors(a) ? kernel<kEach, float> : kernel<1, float>, a.cut.blocks, on, a)

void set_coefficient(Coefficient& c, const Optional& t) {
  if (!t) return;
  if (t->dim() == 0 && t->device().type() == torch::headeronly::DeviceType::CPU) {
    // a caller's number arrives as float64; no other 0-d CPU tensor reaches a GPU call
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Double, "pyflow: a number must come as float64");
    c.value = *(const double*)t->data_ptr();
    return;
  }
  c.view.data = (char*)t->data_ptr();
  c.view.dtype = dtype_of(*t);
  c.view.stride[0] = t->dim() > 0 ? t->stride(0) : 0;
}

// rows are samples, elements in C order: the order of the noise
Layout layout_of(const Tensor& x) { return Layout(x, x.dim() > 0 ? x.dim() - 1 : 0, true); }

void set_noise(Args& a, Layout& layout, const Optional& seed, const Optional& step, const Optional& noise,
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
  return out;
}

// call after every view was added to the layout; false if there are no elements
bool plan(Args& a, Layout& layout) {
  a.space = layout.merge();
  if (a.space.rows * a.space.cols == 0) return false;
  a.cut = cut(a.space);
  return true;
}

// calls run, which launches a kernel that sums; returns (count, rows)
template <class F>
Tensor run_sums(Args& a, bool any, const Tensor& like, bool f64, int count, F run) {
  const ScalarType dtype = f64 ? ScalarType::Double : ScalarType::Float;
  const int64_t sizes[] = {count, a.space.rows}, rows = count * a.space.rows;
  Tensor out = new_empty(like, sizes, 2, dtype);
  if (!any) return torch::stable::zero_(out);
  const int64_t partials = rows * a.cut.segments;
  Tensor partial = a.cut.segments > 1 ? new_empty(like, &partials, 1, dtype) : out;
  a.sums = partial.data_ptr();
  run();
  if (a.cut.segments > 1) {
    (f64 ? launch_sum_segments<double> : launch_sum_segments<float>)(partial, out, rows, a.cut.segments);
  }
  return out;
}

std::tuple<Tensor, Tensor> sde_step(Tensor x, Optional score, Tensor a, Optional b, Tensor c, Optional seed,
                                    Optional step, Optional noise, int64_t purpose, bool return_mean) {
  Args args{};
  Layout layout = layout_of(x);
  layout.add(args.x, x);
  if (score) layout.add(args.score, *score);
  set_noise(args, layout, seed, step, noise, purpose);
  set_coefficient(args.a, a);
  set_coefficient(args.b, b);
  set_coefficient(args.c, c);
  const ScalarType dtype = x.scalar_type();
  Tensor y = add_output(args.y, layout, x, dtype);
  Tensor mean = add_output(args.mean, layout, x, return_mean ? std::optional<ScalarType>(dtype) : std::nullopt);
  if (plan(args, layout)) PYFLOW_LAUNCH(step_kernel, dtype == ScalarType::Double, args, x);
  return {y, mean};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sde_step_backward(Optional gy, Optional gmean, Optional x, Optional score,
                                                             Tensor a, Optional b, Tensor c, Optional seed,
                                                             Optional step, Optional noise, int64_t purpose,
                                                             std::optional<ScalarType> x_dtype,
                                                             std::optional<ScalarType> score_dtype,
                                                             std::optional<ScalarType> noise_dtype, bool f64) {
  Args args{};
  const Tensor& lead = gy ? *gy : *gmean;
  Layout layout = layout_of(lead);
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
  const bool any = plan(args, layout);
  const auto run = [&] { PYFLOW_LAUNCH(step_backward_kernel, f64, args, lead); };
  if (x) return {gx, gscore, gnoise, run_sums(args, any, lead, f64, 3, run)};
  if (any) run();
  const int64_t none = 0;
  return {gx, gscore, gnoise, new_empty(lead, &none, 1, f64 ? ScalarType::Double : ScalarType::Float)};
}

// returns (1, rows)
Tensor run_loss(Args& a, Layout& layout, const Tensor& pred, const Optional& std, const Tensor& seed,
                const Tensor& step) {
  const bool f64 = pred.scalar_type() == ScalarType::Double;
  layout.add(a.x, pred);
  a.score_given = std.has_value();
  set_coefficient(a.c, std);
  a.stream = stream_of(seed, step, 0);
  const bool any = plan(a, layout);
  return run_sums(a, any, pred, f64, 1, [&] { PYFLOW_LAUNCH(loss_kernel, f64, a, pred); });
}

Tensor denoising_loss(Tensor pred, Optional std, Tensor seed, Tensor step) {
  Args a{};
  Layout layout = layout_of(pred);
  return torch::stable::select(run_loss(a, layout, pred, std, seed, step), 0, 0);
}

std::tuple<Tensor, Tensor> denoising_loss_backward(Tensor grad, Tensor pred, Optional std, Tensor seed, Tensor step) {
  Args a{};
  Layout layout = layout_of(pred);
  set_coefficient(a.a, grad);
  Tensor gpred = add_output(a.gx, layout, pred, pred.scalar_type());
  const Tensor sums = run_loss(a, layout, pred, std, seed, step);
  return {gpred, torch::stable::select(sums, 0, 0)};
}

Tensor langevin_squares(Tensor score, Optional seed, Optional step, Optional noise, int64_t purpose) {
  Args a{};
  Layout layout = layout_of(score);
  const bool f64 = score.scalar_type() == ScalarType::Double;
  layout.add(a.score, score);
  set_noise(a, layout, seed, step, noise, purpose);
  const bool any = plan(a, layout);
  return run_sums(a, any, score, f64, 2, [&] { PYFLOW_LAUNCH(squares_kernel, f64, a, score); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyflow_cuda, CUDA, m) {
  m.impl("sde_step", TORCH_BOX(&sde_step));
  m.impl("sde_step_backward", TORCH_BOX(&sde_step_backward));
  m.impl("denoising_loss", TORCH_BOX(&denoising_loss));
  m.impl("denoising_loss_backward", TORCH_BOX(&denoising_loss_backward));
  m.impl("langevin_squares", TORCH_BOX(&langevin_squares));
}

}  // namespace pyflow::cuda
