// The accept step of a Metropolis-adjusted Langevin chain and squared norms on an NVIDIA GPU.
#include "../ops/energy.h"
#include "random.h"

namespace pyflow::cuda {
namespace {

constexpr int64_t kAccept = 3;  // noise purpose of the accept uniforms

struct Args {
  Space space;
  Cut cut;
  Stream stream;  // one accept uniform per row
  View z, z_new, grad, grad_new;
  View alpha, u, u_new, u_out;  // one value per row, stride[0] apart; alpha without data: `size`
  double size;
  View z_out, grad_out;
  uint8_t* accepted;  // (rows)
  void* partial;      // (rows, segments) of the compute type, written by the summing kernels
  const void* total;  // (rows); null: a row is one segment, and accept_kernel sums it
};

__device__ int64_t row_of(const Args& a) {
  return blockIdx.x / a.cut.segments * a.cut.rows + threadIdx.x / (int(a.cut.cols) / kEach);
}

// calls f(spot, i) for each group of N columns of this thread; i: index of the first among its kEach columns
template <int N, class F>
__device__ void for_each_spot(const Args& a, F f) {
  const int64_t row_block = blockIdx.x / a.cut.segments, first = blockIdx.x % a.cut.segments * a.cut.segment;
  for (int64_t c = 0; c < a.cut.segment; c += a.cut.cols) {
#pragma unroll 1
    for (int at = 0; at < kEach; at += N) f(spot(a.space, a.cut, row_block, first + c, at), at);
  }
}

// columns outside the row add 0
template <int N, class T>
__device__ void add_terms(const Spot& p, int at, const Group<T, N>& terms, Group<T, kEach>& acc) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const T term = p.inside ? terms.v[i] : T(0);
#pragma unroll
    for (int lane = i; lane < kEach; lane += N) acc.v[lane] += lane == at + i ? term : T(0);
  }
}

// log-ratio terms summed over the block's segment; every thread of the row gets the sum
template <int N, class T>
__device__ T transition_sum(const Args& a) {
  const int64_t row = row_of(a);
  T alpha = T(a.size);
  if (a.alpha.data && row < a.space.rows) alpha = read<T>(a.alpha, row * a.alpha.stride[0]);
  Group<T, kEach> acc{};
  for_each_spot<N>(a, [&](const Spot& p, int at) {
    const auto z = load<N, T>(a.space, a.z, p);
    const auto z_new = load<N, T>(a.space, a.z_new, p);
    const auto grad = load<N, T>(a.space, a.grad, p);
    const auto grad_new = load<N, T>(a.space, a.grad_new, p);
    Group<T, N> terms;
#pragma unroll
    for (int i = 0; i < N; ++i) terms.v[i] = transition(z.v[i], z_new.v[i], grad.v[i], grad_new.v[i], alpha);
    add_terms(p, at, terms, acc);
  });
  return fold(acc, int(a.cut.cols));
}

// stores a row's sum over the block's segment
template <class T>
__device__ void put(const Args& a, T sum) {
  const int64_t row = row_of(a);
  if (threadIdx.x % (int(a.cut.cols) / kEach) != 0 || row >= a.space.rows) return;
  ((T*)a.partial)[row * a.cut.segments + blockIdx.x % a.cut.segments] = sum;
}

template <int N, class T>
__global__ void __launch_bounds__(kThreads, 2) sums_kernel(const __grid_constant__ Args a) {
  put(a, transition_sum<N, T>(a));
}

template <int N, class T>
__global__ void __launch_bounds__(kThreads, 2) squares_kernel(const __grid_constant__ Args a) {
  Group<T, kEach> acc{};
  for_each_spot<N>(a, [&](const Spot& p, int at) {
    auto x = load<N, T>(a.space, a.z, p);
#pragma unroll
    for (int i = 0; i < N; ++i) x.v[i] *= x.v[i];
    add_terms(p, at, x, acc);
  });
  put(a, fold(acc, int(a.cut.cols)));
}

// element `row` of the shared stream, or element 0 of the row's own stream
__device__ float uniform_of(const Stream& s, int64_t row) {
  const uint64_t k = s.per_row ? 0 : uint64_t(row);
  const Words w = words_of(s, row, k / 4);
  const unsigned which = unsigned(k % 4);
  return uniform(which == 0 ? w.v[0] : which == 1 ? w.v[1] : which == 2 ? w.v[2] : w.v[3]);
}

template <int N, class T>
__global__ void __launch_bounds__(kThreads, 2) accept_kernel(const __grid_constant__ Args a) {
  T ratio = a.total ? T(0) : transition_sum<N, T>(a);
  const int64_t row = row_of(a);
  if (row >= a.space.rows) return;
  if (a.total) ratio = ((const T*)a.total)[row];
  const T u = read<T>(a.u, row * a.u.stride[0]), u_new = read<T>(a.u_new, row * a.u_new.stride[0]);
  const bool accepted = accepts(u, u_new, ratio, uniform_of(a.stream, row));
  if (blockIdx.x % a.cut.segments == 0 && threadIdx.x % (int(a.cut.cols) / kEach) == 0) {
    a.accepted[row] = accepted;
    write(a.u_out, row * a.u_out.stride[0], accepted ? u_new : u);
  }
  const View &z = accepted ? a.z_new : a.z, &grad = accepted ? a.grad_new : a.grad;
  for_each_spot<N>(a, [&](const Spot& p, int) {
    store(a.space, a.z_out, p, load<N, T>(a.space, z, p));
    store(a.space, a.grad_out, p, load<N, T>(a.space, grad, p));
  });
}

