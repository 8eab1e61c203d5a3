// Finite scalar quantisation: codes and indices, gradients, decoding, and the residual form. A unit is a tile of
// positions; flat tiles (channels adjacent) run over all channels in one loop, others channel by channel.
#include "../args/fsq.h"

#include "tile.h"

namespace pyflow::PYFLOW_ISA {
namespace {

// Constants for a loop over elements: one entry per element, or one channel for all elements. Fields are copied one by
// one: a loop that copies a whole struct is not vectorised.
template <class T>
struct EachElement {
  const T *shift, *half, *offset, *width, *top, *step;
  PYFLOW_FN FsqChannel<T> at(const EachElement& c, int64_t i) {
    return {c.shift[i], c.half[i], c.offset[i], c.width[i], c.top[i], c.step[i]};
  }
};

template <class T>
struct OneChannel {
  T shift, half, offset, width, top, step;
  PYFLOW_FN FsqChannel<T> at(const OneChannel& c, int64_t) {
    return {c.shift, c.half, c.offset, c.width, c.top, c.step};
  }
};

template <class T>
EachElement<T> each_element(const FsqTable& table) {
  const T* t = (const T*)table.constants;
  const int64_t p = table.period;
  return {t, t + p, t + 2 * p, t + 3 * p, t + 4 * p, t + 5 * p};
}

template <class T>
OneChannel<T> one_channel(const FsqTable& table, int64_t c) {
  const EachElement<T> e = each_element<T>(table);
  return {e.shift[c], e.half[c], e.offset[c], e.width[c], e.top[c], e.step[c]};
}

template <FsqVariant V, class T, class C>
void quantize(const T* __restrict z, C constants, T* __restrict codes, T* __restrict digits, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const FsqChannel<T> c = C::at(constants, i);
    const T digit = fsq_digit<V>(z[i], c);
    digits[i] = digit;
    codes[i] = fsq_code<V>(digit, c);
  }
}

template <class I>
void store_indices(const FsqArgs& a, int64_t position, int64_t n, const I* indices, int64_t offset) {
  for_each_run(a.space, a.indices, {0, 1, position, n}, [&](int64_t from, int64_t at, int64_t count, int64_t stride) {
    I* out = (I*)a.indices.data + offset + from;
    for (int64_t i = 0; i < count; ++i) out[i * stride] = indices[at + i];
  });
}

// the indices of n positions from digits (n, channels)
template <class I, class T>
void number_flat(const FsqArgs& a, const T* __restrict digits, int64_t position, int64_t n, int64_t offset) {
  const int64_t d = a.channels, count = n * d;
  const I* __restrict basis = (const I*)a.table.basis;
  alignas(64) I weight[kChunk], sum[kChunk];
  int32_t unknown = 0;
#pragma omp simd reduction(| : unknown)
  for (int64_t i = 0; i < count; ++i) {
    const bool known = digits[i] == digits[i];
    weight[i] = I(int32_t(known ? digits[i] : T(0))) * basis[i];
    unknown |= !known;
  }
  // sum[i] = weight[i] + ... + weight[i + d - 1] for all i, so that it vectorises; every d-th entry is used
  for (int64_t i = 0; i < count; ++i) sum[i] = weight[i];
  for (int64_t c = 1; c < d; ++c) {
    for (int64_t i = 0; i + c < count; ++i) sum[i] += weight[i + c];
  }
  for (int64_t p = 0; p < n; ++p) sum[p] = sum[p * d];
  if (unknown) {
    for (int64_t i = 0; i < count; ++i) {
      if (digits[i] != digits[i]) sum[i / d] = I(-1);
    }
  }
  store_indices(a, position, n, sum, offset);
}

// adds a channel's digits to the indices of n positions
template <class I, class T>
void add_channel(const T* __restrict digits, I basis, int64_t n, I* __restrict indices, int32_t* __restrict unknown) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const bool known = digits[i] == digits[i];
    indices[i] += I(int32_t(known ? digits[i] : T(0))) * basis;
    unknown[i] |= !known;
  }
}

