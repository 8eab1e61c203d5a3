// Finite scalar quantisation on an NVIDIA GPU: grids over the scalar functions of ops/fsq.h. A block handles a tile of
// positions with all their channels; elements are numbered as in triton_kernels/fsq.py.
#include "../args/fsq.h"
#include "tile.h"

namespace pyflow::cuda {
namespace {

constexpr int kScales = 1056;  // most distinct scales for any levels, see scales_of

// The arguments' arrays are in host memory: their contents are passed as kernel parameters.
struct Table {
  float constants[kFsqFields][kFsqChannels];
  int64_t basis[kFsqChannels];
};

struct Levels {
  int64_t level[kFsqChannels];
};

struct Scales {
  int first[kFsqChannels];  // of a channel; later stages repeat its last scale
  int last[kFsqChannels];
  float scale[kScales];
};

Table table_of(const FsqArgs& a) {
  Table t{};
  const float* constants = (const float*)a.table.constants;
  for (int64_t c = 0; c < a.channels; ++c) {
    for (int i = 0; i < kFsqFields; ++i) t.constants[i][c] = constants[i * a.channels + c];
    t.basis[c] = ((const int64_t*)a.table.basis)[c];
  }
  return t;
}

// Channels with equal levels share a list of scales, which ends with the first 0. The worst case for a product of at
// most 2^63 is one channel of each level 2 to 20: 1049 scales.
template <class Residual>
Scales scales_of(const Residual& a) {
  Scales s{};
  const float* scales = (const float*)a.scales;
  int count = 0;
  for (int64_t c = 0; c < a.channels; ++c) {
    int64_t same = 0;
    while (a.levels[same] != a.levels[c]) ++same;
    if (same < c) {
      s.first[c] = s.first[same];
      s.last[c] = s.last[same];
      continue;
    }
    s.first[c] = count;
    for (int64_t stage = 0; stage < a.stages && (stage == 0 || s.scale[count - 1] > 0); ++stage) {
      s.scale[count++] = scales[stage * a.channels + c];
    }
    s.last[c] = count - 1 - s.first[c];
  }
  return s;
}

// the table in shared memory, in the compute type
template <class T>
struct Constants {
  T field[kFsqFields][kFsqChannels];
  __device__ FsqChannel<T> at(int c) const {
    return {field[0][c], field[1][c], field[2][c], field[3][c], field[4][c], field[5][c]};
  }
};

template <class T>
__device__ void fetch(const FsqArgs& a, const Table& table, Constants<T>& constants) {
  const int channels = int(a.channels);
  for (int i = threadIdx.x; i < kFsqFields * channels; i += kThreads) {
    const int field = i / channels, c = i % channels;
    constants.field[field][c] = T(table.constants[field][c]);
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
__device__ Place place(const FsqArgs& a, int k) {
  const int channels = int(a.channels), tile = int(a.tile);
  const int i = N == kEach ? int(threadIdx.x) * kEach + k : int(threadIdx.x) + k * kThreads;
  const int c = a.flat ? i % channels : i / tile, p = a.flat ? i / channels : i % tile;
  const int64_t position = int64_t(blockIdx.x) * tile + p;
  return {i, c, position, i < tile * channels && position < a.positions};
}

__device__ int64_t offset(const FsqArgs& a, const View& v, const Place& p) {
  return row_offset(a.space, v, p.channel) + col_offset(a.space, v, p.position);
}

// loads a thread's elements; a vector is inside or outside as a whole
template <int N, class T>
__device__ Group<T, kEach> load(const FsqArgs& a, const View& v) {
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
__device__ void store(const FsqArgs& a, const View& v, const Group<T, kEach>& values) {
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
__device__ void number(const FsqArgs& a, const Table& table, const Group<T, kEach>& digits, int64_t* shared,
                       int64_t at) {
  const int channels = int(a.channels), tile = int(a.tile);
  I* weights = (I*)shared;
  __syncthreads();  // wait for the previous stage to read its weights
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const Place p = place<N>(a, k);
    const T digit = digits.v[k];
    if (p.inside) weights[p.i] = digit == digit ? I(int32_t(digit)) * I(table.basis[p.channel]) : I(-1);
  }
  __syncthreads();
  for (int p = threadIdx.x; p < tile; p += kThreads) {
    const int64_t position = int64_t(blockIdx.x) * tile + p;
    if (position >= a.positions) break;
    I sum = 0;
    bool unknown = false;
    for (int c = 0; c < channels; ++c) {
      const I weight = weights[a.flat ? p * channels + c : c * tile + p];
      unknown |= weight < 0;
      sum += weight < 0 ? I(0) : weight;
    }
    ((I*)a.indices.data)[at + col_offset(a.space, a.indices, position)] = unknown ? I(-1) : sum;
  }
}

template <int N, class T>
__device__ void number_as(const FsqArgs& a, const Table& table, const Group<T, kEach>& digits, int64_t* shared,
                          int64_t at) {
  a.wide ? number<N, int64_t>(a, table, digits, shared, at) : number<N, int32_t>(a, table, digits, shared, at);
}

template <int V, int N, class T>
__global__ void __launch_bounds__(kThreads, 2)
    forward(const __grid_constant__ FsqForward a, const __grid_constant__ Table table) {
  __shared__ Constants<T> constants;
  __shared__ int64_t weights[kTile];
  fetch(a, table, constants);
  const auto z = load<N, T>(a, a.z);
  Group<T, kEach> digits, codes;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const auto c = constants.at(place<N>(a, k).channel);
    as_known<V>(a.variant, [&](auto variant) {
      digits.v[k] = fsq_digit<variant.value>(z.v[k], c);
      codes.v[k] = fsq_code<variant.value>(digits.v[k], c);
    });
  }
  store<N>(a, a.codes, codes);
  if (a.indices.data) number_as<N>(a, table, digits, weights, 0);
}

template <int V, int N, class T>
__global__ void __launch_bounds__(kThreads, 2)
    backward(const __grid_constant__ FsqBackward a, const __grid_constant__ Table table) {
  __shared__ Constants<T> constants;
  fetch(a, table, constants);
  const auto z = load<N, T>(a, a.z), grad = load<N, T>(a, a.grad);
  Group<T, kEach> gz;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const auto c = constants.at(place<N>(a, k).channel);
    as_known<V>(a.variant, [&](auto variant) {
      gz.v[k] = fsq_gradient<variant.value>(grad.v[k], fsq_slope<variant.value>(z.v[k], c));
    });
  }
  store<N>(a, a.gz, gz);
}

template <int N, class T>
__global__ void __launch_bounds__(kThreads, 2)
    decode(const __grid_constant__ FsqDecode a, const __grid_constant__ Table table,
           const __grid_constant__ Levels levels) {
  __shared__ Constants<T> constants;
  fetch(a, table, constants);
  Group<T, kEach> codes{};
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const Place p = place<N>(a, k);
    if (!p.inside) continue;
    const int64_t at = col_offset(a.space, a.indices, p.position);
    const int64_t index = a.wide ? ((const int64_t*)a.indices.data)[at] : ((const int32_t*)a.indices.data)[at];
    const uint64_t basis = uint64_t(table.basis[p.channel]), level = uint64_t(levels.level[p.channel]);
    const bool known = index >= 0 && uint64_t(index) < a.size;
    const uint64_t whole = known ? uint64_t(index) : 0;
    const bool small = a.size <= uint64_t(1) << 31;
    const uint64_t digit = small ? uint32_t(whole) / uint32_t(basis) % uint32_t(level) : whole / basis % level;
    as_constant(a.variant, [&](auto variant) {
      codes.v[k] = fsq_code<variant.value>(T(int32_t(digit)), constants.at(p.channel));
    });
    if (!known) codes.v[k] = T(float_of(0x7fc00000u));
  }
  store<N>(a, a.codes, codes);
}

__device__ int64_t active_of(const FsqStages& s) { return s.device_active ? *s.device_active : s.active; }

template <class T>
__device__ T scale_at(const Scales& s, int channel, int64_t stage) {
  const int last = s.last[channel];
  return T(s.scale[s.first[channel] + (stage < last ? int(stage) : last)]);
}

template <FsqVariant V, int N, class T>
__global__ void __launch_bounds__(kThreads, 2)
    residual(const __grid_constant__ ResidualFsqForward a, const __grid_constant__ Table table,
             const __grid_constant__ Scales scales) {
  __shared__ Constants<T> constants;
  __shared__ int64_t weights[kTile];
  fetch(a, table, constants);
  auto rest = load<N, T>(a, a.z);
  const int64_t active = active_of(a);
  Group<T, kEach> sum{}, digits;
  for (int64_t stage = 0; stage < a.stages; ++stage) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      digits.v[k] = T(float_of(0x7fc00000u));
      if (stage >= active) continue;
      const int channel = place<N>(a, k).channel;
      const T scale = scale_at<T>(scales, channel, stage);
      digits.v[k] = fsq_digit<V>(rest.v[k] / scale, constants.at(channel));
      const T part = fsq_code<V>(digits.v[k], constants.at(channel)) * scale;
      rest.v[k] -= part;
      sum.v[k] += part;
    }
    number_as<N>(a, table, digits, weights, stage);
  }
  store<N>(a, a.codes, sum);
}