bool vectors(const Args& a) {
  for (const View* v : {&a.z, &a.z_new, &a.grad, &a.grad_new, &a.z_out, &a.grad_out}) {
    if (!whole_vectors(a.space, *v)) return false;
  }
  return true;
}

#define PYFLOW_LAUNCH(kernel, f64, a, on) \
  launch(f64 ? kernel<1, double> : vectors(a) ? kernel<kEach, float> : kernel<1, float>, a.cut.blocks, on, a)

void set_rows(View& view, const Tensor& t) {
  view.data = (char*)t.data_ptr();
  view.dtype = dtype_of(t);
  view.stride[0] = t.dim() > 0 ? t.stride(0) : 0;
}

// a caller's number arrives as a 0-d CPU tensor and is passed by value
void set_alpha(Args& a, const Tensor& t) {
  if (t.dim() > 0 || t.device().type() != torch::headeronly::DeviceType::CPU) return set_rows(a.alpha, t);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double, "pyflow: a number must come as float64");
  a.size = *(const double*)t.data_ptr();
}

void sum_segments_of(const Tensor& partial, const Tensor& out, const Args& a, bool f64) {
  (f64 ? launch_sum_segments<double> : launch_sum_segments<float>)(partial, out, a.space.rows, a.cut.segments);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mala_accept(Tensor z, Tensor z_new, Tensor u, Tensor u_new, Tensor grad,
                                                       Tensor grad_new, Tensor alpha, Tensor seed, Tensor step) {
  Args a{};
  Layout layout(z, z.dim() - 1);
  const int64_t rows = z.size(0);
  Tensor z_out = new_like(z), u_out = new_like(u), grad_out = new_like(grad);
  Tensor accepted = new_empty(z, &rows, 1, ScalarType::Bool);
  if (rows == 0) return {z_out, u_out, grad_out, accepted};
  bool f64 = false;
  for (const Tensor* t : {&z, &z_new, &u, &u_new, &grad, &grad_new}) {
    f64 = f64 || t->scalar_type() == ScalarType::Double;
  }
  layout.add(a.z, z);
  layout.add(a.z_new, z_new);
  layout.add(a.grad, grad);
  layout.add(a.grad_new, grad_new);
  layout.add(a.z_out, z_out);
  layout.add(a.grad_out, grad_out);
  set_alpha(a, alpha);
  set_rows(a.u, u);
  set_rows(a.u_new, u_new);
  set_rows(a.u_out, u_out);
  a.accepted = (uint8_t*)accepted.data_ptr();
  a.stream = stream_of(seed, step, kAccept);
  a.space = layout.merge();
  // samples without elements: only the energies decide; one column makes the grid non-empty
  Space counted = a.space;
  counted.cols = std::max<int64_t>(counted.cols, 1);
  a.cut = cut(counted);
  const ScalarType dtype = f64 ? ScalarType::Double : ScalarType::Float;
  const int64_t partials = a.cut.segments > 1 ? rows * a.cut.segments : 0, totals = a.cut.segments > 1 ? rows : 0;
  Tensor partial = new_empty(z, &partials, 1, dtype), total = new_empty(z, &totals, 1, dtype);
  if (a.cut.segments > 1) {
    a.partial = partial.data_ptr();
    PYFLOW_LAUNCH(sums_kernel, f64, a, z);
    sum_segments_of(partial, total, a, f64);
    a.total = total.data_ptr();
  }
  PYFLOW_LAUNCH(accept_kernel, f64, a, z);
  return {z_out, u_out, grad_out, accepted};
}

Tensor grad_norm_penalty(Tensor grad) {
  Args a{};
  Layout layout(grad, grad.dim() - 1);
  layout.add(a.z, grad);
  a.space = layout.merge();
  const int64_t rows = a.space.rows;
  Tensor out = new_empty(grad, &rows, 1, sum_dtype(grad));
  if (grad.numel() == 0) return torch::stable::zero_(out);
  a.cut = cut(a.space);
  const int64_t count = rows * a.cut.segments;
  const bool f64 = grad.scalar_type() == ScalarType::Double;
  Tensor partial = a.cut.segments > 1 ? new_empty(grad, &count, 1, sum_dtype(grad)) : out;
  a.partial = partial.data_ptr();
  PYFLOW_LAUNCH(squares_kernel, f64, a, grad);
  if (a.cut.segments > 1) sum_segments_of(partial, out, a, f64);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyflow_cuda, CUDA, m) {
  m.impl("mala_accept", TORCH_BOX(&mala_accept));
  m.impl("grad_norm_penalty", TORCH_BOX(&grad_norm_penalty));
}

}  // namespace pyflow::cuda
