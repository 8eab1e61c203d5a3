// The parameters of some elements, from strided memory of any dtype to rows of a group: one row per parameter, one
// column per element; and back.
#pragma once

#include <utility>

#include "tile.h"

namespace pyflow::PYFLOW_ISA {

constexpr int kGroup = 64;        // elements handled together
constexpr int kMostParams = 128;  // of an element

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define PYFLOW_SHUFFLE 1
#endif
#endif

#if defined(PYFLOW_SHUFFLE)
#if defined(__AVX512F__)
constexpr int kRegister = 64;
#elif defined(__AVX2__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif

template <class T>
constexpr int kWide = kRegister / int(sizeof(T)) < 4 ? 4 : kRegister / int(sizeof(T));

template <class T, int N>
using Vec __attribute__((vector_size(N * sizeof(T)))) = T;

template <int N>
using Sequence = std::make_integer_sequence<int, N>;

template <class T, int N, int... I>
PYFLOW_FN Vec<T, 2 * N> joined(Vec<T, N> a, Vec<T, N> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, I...);
}

// four values from each of N / 4 places, four steps apart
template <class T, int N>
PYFLOW_FN Vec<T, N> load_fours(const T* from, int64_t step) {
  if constexpr (N == 4) {
    Vec<T, 4> v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
  } else {
    constexpr int kHalf = N / 2;
    const Vec<T, kHalf> a = load_fours<T, kHalf>(from, step), b = load_fours<T, kHalf>(from + kHalf * step, step);
    return joined<T, kHalf>(a, b, Sequence<N>());
  }
}

// the index of value i of two vectors of n values shuffled by fours: of the digits of `order`, 0 to 3 stand for the
// four of the first vector, 4 to 7 for those of the second
constexpr int shuffled(int i, int order, int n) {
  const int digit = order >> (12 - i % 4 * 4) & 15, first = i - i % 4;
  return digit < 4 ? first + digit : n + first + digit - 4;
}

template <int Order, class T, int N, int... I>
PYFLOW_FN Vec<T, N> shuffle(Vec<T, N> a, Vec<T, N> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, shuffled(I, Order, N)...);
}

template <class V, class T>
PYFLOW_FN void store_row(V v, T* to) {
  __builtin_memcpy(to, &v, sizeof v);
}

// a 4 x N matrix: to[i * to_step + j] = from[j * from_step + i]. Registers, because gcc does not vectorise such loops:
// 4.4 ns for 23 parameters of an element against 12 (one core of a Xeon with AVX-512, N = 4); N = 16 takes 2/3 of the
// time of N = 4 (a core of a Zen 5).
template <class T, int N>
PYFLOW_FN void transpose_block(const T* from, int64_t from_step, T* to, int64_t to_step) {
  using V = Vec<T, N>;
  constexpr Sequence<N> all{};
  const V a = load_fours<T, N>(from, from_step), b = load_fours<T, N>(from + from_step, from_step);
  const V c = load_fours<T, N>(from + 2 * from_step, from_step), d = load_fours<T, N>(from + 3 * from_step, from_step);
  const V ab = shuffle<0x0415, T, N>(a, b, all), cd = shuffle<0x0415, T, N>(c, d, all);
  const V AB = shuffle<0x2637, T, N>(a, b, all), CD = shuffle<0x2637, T, N>(c, d, all);
  store_row(shuffle<0x0145, T, N>(ab, cd, all), to);
  store_row(shuffle<0x2367, T, N>(ab, cd, all), to + to_step);
  store_row(shuffle<0x0145, T, N>(AB, CD, all), to + 2 * to_step);
  store_row(shuffle<0x2367, T, N>(AB, CD, all), to + 3 * to_step);
}

// blocks of N columns from column j on; returns the first column left
template <int N, class T>
PYFLOW_FN int64_t transpose_blocks(const T* from, int64_t from_step, int64_t rows, int64_t cols, T* to, int64_t to_step,
                                   int64_t j) {
  for (; rows >= 4 && j + N <= cols; j += N) {
    // the last block overlaps the one before it
    for (int64_t i = 0; i < rows; i += 4) {
      const int64_t k = smaller(i, rows - 4);
      transpose_block<T, N>(from + j * from_step + k, from_step, to + k * to_step + j, to_step);
    }
  }
  return j;
}
#endif

