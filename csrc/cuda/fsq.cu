// Finite scalar quantisation on an NVIDIA GPU: grids over the scalar functions of ops/fsq.h.
// A block handles a tile of positions with all their channels; elements are numbered as in triton_kernels/fsq.py.
#include <initializer_list>

#include "../torch/fsq.h"
#include "tile.h"

namespace pyflow::cuda {
namespace {

constexpr int kChannels = 64;  // most channels per launch
constexpr int kFields = 6;     // constants in FsqChannel
constexpr int kScales = 1056;  // most distinct scales for any levels, see set_scales
constexpr int kAny = -1;       // variant selected at run time, for cases where binary size matters more than speed

struct Args {
  Space space;        // (channels) x (positions)
  int channels, per;  // per: positions per tile
  int64_t positions;
  bool inner;  // channels run fastest, else positions
  bool wide;   // indices are int64
  bool f64;
  int variant;
  View z, codes;       // backward: codes holds gz
  View grad, indices;  // may be absent
  float constants[kFields][kChannels];
  int64_t basis[kChannels];
};

struct DecodeArgs : Args {
  int64_t levels[kChannels];
  uint64_t size;  // codebook size
};

struct ResidualArgs : Args {
  int64_t stages;
  const int64_t* active;       // on the device; may be absent
  int first_scale[kChannels];  // of a channel; later stages repeat its last scale
  int last_scale[kChannels];
  float scales[kScales];
};

// calls f with the variant as a compile-time constant; f is host or device code
#pragma nv_exec_check_disable
template <int V, class F>
__host__ __device__ void for_variant(int variant, F f) {
  if constexpr (V != kAny) {
    f(std::integral_constant<FsqVariant, FsqVariant(V)>{});
  } else {
    switch (FsqVariant(variant)) {
#define PYFLOW_CASE(name) \
  case FsqVariant::name: return f(std::integral_constant<FsqVariant, FsqVariant::name>{});
      PYFLOW_CASE(vqp)
      PYFLOW_CASE(paper)
      PYFLOW_CASE(symmetric)
      PYFLOW_CASE(sigmoid)
      PYFLOW_CASE(hard)
      PYFLOW_CASE(symmetric_hard)
#undef PYFLOW_CASE
    }
  }
}

template <class T>
struct Constants {
  T field[kFields][kChannels];
  __device__ FsqChannel<T> at(int c) const {
    return {field[0][c], field[1][c], field[2][c], field[3][c], field[4][c], field[5][c]};
  }
};

template <class T>
__device__ void fetch(const Args& a, Constants<T>& constants) {
  for (int i = threadIdx.x; i < kFields * a.channels; i += kThreads) {
    const int field = i / a.channels, c = i % a.channels;
    constants.field[field][c] = T(a.constants[field][c]);
  }
  __syncthreads();
}

// one element of the tile: its number i in the tile, its channel and its position
struct Place {
  int i, channel;
  int64_t position;
  bool inside;
};

// the k-th of a thread's kEach elements; they are neighbours if N == kEach
template <int N>
__device__ Place place(const Args& a, int k) {
  const int i = N == kEach ? int(threadIdx.x) * kEach + k : int(threadIdx.x) + k * kThreads;
  const int c = a.inner ? i % a.channels : i / a.per, p = a.inner ? i / a.channels : i % a.per;
  const int64_t position = int64_t(blockIdx.x) * a.per + p;
  return {i, c, position, i < a.per * a.channels && position < a.positions};
}

__device__ int64_t offset(const Args& a, const View& v, const Place& p) {
  return row_offset(a.space, v, p.channel) + col_offset(a.space, v, p.position);
}

// loads a thread's elements; a vector is inside or outside as a whole
template <int N, class T>
__device__ Group<T, kEach> load(const Args& a, const View& v) {
  Group<T, kEach> values{};
  if constexpr (N == kEach) {
    const Place p = place<N>(a, 0);
    if (p.inside) values = *(const Group<T, kEach>*)((const T*)v.data + offset(a, v, p));
  } else {
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const Place p = place<N>(a, k);
      if (p.inside) values.v[k] = read<T>(v, offset(a, v, p));
    }
  }
  return values;
}

template <int N, class T>
__device__ void store(const Args& a, const View& v, const Group<T, kEach>& values) {
  if constexpr (N == kEach) {
    const Place p = place<N>(a, 0);
    if (p.inside) *(Group<T, kEach>*)((T*)v.data + offset(a, v, p)) = values;
  } else {
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const Place p = place<N>(a, k);
      if (p.inside) write(v, offset(a, v, p), values.v[k]);
    }
  }
}

