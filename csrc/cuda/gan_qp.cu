// GAN-QP critic on an NVIDIA GPU: sums of deviations of each sample, then one thread per sample.
#include "../ops/gan_qp.h"
#include "tile.h"

namespace pyflow::cuda {
namespace {

using Optional = std::optional<Tensor>;

struct SumArgs {
  Space space;
  Cut cut;
  View real, fake;
  void* out;  // (rows, segments) of the compute type
};

struct Sums {
  const void* data;  // (rows,) of the compute type; null: no latents
  int64_t count;     // elements summed per row
};

struct Args {
  int64_t rows;
  Distance distance;
  Sums x, z;            // forward
  View t_real, t_fake;  // one value per row, stride[0] apart
  double lam2, eps;     // lam2: 2 lam
  void* loss;           // forward
  View grad, d;         // grad: backward; d: written forward, read backward
  View g_real, g_fake;  // backward
};

template <Distance D, int N, class T>
__global__ void __launch_bounds__(kThreads, 2) sums(const __grid_constant__ SumArgs a) {
  const int64_t row_block = blockIdx.x / a.cut.segments, segment = blockIdx.x % a.cut.segments;
  Group<T, kEach> acc{};
  for (int64_t c = 0; c < a.cut.segment; c += a.cut.cols) {
#pragma unroll 1
    for (int at = 0; at < kEach; at += N) {
      const Spot p = spot(a.space, a.cut, row_block, segment * a.cut.segment + c, at);
      const auto real = load<N, T>(a.space, a.real, p), fake = load<N, T>(a.space, a.fake, p);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const T term = p.inside ? deviation<D>(real.v[i], fake.v[i]) : T(0);
#pragma unroll
        for (int lane = i; lane < kEach; lane += N) acc.v[lane] += lane == at + i ? term : T(0);
      }
    }
  }
  const T sum = fold(acc, int(a.cut.cols));
  const int width = int(a.cut.cols) / kEach;
  const int64_t row = row_block * a.cut.rows + threadIdx.x / width;
  if (threadIdx.x % width == 0 && row < a.space.rows) ((T*)a.out)[row * a.cut.segments + segment] = sum;
}

template <class T>
__device__ T row_distance(const Sums& s, Distance distance, int64_t row) {
  return mean_distance(distance, ((const T*)s.data)[row], s.count);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) loss_kernel(const __grid_constant__ Args a) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= a.rows) return;
  T d = row_distance<T>(a.x, a.distance, row);
  if (a.z.data) d += row_distance<T>(a.z, a.distance, row);
  const T delta = read<T>(a.t_real, row * a.t_real.stride[0]) - read<T>(a.t_fake, row * a.t_fake.stride[0]);
  ((T*)a.loss)[row] = quadratic_loss(delta, width_of(d, T(a.lam2), T(a.eps)));
  write(a.d, row, d);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(const __grid_constant__ Args a) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= a.rows) return;
  const T d = read<T>(a.d, row * a.d.stride[0]);
  const T delta = read<T>(a.t_real, row * a.t_real.stride[0]) - read<T>(a.t_fake, row * a.t_fake.stride[0]);
  const T slope = quadratic_slope(delta, width_of(d, T(a.lam2), T(a.eps)));
  const T grad = read<T>(a.grad, row * a.grad.stride[0]) * slope;
  write(a.g_real, row * a.g_real.stride[0], grad);
  write(a.g_fake, row * a.g_fake.stride[0], -grad);
}

bool is_f64(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }
bool is_f64(const Optional& t) { return t && is_f64(*t); }

View rows_of(const Tensor& t) {
  View view;
  view.data = (char*)t.data_ptr();
  view.dtype = dtype_of(t);
  view.stride[0] = t.stride(0);
  return view;
}