// to[i * to_step + j] = from[j * from_step + i] for i < rows, j < cols
template <class T>
void transpose(const T* from, int64_t from_step, int64_t rows, int64_t cols, T* to, int64_t to_step) {
  int64_t j = 0;
#if defined(PYFLOW_SHUFFLE)
  j = transpose_blocks<kWide<T>>(from, from_step, rows, cols, to, to_step, j);
  j = transpose_blocks<4>(from, from_step, rows, cols, to, to_step, j);
#endif
  for (; j < cols; ++j) {
    for (int64_t i = 0; i < rows; ++i) to[i * to_step + j] = from[j * from_step + i];
  }
}

// Calls run(offset in v, first element, count, stride) for the runs of elements [first, first + n) of a tile.
template <class F>
PYFLOW_FN void for_each_element_run(const Space& s, const View& v, const Tile& t, int64_t first, int64_t n, F run) {
  const int last = s.row_dims + s.col_dims - 1;
  const int64_t inner = s.size[last], stride = v.stride[last];
  // rows that continue each other are one run
  if (s.row_dims == 1 && s.col_dims == 1 && v.stride[0] == s.cols * stride && t.cols == s.cols) {
    run(t.row * v.stride[0] + first * stride, 0, n, stride);
    return;
  }
  for (int64_t i = 0; i < n;) {
    const int64_t row = t.row + (first + i) / t.cols, col = t.col + (first + i) % t.cols;
    const int64_t count = smaller(n - i, smaller(inner - col % inner, t.col + t.cols - col));
    run(row_offset(s, v, row) + col_offset(s, v, col), i, count, stride);
    i += count;
  }
}

// The parameters of the next group, prefetched into L2 part by part while a group is computed: all of them at once
// would wait for each other (16384 x 8 elements of 23 parameters on a core of a Xeon with AVX-512: 23 ns an element
// without prefetches, 21 with all at once, 18.5 part by part).
struct Ahead {
  const char* at;
  int64_t lines;  // of 64 bytes, of every part
  template <bool Write = false>
  void prefetch() {
    for (int64_t i = 0; i < lines; ++i, at += 64) __builtin_prefetch(at, Write, Write ? 3 : 2);
  }
};

// of what follows element `first` of a tile by a group, in `parts` parts; none if the parameters are not contiguous
PYFLOW_FN Ahead ahead_of(const Space& s, const View& v, int64_t step, int64_t count, const Tile& t, int64_t first,
                         int64_t parts) {
  const bool flat = s.row_dims == 1 && s.col_dims == 1 && v.stride[1] == count && v.stride[0] == s.cols * count;
  if (!flat || step != 1) return {nullptr, 0};
  const int64_t bytes = count * size_of(v.dtype);
  return {v.data + (t.row * s.cols + t.col + first + kGroup) * bytes, ceil_div(kGroup * bytes, 64 * parts)};
}

// `count` parameters of elements [first, first + n) of a tile to the columns of p; parameter j is j * step after the
// first
template <class T>
void load_params(const Space& s, const View& v, int64_t step, int64_t count, const Tile& t, int64_t first, int64_t n,
                 T (*p)[kGroup]) {
  alignas(64) T rows[kGroup * kMostParams];
  for_each_element_run(s, v, t, first, n, [&](int64_t offset, int64_t at, int64_t elements, int64_t stride) {
    if (step == 1 && v.dtype == kComputeType<T>) {
      transpose((const T*)v.data + offset, stride, count, elements, p[0] + at, kGroup);
    } else if (step == 1) {
      for (int64_t i = 0; i < elements; ++i) read_typed(v, offset + i * stride, 1, count, rows + i * count);
      transpose(rows, count, count, elements, p[0] + at, kGroup);
    } else {
      for (int64_t j = 0; j < count; ++j) read_typed(v, offset + j * step, stride, elements, p[j] + at);
    }
  });
  for (int64_t j = 0; j < count; ++j) fill(p[j] + n, T(0), kGroup - n);
}

template <class T>
void store_params(const Space& s, const View& v, int64_t step, int64_t count, const Tile& t, int64_t first, int64_t n,
                  const T (*p)[kGroup]) {
  alignas(64) T rows[kGroup * kMostParams];
  for_each_element_run(s, v, t, first, n, [&](int64_t offset, int64_t at, int64_t elements, int64_t stride) {
    if (step == 1 && v.dtype == kComputeType<T>) {
      transpose(p[0] + at, kGroup, elements, count, (T*)v.data + offset, stride);
    } else if (step == 1) {
      transpose(p[0] + at, kGroup, elements, count, rows, count);
      for (int64_t i = 0; i < elements; ++i) write_typed(v, offset + i * stride, 1, count, rows + i * count);
    } else {
      for (int64_t j = 0; j < count; ++j) write_typed(v, offset + j * step, stride, elements, p[j] + at);
    }
  });
}

}  // namespace pyflow::PYFLOW_ISA