// Computes the index of each position of the tile, -1 if a digit is NaN. All threads must call it.
template <int N, class I, class T>
__device__ void number(const Args& a, const Group<T, kEach>& digits, int64_t* shared, int64_t at) {
  I* weights = (I*)shared;
  __syncthreads();  // wait for the previous stage to read its weights
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const Place p = place<N>(a, k);
    const T digit = digits.v[k];
    if (p.inside) weights[p.i] = digit == digit ? I(int32_t(digit)) * I(a.basis[p.channel]) : I(-1);
  }
  __syncthreads();
  for (int p = threadIdx.x; p < a.per; p += kThreads) {
    const int64_t position = int64_t(blockIdx.x) * a.per + p;
    if (position >= a.positions) break;
    I sum = 0;
    bool unknown = false;
    for (int c = 0; c < a.channels; ++c) {
      const I weight = weights[a.inner ? p * a.channels + c : c * a.per + p];
      unknown |= weight < 0;
      sum += weight < 0 ? I(0) : weight;
    }
    ((I*)a.indices.data)[at + col_offset(a.space, a.indices, position)] = unknown ? I(-1) : sum;
  }
}

template <int N, class T>
__device__ void number_as(const Args& a, const Group<T, kEach>& digits, int64_t* shared, int64_t at) {
  a.wide ? number<N, int64_t>(a, digits, shared, at) : number<N, int32_t>(a, digits, shared, at);
}

template <int V, int N, class T>
__global__ void __launch_bounds__(kThreads, 2) forward(const __grid_constant__ Args a) {
  __shared__ Constants<T> constants;
  __shared__ int64_t weights[kTile];
  fetch(a, constants);
  const auto z = load<N, T>(a, a.z);
  Group<T, kEach> digits, codes;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const auto c = constants.at(place<N>(a, k).channel);
    for_variant<V>(a.variant, [&](auto variant) {
      digits.v[k] = fsq_digit<decltype(variant)::value>(z.v[k], c);
      codes.v[k] = fsq_code<decltype(variant)::value>(digits.v[k], c);
    });
  }
  store<N>(a, a.codes, codes);
  if (a.indices.data) number_as<N>(a, digits, weights, 0);
}

template <int V, int N, class T>
__global__ void __launch_bounds__(kThreads, 2) backward(const __grid_constant__ Args a) {
  __shared__ Constants<T> constants;
  fetch(a, constants);
  const auto z = load<N, T>(a, a.z), grad = load<N, T>(a, a.grad);
  Group<T, kEach> gz;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const auto c = constants.at(place<N>(a, k).channel);
    for_variant<V>(a.variant, [&](auto variant) {
      constexpr FsqVariant name = decltype(variant)::value;
      gz.v[k] = fsq_gradient<name>(grad.v[k], fsq_slope<name>(z.v[k], c));
    });
  }
  store<N>(a, a.codes, gz);
}

template <int N, class T>
__global__ void __launch_bounds__(kThreads, 2) decode(const __grid_constant__ DecodeArgs a) {
  __shared__ Constants<T> constants;
  fetch(a, constants);
  Group<T, kEach> codes{};
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const Place p = place<N>(a, k);
    if (!p.inside) continue;
    const int64_t at = col_offset(a.space, a.indices, p.position);
    const int64_t index = a.wide ? ((const int64_t*)a.indices.data)[at] : ((const int32_t*)a.indices.data)[at];
    const uint64_t basis = uint64_t(a.basis[p.channel]), level = uint64_t(a.levels[p.channel]);
    const bool known = index >= 0 && uint64_t(index) < a.size;
    const uint64_t whole = known ? uint64_t(index) : 0;
    const bool small = a.size <= uint64_t(1) << 31;
    const uint64_t digit = small ? uint32_t(whole) / uint32_t(basis) % uint32_t(level) : whole / basis % level;
    for_variant<kAny>(a.variant, [&](auto variant) {
      codes.v[k] = fsq_code<decltype(variant)::value>(T(int32_t(digit)), constants.at(p.channel));
    });
    if (!known) codes.v[k] = T(float_of(0x7fc00000u));
  }
  store<N>(a, a.codes, codes);
}

template <class T>
__device__ T scale_at(const ResidualArgs& a, int channel, int64_t stage) {
  const int last = a.last_scale[channel];
  return T(a.scales[a.first_scale[channel] + (stage < last ? int(stage) : last)]);
}