template <Distance D>
void launch_sums(const SumArgs& a, const Tensor& on, bool f64) {
  if (f64) return launch(sums<D, 1, double>, a.cut.blocks, on, a);
  const bool vectors = whole_vectors(a.space, a.real) && whole_vectors(a.space, a.fake);
  launch(vectors ? sums<D, kEach, float> : sums<D, 1, float>, a.cut.blocks, on, a);
}

// returns the sums of deviations of every sample, (rows,); the tensor owns s.data
Tensor sum(Sums& s, const Tensor& real, const Tensor& fake, Distance distance, ScalarType dtype) {
  SumArgs a{};
  Layout layout(real, real.dim() - 1);
  layout.add(a.real, real);
  layout.add(a.fake, fake);
  a.space = layout.merge();
  a.cut = cut(a.space);
  const int64_t rows = a.space.rows, count = rows * a.cut.segments;
  Tensor partial = new_empty(real, &count, 1, dtype);
  a.out = partial.data_ptr();
  const bool f64 = dtype == ScalarType::Double;
  distance == Distance::l1 ? launch_sums<Distance::l1>(a, real, f64) : launch_sums<Distance::l2>(a, real, f64);
  Tensor out = partial;
  if (a.cut.segments > 1) {
    out = new_empty(real, &rows, 1, dtype);
    (f64 ? launch_sum_segments<double> : launch_sum_segments<float>)(partial, out, rows, a.cut.segments);
  }
  s = {out.data_ptr(), a.space.cols};
  return out;
}

std::tuple<Tensor, Tensor> gan_qp_loss(Tensor t_real, Tensor t_fake, Tensor x_real, Tensor x_fake, Optional z_real,
                                       Optional z_fake, double lam, double eps, int64_t distance) {
  const bool f64 =
      is_f64(t_real) || is_f64(t_fake) || is_f64(x_real) || is_f64(x_fake) || is_f64(z_real) || is_f64(z_fake);
  const ScalarType dtype = f64 ? ScalarType::Double : ScalarType::Float;
  Args a{};
  a.rows = x_real.size(0);
  a.distance = Distance(distance);
  a.lam2 = 2 * lam;
  a.eps = eps;
  Tensor loss = new_empty(x_real, &a.rows, 1, dtype), d = new_empty(x_real, &a.rows, 1, dtype);
  if (a.rows == 0) return {loss, d};
  const Tensor of_x = sum(a.x, x_real, x_fake, a.distance, dtype);
  Optional of_z;
  if (z_real && z_fake) of_z = sum(a.z, *z_real, *z_fake, a.distance, dtype);
  a.t_real = rows_of(t_real);
  a.t_fake = rows_of(t_fake);
  a.loss = loss.data_ptr();
  a.d = rows_of(d);
  launch(f64 ? loss_kernel<double> : loss_kernel<float>, ceil_div(a.rows, kThreads), loss, a);
  return {loss, d};
}

std::tuple<Tensor, Tensor> gan_qp_loss_backward(Tensor grad, Tensor t_real, Tensor t_fake, Tensor d, double lam,
                                                double eps) {
  Tensor g_real = new_like(t_real), g_fake = new_like(t_fake);
  Args a{};
  a.rows = t_real.size(0);
  a.t_real = rows_of(t_real);
  a.t_fake = rows_of(t_fake);
  a.lam2 = 2 * lam;
  a.eps = eps;
  a.grad = rows_of(grad);
  a.d = rows_of(d);
  a.g_real = rows_of(g_real);
  a.g_fake = rows_of(g_fake);
  const auto kernel = is_f64(d) ? backward_kernel<double> : backward_kernel<float>;
  if (a.rows > 0) launch(kernel, ceil_div(a.rows, kThreads), d, a);
  return {g_real, g_fake};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyflow_cuda, CUDA, m) {
  m.impl("gan_qp_loss", TORCH_BOX(&gan_qp_loss));
  m.impl("gan_qp_loss_backward", TORCH_BOX(&gan_qp_loss_backward));
}

}  // namespace pyflow::cuda