template <FsqVariant V, class I, class T>
void forward_flat(const FsqForward& a, int64_t position, int64_t n) {
  alignas(64) T z[kChunk], codes[kChunk], digits[kChunk];
  const Tile t{0, 1, position * a.channels, n * a.channels};
  prefetch(a.space, a.z, next_tile(t));
  T* out = target(a.space, a.codes, t, codes);
  quantize<V>(load(a.space, a.z, t, z), each_element<T>(a.table), out, digits, t.cols);
  store(a.space, a.codes, t, out);
  if (a.indices.data) number_flat<I>(a, digits, position, n, 0);
}

template <FsqVariant V, class I, class T>
void forward_by_channel(const FsqForward& a, int64_t position, int64_t n) {
  alignas(64) T z[kChunk], codes[kChunk], digits[kChunk];
  alignas(64) I indices[kChunk] = {};
  alignas(64) int32_t unknown[kChunk] = {};
  for (int64_t c = 0; c < a.channels; ++c) {
    const Tile t{c, 1, position, n};
    prefetch(a.space, a.z, next_tile(t));
    T* out = target(a.space, a.codes, t, codes);
    quantize<V>(load(a.space, a.z, t, z), one_channel<T>(a.table, c), out, digits, n);
    store(a.space, a.codes, t, out);
    if (a.indices.data) add_channel(digits, ((const I*)a.table.basis)[c], n, indices, unknown);
  }
  if (!a.indices.data) return;
  for (int64_t i = 0; i < n; ++i) indices[i] = unknown[i] ? I(-1) : indices[i];
  store_indices(a, position, n, indices, 0);
}

template <FsqVariant V, class T, class C>
void slopes(const T* __restrict z, const T* __restrict grad, C constants, T* __restrict gz, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    gz[i] = fsq_gradient<V>(grad[i], fsq_slope<V>(z[i], C::at(constants, i)));
  }
}

template <FsqVariant V, class T, class C>
void backward_tile(const FsqBackward& a, const Tile& t, C constants) {
  alignas(64) T z[kChunk], grad[kChunk], gz[kChunk];
  prefetch(a.space, a.z, next_tile(t));
  prefetch(a.space, a.grad, next_tile(t));
  T* out = target(a.space, a.gz, t, gz);
  slopes<V>(load(a.space, a.z, t, z), load(a.space, a.grad, t, grad), constants, out, t.cols);
  store(a.space, a.gz, t, out);
}

// copies n positions of v to values (n, channels)
template <class T>
void gather(const FsqArgs& a, const View& v, int64_t position, int64_t n, T* __restrict values) {
  const int64_t d = a.channels;
  if (a.flat) {
    const T* run = load(a.space, v, {0, 1, position * d, n * d}, values);
    for (int64_t i = 0; run != values && i < n * d; ++i) values[i] = run[i];
    return;
  }
  alignas(64) T buffer[kChunk];
  for (int64_t c = 0; c < d; ++c) {
    const T* run = load(a.space, v, {c, 1, position, n}, buffer);
    for (int64_t i = 0; i < n; ++i) values[i * d + c] = run[i];
  }
}

// writes values (n, channels) to n positions of v
template <class T>
void scatter(const FsqArgs& a, const View& v, int64_t position, int64_t n, const T* __restrict values) {
  const int64_t d = a.channels;
  if (a.flat) {
    const Tile t{0, 1, position * d, n * d};
    T* out = target(a.space, v, t, (T*)values);
    for (int64_t i = 0; out != values && i < n * d; ++i) out[i] = values[i];
    return store(a.space, v, t, out);
  }
  alignas(64) T buffer[kChunk];
  for (int64_t c = 0; c < d; ++c) {
    const Tile t{c, 1, position, n};
    T* out = target(a.space, v, t, buffer);
    for (int64_t i = 0; i < n; ++i) out[i] = values[i * d + c];
    store(a.space, v, t, out);
  }
}

// one residual stage: quantises rest / scale, adds the scaled code to sum and subtracts it from rest
template <FsqVariant V, class T>
void take_stage(EachElement<T> constants, const T* __restrict scale, T* __restrict rest, T* __restrict sum,
                T* __restrict digits, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T scaled = rest[i] / scale[i];
    const FsqChannel<T> c = EachElement<T>::at(constants, i);
    const T digit = fsq_digit<V>(scaled, c);
    const T part = fsq_code<V>(digit, c) * scale[i];
    digits[i] = digit;
    rest[i] -= part;
    sum[i] += part;
  }
}

