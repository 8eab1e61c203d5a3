// Matrix products of a tile: a register tile is kTall columns of the result by the rows of a block. Weights are read
// where they lie, in whatever order: the values of kTall rows or columns per step are broadcast. With AVX-512 eight of
// them reach 91 to 99 % of the rate of fused multiply-adds from 64 to 1000 columns (a core of a Zen 5). Terms are added
// in order, from the bias on.
#pragma once

#include "tile.h"

namespace pyflow::PYFLOW_ISA {

// W or its transpose: element (i, k) is weight[i * row + k * step]
template <class T>
struct Factor {
  const T* weight;
  int64_t row, step;
  const T* bias;      // null: 0
  bool adds = false;  // to the result, and not to the bias
  int64_t first = 0;  // the terms from here on are added before the others
};

// With AVX2 the sums of six columns take 12 of 16 registers and need fewer loads than those of four; four steps at once
// have one end of a loop. Programs take 10 to 35 % less time (two cores of a Zen 3).
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kTall = 6, kWritten = 4;
#else
constexpr int kTall = kRows, kWritten = 1;
#endif
// the next height of tiles of what is left
constexpr int shorter(int rows) { return rows == 6 ? 4 : rows / 2; }

constexpr int64_t kStepBytes = 4096;  // steps that are multiples of this meet in one set of the first-level cache
constexpr int64_t kPackedSteps = 1024;

// what the terms are added to
template <int Rows, class T>
PYFLOW_FN void start_tile(const Factor<T>& f, const T* __restrict out, T (&sum)[Rows][kWidth<T>]) {
  if (f.adds) {
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      for (int r = 0; r < kWidth<T>; ++r) sum[i][r] = out[i * kWidth<T> + r];
    }
    return;
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
    const T bias = f.bias ? f.bias[i] : T(0);
#pragma omp simd
    for (int r = 0; r < kWidth<T>; ++r) {
      sum[i][r] = bias;
    }
  }
}

// adds terms [begin, end)
template <int Rows, class T>
PYFLOW_FN void add_terms(const Factor<T>& f, const T* __restrict in, int64_t begin, int64_t end,
                         T (&sum)[Rows][kWidth<T>]) {
  const T* __restrict w = f.weight;
#pragma GCC unroll kWritten
  for (int64_t k = begin; k < end; ++k) {
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const T value = w[i * f.row + k * f.step];
#pragma omp simd
      for (int r = 0; r < kWidth<T>; ++r) {
        sum[i][r] = fma_(value, in[k * kWidth<T> + r], sum[i][r]);
      }
    }
  }
}

// `Turns`: with terms that are added before the others
template <int Rows, bool Relu, bool Turns, class T>
PYFLOW_FN void product_tile(const Factor<T>& f, const T* __restrict in, int64_t inputs, T* __restrict out) {
  T sum[Rows][kWidth<T>];
  start_tile<Rows>(f, out, sum);
  if constexpr (Turns) add_terms<Rows>(f, in, f.first, inputs, sum);
  add_terms<Rows>(f, in, 0, Turns ? f.first : inputs, sum);
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma omp simd
    for (int r = 0; r < kWidth<T>; ++r) {
      out[i * kWidth<T> + r] = Relu ? activate<Activation::relu>(sum[i][r], T(0)) : sum[i][r];
    }
  }
}

// columns [i, to.count) of the result, Rows at a time, then the rest
template <int Rows, bool Relu, bool Turns, class T>
void product_columns(Factor<T> f, const Columns<T>& from, const Columns<T>& to, int64_t blocks, int64_t i) {
  alignas(64) T packed[kPackedSteps * Rows];
  const bool pack = f.row == 1 && f.step * int64_t(sizeof(T)) % kStepBytes == 0 && from.count <= kPackedSteps;
  for (; i + Rows <= to.count; i += Rows) {
    Factor<T> part = f;
    part.weight += i * f.row;
    part.bias = f.bias ? f.bias + i : nullptr;
    if (pack) {
      for (int64_t k = 0; k < from.count; ++k) {
        for (int j = 0; j < Rows; ++j) packed[k * Rows + j] = part.weight[k * f.step + j];
      }
      part.weight = packed;
      part.row = 1;
      part.step = Rows;
    }
    for (int64_t b = 0; b < blocks; ++b) product_tile<Rows, Relu, Turns>(part, from.at(b, 0), from.count, to.at(b, i));
  }
  if constexpr (Rows > 1) product_columns<shorter(Rows), Relu, Turns>(f, from, to, blocks, i);
}