template <FsqVariant V, int N, class T>
__global__ void __launch_bounds__(kThreads, 2)
    residual_backward(const __grid_constant__ ResidualFsqBackward a, const __grid_constant__ Table table,
                      const __grid_constant__ Scales scales) {
  __shared__ Constants<T> constants;
  fetch(a, table, constants);
  auto rest = load<N, T>(a, a.z);
  const auto grad = load<N, T>(a, a.grad);
  const int64_t active = active_of(a);
  Group<T, kEach> sum{};
  for (int64_t stage = 0; stage < a.stages && stage < active; ++stage) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int channel = place<N>(a, k).channel;
      const T scale = scale_at<T>(scales, channel, stage), scaled = rest.v[k] / scale;
      sum.v[k] += fsq_slope<V>(scaled, constants.at(channel));
      rest.v[k] -= fsq_code<V>(fsq_digit<V>(scaled, constants.at(channel)), constants.at(channel)) * scale;
    }
  }
#pragma unroll
  for (int k = 0; k < kEach; ++k) sum.v[k] = fsq_gradient<V>(grad.v[k], sum.v[k]);
  store<N>(a, a.gz, sum);
}

// whether kEach neighbours in the tile are always 16 aligned bytes of float32
bool whole_vectors(const FsqArgs& a, const View& v) {
  const bool line = v.dtype == DType::f32 && a.space.col_dims == 1 && uintptr_t(v.data) % 16 == 0;
  const int64_t d = a.channels, row = v.stride[0], col = v.stride[a.space.row_dims];
  const bool side_by_side = a.flat && row == 1 && col == d && a.positions * d % kEach == 0;
  const bool apart = !a.flat && col == 1 && a.positions % kEach == 0 && (d == 1 || row % kEach == 0);
  return line && (side_by_side || apart);
}

