// Panels of Gram matrices, for the sums (hsic.cpp) and the gradients (hsic_backward.cpp): kRows rows of a tile at a
// time, of which the entries above the diagonal of the matrix count.
#pragma once

#include "../args/hsic.h"
#include "strips.h"
#include "sums.h"

namespace pyflow::PYFLOW_ISA {

// rows and columns of a tile; 0 rows if the block has no partner or the tile belongs to another part
PYFLOW_FN Tile gram_tile(const GramArgs& a, int64_t tile) {
  const Tournament& t = a.tournament;
  const Pairing p = pairing(t, a.round, tile);
  if (p.second >= t.blocks || (first_tile(t, a.round) + tile) % a.parts != a.part) return {0, 0, 0, 0};
  const int64_t row = p.first * t.block, col = p.second * t.block;
  return {row, smaller(t.block, t.n - row), col, smaller(t.block, t.n - col)};
}

// rows [row, row + rows) and columns [col, col + cols) of a Gram matrix; `stride` is the row stride of its buffer
struct Panel {
  int64_t row, rows, col, cols, stride;
};

// first column to compute: columns before it are on or below the diagonal in every row of the panel
template <class T>
PYFLOW_FN int64_t first_column(const Panel& p) {
  constexpr int half = kCols<T> / 2;
  return p.row > p.col ? (p.row - p.col) / half * half : 0;
}

// calls f(panel, its first row in the tile) for every panel of a tile
template <class F>
PYFLOW_FN void for_each_panel(const Tile& t, int64_t stride, F f) {
  for (int64_t i = 0; i < t.rows; i += kRows) {
    f(Panel{t.row + i, smaller(kRows, t.rows - i), t.col, t.cols, stride}, i);
  }
}

// zeroes the entries on or below the diagonal, and the padding of the columns to a multiple of kPad
template <class T>
PYFLOW_FN void clear_outside(const Panel& p, T* out) {
  const int64_t width = round_up(p.cols, kPad);
  for (int64_t r = 0; r < p.rows; ++r) {
    T* row = out + r * p.stride;
    for (int64_t c = 0; c < p.cols && p.col + c <= p.row + r; ++c) row[c] = T(0);
    for (int64_t c = p.cols; c < width; ++c) row[c] = T(0);
  }
}

// out[r][c] = f(out[r][c], r, c)
template <class T, class F>
PYFLOW_FN void for_each_value(const Panel& p, T* out, F f) {
  const int64_t first = first_column<T>(p);
  for (int64_t r = 0; r < p.rows; ++r) {
    T* __restrict row = out + r * p.stride;
#pragma omp simd
    for (int64_t c = first; c < p.cols; ++c) {
      row[c] = f(row[c], r, c);
    }
  }
}

// multiplies out by factor elementwise, `times` times
template <class T>
PYFLOW_FN void multiply_panel(const Panel& p, const T* factor, int times, T* out) {
  const int64_t stride = p.stride;
  for (int i = 0; i < times; ++i) {
    for_each_value(p, out, [=](T x, int64_t r, int64_t c) { return x * factor[r * stride + c]; });
  }
}

// apart[m]: whether both sides of the tile have rows above kApart, whose packed values are too inaccurate
void find_apart(const GramArgs&, int64_t slot, const Tile&, double* apart);

// a panel of variable m's Gram matrix minus its shift, zero on or below the diagonal; `apart`: see find_apart
void gram_panel(const GramArgs&, int64_t m, int64_t slot, const Panel&, bool apart, float* out);
void gram_panel(const GramArgs&, int64_t m, int64_t slot, const Panel&, bool apart, double* out);

// a panel of the dot products of variable m's rows
void product_panel(const GramArgs&, int64_t m, int64_t slot, const Panel&, float* out);
void product_panel(const GramArgs&, int64_t m, int64_t slot, const Panel&, double* out);

}  // namespace pyflow::PYFLOW_ISA