template <FsqVariant V, class I, class T>
void residual_forward(const ResidualFsqForward& a, int64_t position, int64_t n) {
  alignas(64) T rest[kChunk], sum[kChunk] = {}, digits[kChunk];
  gather(a, a.z, position, n, rest);
  for (int64_t stage = 0; stage < a.stages; ++stage) {
    if (stage < a.active) {
      const T* scale = (const T*)a.scales + stage * a.table.period;
      take_stage<V>(each_element<T>(a.table), scale, rest, sum, digits, n * a.channels);
      number_flat<I>(a, digits, position, n, stage);
    } else {
      I dropped[kChunk];
      for (int64_t i = 0; i < kChunk; ++i) dropped[i] = I(-1);
      store_indices(a, position, n, dropped, stage);
    }
  }
  scatter(a, a.codes, position, n, sum);
}

// take_stage for the backward: sum adds up the slopes instead of the codes
template <FsqVariant V, class T>
void add_slope(EachElement<T> constants, const T* __restrict scale, T* __restrict rest, T* __restrict sum, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T scaled = rest[i] / scale[i];
    const FsqChannel<T> c = EachElement<T>::at(constants, i);
    sum[i] += fsq_slope<V>(scaled, c);
    rest[i] -= fsq_code<V>(fsq_digit<V>(scaled, c), c) * scale[i];
  }
}

template <FsqVariant V, class T>
void residual_backward(const ResidualFsqBackward& a, int64_t position, int64_t n) {
  alignas(64) T rest[kChunk], sum[kChunk] = {}, grad[kChunk];
  gather(a, a.z, position, n, rest);
  gather(a, a.grad, position, n, grad);
  for (int64_t stage = 0; stage < a.stages && stage < a.active; ++stage) {
    const T* scale = (const T*)a.scales + stage * a.table.period;
    add_slope<V>(each_element<T>(a.table), scale, rest, sum, n * a.channels);
  }
  for (int64_t i = 0; i < n * a.channels; ++i) sum[i] = fsq_gradient<V>(grad[i], sum[i]);
  scatter(a, a.gz, position, n, sum);
}

template <class I>
void read_indices(const FsqArgs& a, int64_t position, int64_t n, I* __restrict out) {
  for_each_run(a.space, a.indices, {0, 1, position, n}, [&](int64_t from, int64_t at, int64_t count, int64_t stride) {
    const I* in = (const I*)a.indices.data + from;
    for (int64_t i = 0; i < count; ++i) out[at + i] = in[i * stride];
  });
}

// digits = rest % level, rest /= level: splits off the digits of the next channel
template <class T>
void split_digit(int64_t* __restrict rest, int64_t level, T* __restrict digits, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    digits[i] = T(rest[i] % level);
    rest[i] /= level;
  }
}

// the same in float64, which vectorises: the quotient of integers below 2^53 does not round up to the next integer
template <class T>
void split_digit(double* __restrict rest, int64_t level, T* __restrict digits, int64_t n) {
  const double divisor = double(level);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const double quotient = floor_(rest[i] / divisor);
    digits[i] = T(rest[i] - quotient * divisor);
    rest[i] = quotient;
  }
}

template <FsqVariant V, class C, class T>
void decode_run(const T* __restrict digits, C constants, const int32_t* __restrict unknown, T* __restrict codes,
                int64_t n) {
  const T nan = T(float_of(0x7fc00000u));
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T code = fsq_code<V>(digits[i], C::at(constants, i));
    codes[i] = unknown[i] ? nan : code;
  }
}

