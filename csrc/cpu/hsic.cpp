// Row sums of Gram matrices and sums of the products of pairs of them (HSIC, CKA), without an n x n matrix. A unit is
// one tile of one batch item. Tiles of a round share no rows. Gradients: hsic_backward.cpp.
#include "gram.h"

namespace pyflow::PYFLOW_ISA {
namespace {

// adds x[i] * y[i] to sixteen sums, one per lane; n is a multiple of 16
template <class T>
void add_products(const T* __restrict x, const T* __restrict y, double* __restrict sums, int64_t n) {
  double lane[16];
  for (int j = 0; j < 16; ++j) lane[j] = sums[j];
  for (int64_t i = 0; i < n; i += 16) {
#pragma omp simd
    for (int j = 0; j < 16; ++j) {
      lane[j] = fma_(double(x[i + j]), double(y[i + j]), lane[j]);
    }
  }
  for (int j = 0; j < 16; ++j) sums[j] = lane[j];
}

template <class T>
void sums_tile(const GramSums& a, int64_t slot, int64_t tile) {
  const Tile t = gram_tile(a, tile);
  if (t.rows == 0) return;
  const int64_t block = a.tournament.block, width = round_up(t.cols, kPad);
  T* values = (T*)a.scratch;  // (variables, kPanel, block)
  double* column = (double*)(values + a.variables * kPanel * block);
  double* lanes = column + a.variables * block;
  double* apart = lanes + 16 * a.pairs;
  fill(column, 0.0, a.variables * block + 16 * a.pairs);
  find_apart(a, slot, t, apart);
  double* rows = a.rows + (a.item + slot) * a.variables * a.tournament.n;
  for_each_panel(t, block, [&](const Panel& p, int64_t) {
    for (int64_t m = 0; m < a.variables; ++m) {
      T* panel = values + m * kPanel * block;
      gram_panel(a, m, slot, p, apart[m] != 0, panel);
      for (int64_t r = 0; r < p.rows; ++r) {
        rows[m * a.tournament.n + p.row + r] += add_row(panel + r * block, column + m * block, width);
      }
    }
    for (int64_t k = 0; k < a.pairs; ++k) {
      const T *x = values + a.pair[2 * k] * kPanel * block, *y = values + a.pair[2 * k + 1] * kPanel * block;
      for (int64_t r = 0; r < p.rows; ++r) add_products(x + r * block, y + r * block, lanes + 16 * k, width);
    }
  });
  for (int64_t m = 0; m < a.variables; ++m) {
    for (int64_t c = 0; c < t.cols; ++c) rows[m * a.tournament.n + t.col + c] += column[m * block + c];
  }
  const int64_t at = first_tile(a.tournament, a.round) + tile, all = first_tile(a.tournament, a.tournament.seats);
  double* cross = a.cross + (slot * all + at) * a.pairs;
  // times 2: (i, j) and (j, i)
  for (int64_t k = 0; k < a.pairs; ++k) cross[k] = 2 * lane_sum(lanes + 16 * k, 16);
}

// twice the sum over i < j of x[i][j] y[p[i]][p[j]]
template <class T>
double permuted_sum(const PermutedArgs& a, const int32_t* __restrict p) {
  double total = 0;
  for (int64_t i = 0; i < a.n; ++i) {
    const T* __restrict x = (const T*)a.x + i * a.n;
    const T* __restrict y = (const T*)a.y + p[i] * a.n;
    total += sum_lanes(i + 1, a.n, [&](double lane, int64_t j) { return fma_(double(x[j]), double(y[p[j]]), lane); });
  }
  return 2 * total;
}

}  // namespace

void gram_sums(const GramSums& a, int64_t begin, int64_t end) {
  const int64_t tiles = tiles_of(a.tournament, a.round);
  for (int64_t u = begin; u < end; ++u) {
    a.f64 ? sums_tile<double>(a, u / tiles, u % tiles) : sums_tile<float>(a, u / tiles, u % tiles);
  }
}

void gram_permuted(const PermutedArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const int32_t* p = a.permutations + r * a.n;
    a.out[r] = a.f64 ? permuted_sum<double>(a, p) : permuted_sum<float>(a, p);
  }
}

}  // namespace pyflow::PYFLOW_ISA