template <int V, int N, class T>
__global__ void __launch_bounds__(kThreads, 2) residual(const __grid_constant__ ResidualArgs a) {
  constexpr FsqVariant name = FsqVariant(V);
  __shared__ Constants<T> constants;
  __shared__ int64_t weights[kTile];
  fetch(a, constants);
  auto rest = load<N, T>(a, a.z);
  const int64_t active = a.active ? *a.active : a.stages;
  Group<T, kEach> sum{}, digits;
  for (int64_t stage = 0; stage < a.stages; ++stage) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      digits.v[k] = T(float_of(0x7fc00000u));
      if (stage >= active) continue;
      const int channel = place<N>(a, k).channel;
      const T scale = scale_at<T>(a, channel, stage);
      digits.v[k] = fsq_digit<name>(rest.v[k] / scale, constants.at(channel));
      const T part = fsq_code<name>(digits.v[k], constants.at(channel)) * scale;
      rest.v[k] -= part;
      sum.v[k] += part;
    }
    number_as<N>(a, digits, weights, stage);
  }
  store<N>(a, a.codes, sum);
}

template <int V, int N, class T>
__global__ void __launch_bounds__(kThreads, 2) residual_backward(const __grid_constant__ ResidualArgs a) {
  constexpr FsqVariant name = FsqVariant(V);
  __shared__ Constants<T> constants;
  fetch(a, constants);
  auto rest = load<N, T>(a, a.z);
  const auto grad = load<N, T>(a, a.grad);
  const int64_t active = a.active ? *a.active : a.stages;
  Group<T, kEach> sum{};
  for (int64_t stage = 0; stage < a.stages && stage < active; ++stage) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int channel = place<N>(a, k).channel;
      const T scale = scale_at<T>(a, channel, stage), scaled = rest.v[k] / scale;
      sum.v[k] += fsq_slope<name>(scaled, constants.at(channel));
      rest.v[k] -= fsq_code<name>(fsq_digit<name>(scaled, constants.at(channel)), constants.at(channel)) * scale;
    }
  }
#pragma unroll
  for (int k = 0; k < kEach; ++k) sum.v[k] = fsq_gradient<name>(grad.v[k], sum.v[k]);
  store<N>(a, a.codes, sum);
}

void set_levels(Args& a, const Levels& levels, int64_t variant) {
  a.variant = int(variant);
  for (size_t c = 0; c < levels.size(); ++c) {
    const FsqChannel<float> f = channel_of(levels[c], FsqVariant(variant));
    const float fields[kFields] = {f.shift, f.half, f.offset, f.width, f.top, f.step};
    for (int i = 0; i < kFields; ++i) a.constants[i][c] = fields[i];
    a.basis[c] = int64_t(product(levels, c));
  }
}

// Channels with equal levels share a list of scales, which ends with the first 0. The worst case for a product of at
// most 2^63 is one channel of each level 2 to 20: 1049 scales.
void set_scales(ResidualArgs& a, const Levels& levels, int64_t stages, const std::optional<Tensor>& active) {
  a.stages = stages;
  a.active = active ? (const int64_t*)active->data_ptr() : nullptr;
  int count = 0;
  for (size_t c = 0; c < levels.size(); ++c) {
    const size_t same = size_t(std::find(levels.begin(), levels.end(), levels[c]) - levels.begin());
    if (same < c) {
      a.first_scale[c] = a.first_scale[same];
      a.last_scale[c] = a.last_scale[same];
      continue;
    }
    a.first_scale[c] = count;
    for (int64_t stage = 0; stage < stages && (stage == 0 || a.scales[count - 1] > 0); ++stage) {
      STD_TORCH_CHECK(count < kScales, "residual_fsq: more levels and stages than a GPU kernel takes");
      a.scales[count++] = scale_of(levels[c], stage);
    }
    a.last_scale[c] = count - 1 - a.first_scale[c];
  }
}

// merges the layout and splits the positions into tiles
void plan(Args& a, Layout& layout) {
  a.space = layout.merge();
  a.channels = int(a.space.rows);
  a.positions = a.space.cols;
  a.per = kTile / a.channels / kEach * kEach;
  const View& lead = a.z.data ? a.z : a.codes;
  a.inner = a.channels > 1 && lead.stride[0] < lead.stride[a.space.row_dims + a.space.col_dims - 1];
}