template <FsqVariant V, class W, class I, class T>
void decode_tile(const FsqDecode& a, int64_t position, int64_t n) {
  alignas(64) I indices[kChunk];
  alignas(64) W rest[kChunk];
  alignas(64) int32_t unknown[kChunk];
  alignas(64) T digits[kChunk], codes[kChunk];
  read_indices(a, position, n, indices);
  for (int64_t i = 0; i < n; ++i) {
    unknown[i] = indices[i] < 0 || uint64_t(indices[i]) >= a.size;
    rest[i] = W(unknown[i] ? I(0) : indices[i]);
  }
  for (int64_t c = 0; c < a.channels; ++c) {
    const Tile t{c, 1, position, n};
    split_digit(rest, a.levels[c], digits, n);
    T* out = target(a.space, a.codes, t, codes);
    decode_run<V>(digits, one_channel<T>(a.table, c), unknown, out, n);
    store(a.space, a.codes, t, out);
  }
}

// calls f(position, n) for every tile of the units [begin, end)
template <class F>
void for_each_tile(const FsqArgs& a, int64_t begin, int64_t end, F f) {
  for (int64_t position = begin * a.tile; position < end * a.tile && position < a.positions; position += a.tile) {
    f(position, smaller(a.positions - position, a.tile));
  }
  stream_fence();
}

// calls f(variant as a constant, 0 of the compute type, 0 of the index type)
template <class F>
void dispatch(const FsqArgs& a, F f) {
  as_constant(a.variant, [&](auto variant) {
    if (a.f64) return a.wide ? f(variant, double(), int64_t()) : f(variant, double(), int32_t());
    a.wide ? f(variant, float(), int64_t()) : f(variant, float(), int32_t());
  });
}

// the residual operators support the two symmetric variants only
template <class F>
void dispatch_residual(const FsqArgs& a, F f) {
  dispatch(a, [&](auto variant, auto real, auto integer) {
    if constexpr (is_symmetric(decltype(variant)::value)) f(variant, real, integer);
  });
}

}  // namespace

void fsq_forward(const FsqForward& a, int64_t begin, int64_t end) {
  dispatch(a, [&](auto variant, auto real, auto integer) {
    constexpr FsqVariant V = decltype(variant)::value;
    for_each_tile(a, begin, end, [&](int64_t position, int64_t n) {
      a.flat ? forward_flat<V, decltype(integer), decltype(real)>(a, position, n)
             : forward_by_channel<V, decltype(integer), decltype(real)>(a, position, n);
    });
  });
}

void fsq_backward(const FsqBackward& a, int64_t begin, int64_t end) {
  dispatch(a, [&](auto variant, auto real, auto) {
    using T = decltype(real);
    constexpr FsqVariant V = decltype(variant)::value;
    for_each_tile(a, begin, end, [&](int64_t position, int64_t n) {
      if (a.flat) {
        return backward_tile<V, T>(a, {0, 1, position * a.channels, n * a.channels}, each_element<T>(a.table));
      }
      for (int64_t c = 0; c < a.channels; ++c) backward_tile<V, T>(a, {c, 1, position, n}, one_channel<T>(a.table, c));
    });
  });
}

void fsq_decode(const FsqDecode& a, int64_t begin, int64_t end) {
  dispatch(a, [&](auto variant, auto real, auto integer) {
    using T = decltype(real);
    using I = decltype(integer);
    constexpr FsqVariant V = decltype(variant)::value;
    for_each_tile(a, begin, end, [&](int64_t position, int64_t n) {
      a.size <= uint64_t(1) << 53 ? decode_tile<V, double, I, T>(a, position, n)
                                  : decode_tile<V, int64_t, I, T>(a, position, n);
    });
  });
}

void residual_fsq_forward(const ResidualFsqForward& a, int64_t begin, int64_t end) {
  dispatch_residual(a, [&](auto variant, auto real, auto integer) {
    for_each_tile(a, begin, end, [&](int64_t position, int64_t n) {
      residual_forward<decltype(variant)::value, decltype(integer), decltype(real)>(a, position, n);
    });
  });
}

void residual_fsq_backward(const ResidualFsqBackward& a, int64_t begin, int64_t end) {
  dispatch_residual(a, [&](auto variant, auto real, auto) {
    for_each_tile(a, begin, end, [&](int64_t position, int64_t n) {
      residual_backward<decltype(variant)::value, decltype(real)>(a, position, n);
    });
  });
}

}  // namespace pyflow::PYFLOW_ISA