template <bool Relu, class T>
void product(const Factor<T>& f, const Columns<T>& from, const Columns<T>& to, int64_t blocks) {
  f.first > 0 ? product_columns<kTall, Relu, true>(f, from, to, blocks, 0)
              : product_columns<kTall, Relu, false>(f, from, to, blocks, 0);
}

// the array as one row of padded columns per row of the tile
template <class T>
void turn(const ProgramTile<T>& t, const Columns<T>& from, int64_t width) {
  for (int64_t b = 0; b < t.blocks; ++b) {
    T* to = t.turned + b * kWidth<T> * width;
    transpose(from.at(b, 0), kWidth<T>, kWidth<T>, from.count, to, width);
    for (int64_t r = 0; r < kWidth<T>; ++r) fill(to + r * width + from.count, T(0), width - from.count);
  }
}

// sums[i][c] = sum over the rows of left[i] * turned[c], for Rows x Cols of them; `add`: to what is there
template <int Rows, int Cols, class T>
PYFLOW_FN void outer_tile(const ProgramTile<T>& t, const Columns<T>& left, int64_t i, int64_t c, int64_t width,
                          bool add, T* __restrict sums) {
  T sum[Rows][Cols] = {};
  for (int64_t b = 0; b < t.blocks; ++b) {
    const T* __restrict l = left.at(b, i);
    const T* __restrict right = t.turned + b * kWidth<T> * width + c;
#pragma GCC unroll kWritten
    for (int64_t r = 0; r < kWidth<T>; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < Rows; ++j) {
        const T value = l[j * kWidth<T> + r];
#pragma omp simd
        for (int k = 0; k < Cols; ++k) {
          sum[j][k] = fma_(value, right[r * width + k], sum[j][k]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < Rows; ++j) {
    T* __restrict to = sums + (i + j) * width + c;
    for (int k = 0; k < Cols; ++k) to[k] = add ? to[k] + sum[j][k] : sum[j][k];
  }
}

template <int Rows, class T>
void outer_columns(const ProgramTile<T>& t, const Columns<T>& left, int64_t width, bool add, T* sums, int64_t i) {
  for (; i + Rows <= left.count; i += Rows) {
    int64_t c = 0;
    for (; c + kWidth<T> <= width; c += kWidth<T>) outer_tile<Rows, kWidth<T>>(t, left, i, c, width, add, sums);
    if (c < width) outer_tile<Rows, kProgramPad>(t, left, i, c, width, add, sums);
  }
  if constexpr (Rows > 1) outer_columns<shorter(Rows)>(t, left, width, add, sums, i);
}

// adds the gradient of W, and of b, of h = W in + b to the sums of the group
template <class T>
void add_weight_gradients(const ProgramTile<T>& t, const ProgramPart& d, const Columns<T>& in, const Columns<T>& gout) {
  if (!t.sums) return;
  const ProgramSum& s = t.back->sum[d.weight.place];
  turn(t, s.transposed ? gout : in, s.width);
  outer_columns<kTall>(t, s.transposed ? in : gout, s.width, t.adds || !s.written(), t.sums + s.offset, 0);
  add_lanes(t, d.bias, gout);
}

template <class T>
const T* matrix(const ProgramPart& d) {
  return (const T*)(d.mask.data ? d.masked : d.weight.data);
}

template <class T>
Factor<T> factor(const ProgramPart& d) {
  return {matrix<T>(d), d.inputs, 1, (const T*)d.bias.data};
}

// of the gradient of the inputs
template <class T>
Factor<T> transposed_factor(const ProgramPart& d) {
  return {matrix<T>(d), 1, d.inputs, nullptr};
}

}  // namespace pyflow::PYFLOW_ISA