// whether kEach neighbours in the tile are always 16 aligned bytes of float32; absent tensors are ignored
bool vectors(const Args& a, std::initializer_list<const View*> views) {
  for (const View* v : views) {
    if (!v->data) continue;
    const bool line = v->dtype == DType::f32 && a.space.col_dims == 1 && uintptr_t(v->data) % 16 == 0;
    const int64_t d = a.channels, row = v->stride[0], col = v->stride[a.space.row_dims];
    const bool side_by_side = a.inner && row == 1 && col == d && a.positions * d % kEach == 0;
    const bool apart = !a.inner && col == 1 && a.positions % kEach == 0 && (d == 1 || row % kEach == 0);
    if (!line || !(side_by_side || apart)) return false;
  }
  return true;
}

int64_t blocks_of(const Args& a) { return ceil_div(a.positions, a.per); }

void launch_forward(const Args& a, const Tensor& on) {
  if (a.positions == 0) return;
  if (a.f64) return launch(forward<kAny, 1, double>, blocks_of(a), on, a);
  if (!vectors(a, {&a.z, &a.codes})) return launch(forward<kAny, 1, float>, blocks_of(a), on, a);
  for_variant<kAny>(a.variant, [&](auto v) { launch(forward<int(v.value), kEach, float>, blocks_of(a), on, a); });
}

void launch_backward(const Args& a, const Tensor& on) {
  if (a.positions == 0) return;
  if (a.f64) return launch(backward<kAny, 1, double>, blocks_of(a), on, a);
  if (!vectors(a, {&a.z, &a.grad, &a.codes})) return launch(backward<kAny, 1, float>, blocks_of(a), on, a);
  for_variant<kAny>(a.variant, [&](auto v) { launch(backward<int(v.value), kEach, float>, blocks_of(a), on, a); });
}

// Splits a call without indices, where channels are independent: channels of equal levels become positions of a single
// channel, others come in groups of kChannels. Calls f(levels, dims of the positions, first channel, channels).
template <class F>
void for_parts(const Levels& levels, int64_t dims, F f) {
  const int64_t d = int64_t(levels.size());
  if (std::count(levels.begin(), levels.end(), levels[0]) == d) return f(Levels{levels[0]}, dims, int64_t(0), d);
  for (int64_t c = 0; c < d; c += kChannels) {
    const int64_t count = std::min<int64_t>(kChannels, d - c);
    f(Levels(levels.begin() + c, levels.begin() + c + count), dims - 1, c, count);
  }
}

std::tuple<Tensor, Tensor> fsq(Tensor z, Levels levels, int64_t variant, bool return_indices) {
  const int64_t none = 0;
  Tensor codes = new_like(z);
  if (!return_indices) {
    for_parts(levels, z.dim(), [&](const Levels& part, int64_t dims, int64_t first, int64_t count) {
      Args a{};
      const Tensor in = torch::stable::narrow(z, 0, first, count), out = torch::stable::narrow(codes, 0, first, count);
      Layout layout(in, dims);
      layout.add(a.z, in);
      layout.add(a.codes, out);
      a.f64 = z.scalar_type() == ScalarType::Double;
      set_levels(a, part, variant);
      plan(a, layout);
      launch_forward(a, z);
    });
    return {codes, new_empty(z, &none, 1, ScalarType::Int)};
  }
  Args a{};
  Layout layout(z, z.dim() - 1);
  a.wide = is_wide(levels);
  Tensor indices = new_empty(z, z.sizes().data() + 1, z.dim() - 1, index_dtype(a.wide));
  layout.add(a.z, z);
  layout.add(a.codes, codes);
  layout.add_event(a.indices, indices);
  a.f64 = z.scalar_type() == ScalarType::Double;
  set_levels(a, levels, variant);
  plan(a, layout);
  launch_forward(a, z);
  return {codes, indices};
}

Tensor fsq_backward(Tensor grad, Tensor z, Levels levels, int64_t variant) {
  Tensor gz = new_like(z);
  for_parts(levels, z.dim(), [&](const Levels& part, int64_t dims, int64_t first, int64_t count) {
    Args a{};
    const Tensor in = torch::stable::narrow(z, 0, first, count), out = torch::stable::narrow(gz, 0, first, count);
    Layout layout(in, dims);
    layout.add(a.z, in);
    layout.add(a.grad, torch::stable::narrow(grad, 0, first, count));
    layout.add(a.codes, out);
    a.f64 = z.scalar_type() == ScalarType::Double;
    set_levels(a, part, variant);
    plan(a, layout);
    launch_backward(a, z);
  });
  return gz;
}