template <class... Views>
bool whole_vectors(const FsqArgs& a, const View& first, const Views&... others) {
  return (whole_vectors(a, first) && ... && whole_vectors(a, others));
}

// the residual operators have the two symmetric variants only
template <class F>
void as_symmetric(FsqVariant variant, F f) {
  as_constant(variant, [&](auto v) {
    if constexpr (is_symmetric(v.value)) f(v);
  });
}

}  // namespace

void fsq_forward(const FsqForward& a, Stream stream) {
  with_types(a, a.variant, whole_vectors(a, a.z, a.codes), [&](auto v, auto n, auto zero) {
    launch(forward<v.value, n.value, decltype(zero)>, a.plan.units, stream, a, table_of(a));
  });
}

void fsq_backward(const FsqBackward& a, Stream stream) {
  with_types(a, a.variant, whole_vectors(a, a.z, a.grad, a.gz), [&](auto v, auto n, auto zero) {
    launch(backward<v.value, n.value, decltype(zero)>, a.plan.units, stream, a, table_of(a));
  });
}

void fsq_decode(const FsqDecode& a, Stream stream) {
  Levels levels{};
  for (int64_t c = 0; c < a.channels; ++c) levels.level[c] = a.levels[c];
  with_types(a, whole_vectors(a, a.codes), [&](auto n, auto zero) {
    launch(decode<n.value, decltype(zero)>, a.plan.units, stream, a, table_of(a), levels);
  });
}

void residual_fsq_forward(const ResidualFsqForward& a, Stream stream) {
  as_symmetric(a.variant, [&](auto v) {
    with_types(a, whole_vectors(a, a.z, a.codes), [&](auto n, auto zero) {
      launch(residual<decltype(v)::value, n.value, decltype(zero)>, a.plan.units, stream, a, table_of(a), scales_of(a));
    });
  });
}

void residual_fsq_backward(const ResidualFsqBackward& a, Stream stream) {
  as_symmetric(a.variant, [&](auto v) {
    with_types(a, whole_vectors(a, a.z, a.grad, a.gz), [&](auto n, auto zero) {
      launch(residual_backward<decltype(v)::value, n.value, decltype(zero)>, a.plan.units, stream, a, table_of(a),
             scales_of(a));
    });
  });
}

}  // namespace pyflow::cuda
