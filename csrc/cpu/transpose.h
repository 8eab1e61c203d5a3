// The parameters of some elements, from strided memory of any dtype to rows of a group: one row per parameter, one
// column per element; and back.
#pragma once

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
template <class T>
using Four __attribute__((vector_size(4 * sizeof(T)))) = T;

// a 4 x 4 matrix: to[i * to_step + j] = from[j * from_step + i]. Registers of four, because gcc does not vectorise such
// loops: 4.4 ns for 23 parameters of an element against 12 (one core of a Xeon with AVX-512).
template <class T>
PYFLOW_FN void transpose_4x4(const T* from, int64_t from_step, T* to, int64_t to_step) {
  Four<T> a, b, c, d;
  __builtin_memcpy(&a, from, sizeof a);
  __builtin_memcpy(&b, from + from_step, sizeof b);
  __builtin_memcpy(&c, from + 2 * from_step, sizeof c);
  __builtin_memcpy(&d, from + 3 * from_step, sizeof d);
  const Four<T> ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Four<T> AB = __builtin_shufflevector(a, b, 2, 6, 3, 7), CD = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  a = __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
  b = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
  c = __builtin_shufflevector(AB, CD, 0, 1, 4, 5);
  d = __builtin_shufflevector(AB, CD, 2, 3, 6, 7);
  __builtin_memcpy(to, &a, sizeof a);
  __builtin_memcpy(to + to_step, &b, sizeof b);
  __builtin_memcpy(to + 2 * to_step, &c, sizeof c);
  __builtin_memcpy(to + 3 * to_step, &d, sizeof d);
}
#endif

// to[i * to_step + j] = from[j * from_step + i] for i < rows, j < cols
template <class T>
void transpose(const T* from, int64_t from_step, int64_t rows, int64_t cols, T* to, int64_t to_step) {
  int64_t j = 0;
#if defined(PYFLOW_SHUFFLE)
  for (; rows >= 4 && j + 4 <= cols; j += 4) {
    // the last block overlaps the one before it
    for (int64_t i = 0; i < rows; i += 4) {
      const int64_t k = smaller(i, rows - 4);
      transpose_4x4(from + j * from_step + k, from_step, to + k * to_step + j, to_step);
    }
  }
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