Tensor fsq_decode(Tensor indices, Levels levels, int64_t variant, int64_t dim, ScalarType dtype) {
  DecodeArgs a{};
  std::vector<int64_t> sizes(indices.sizes().begin(), indices.sizes().end());
  sizes.insert(sizes.begin() + dim, int64_t(levels.size()));
  Tensor codes = new_empty(indices, sizes.data(), int64_t(sizes.size()), dtype);
  Layout layout(int64_t(levels.size()), indices);
  layout.add_moved(a.codes, codes, dim);
  layout.add_event(a.indices, indices);
  a.f64 = dtype == ScalarType::Double;
  a.wide = indices.scalar_type() == ScalarType::Long;
  a.size = product(levels, levels.size());
  std::copy(levels.begin(), levels.end(), a.levels);
  set_levels(a, levels, variant);
  plan(a, layout);
  if (a.positions == 0) return codes;
  const bool whole = !a.f64 && vectors(a, {&a.codes});
  launch(a.f64 ? decode<1, double> : whole ? decode<kEach, float> : decode<1, float>, blocks_of(a), codes, a);
  return codes;
}

constexpr int kSymmetric = int(FsqVariant::symmetric), kSymmetricHard = int(FsqVariant::symmetric_hard);

std::tuple<Tensor, Tensor> residual_fsq(Tensor x, Levels levels, int64_t variant, int64_t stages,
                                        std::optional<Tensor> active) {
  ResidualArgs a{};
  Layout layout(x, x.dim() - 1);
  Tensor out = new_like(x);
  a.wide = active || is_wide(levels);
  std::vector<int64_t> sizes(x.sizes().begin() + 1, x.sizes().end());
  sizes.push_back(stages);
  Tensor indices = new_empty(x, sizes.data(), int64_t(sizes.size()), index_dtype(a.wide));
  layout.add(a.z, x);
  layout.add(a.codes, out);
  layout.add_event(a.indices, indices);
  a.f64 = x.scalar_type() == ScalarType::Double;
  set_levels(a, levels, variant);
  set_scales(a, levels, stages, active);
  plan(a, layout);
  if (a.positions == 0) return {out, indices};
  const bool whole = !a.f64 && vectors(a, {&a.z, &a.codes}), hard = variant == kSymmetricHard;
  const auto kernel = a.f64   ? (hard ? residual<kSymmetricHard, 1, double> : residual<kSymmetric, 1, double>)
                      : whole ? (hard ? residual<kSymmetricHard, kEach, float> : residual<kSymmetric, kEach, float>)
                              : (hard ? residual<kSymmetricHard, 1, float> : residual<kSymmetric, 1, float>);
  launch(kernel, blocks_of(a), x, a);
  return {out, indices};
}

Tensor residual_fsq_backward(Tensor grad, Tensor x, Levels levels, int64_t variant, int64_t stages,
                             std::optional<Tensor> active) {
  ResidualArgs a{};
  Layout layout(x, x.dim() - 1);
  Tensor gx = new_like(x);
  layout.add(a.z, x);
  layout.add(a.grad, grad);
  layout.add(a.codes, gx);
  a.f64 = x.scalar_type() == ScalarType::Double;
  set_levels(a, levels, variant);
  set_scales(a, levels, stages, active);
  plan(a, layout);
  if (a.positions == 0) return gx;
  const bool whole = !a.f64 && vectors(a, {&a.z, &a.grad, &a.codes}), hard = variant == kSymmetricHard;
  const auto kernel =
      a.f64   ? (hard ? residual_backward<kSymmetricHard, 1, double> : residual_backward<kSymmetric, 1, double>)
      : whole ? (hard ? residual_backward<kSymmetricHard, kEach, float> : residual_backward<kSymmetric, kEach, float>)
              : (hard ? residual_backward<kSymmetricHard, 1, float> : residual_backward<kSymmetric, 1, float>);
  launch(kernel, blocks_of(a), x, a);
  return gx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyflow_cuda, CUDA, m) {
  m.impl("fsq", TORCH_BOX(&fsq));
  m.impl("fsq_backward", TORCH_BOX(&fsq_backward));
  m.impl("fsq_decode", TORCH_BOX(&fsq_decode));
  m.impl("residual_fsq", TORCH_BOX(&residual_fsq));
  m.impl("residual_fsq_backward", TORCH_BOX(&residual_fsq_backward));
}

}  // namespace pyflow::cuda
