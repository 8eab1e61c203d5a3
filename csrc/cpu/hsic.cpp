// Row sums of Gram matrices, sums of the products of pairs of them, and the gradients (HSIC, CKA), without an n x n
// matrix. A unit is one tile of one batch item, computed in panels of kRows rows. Tiles of a round share no rows.
#include "../args/hsic.h"

#include "strips.h"
#include "sums.h"

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

// out[r][c]: raw sum over the features of column r of strip `a` and column c of `strip`, both (dim, kCols)
template <RawSum R, int Rows, int Cols, class T>
void raw_block(const T* __restrict a, const T* __restrict strip, int64_t dim, T* __restrict out, int64_t out_stride) {
  T sum[Rows][Cols] = {};
  for (int64_t k = 0; k < dim; ++k) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const T value = a[k * kCols<T> + r];
#pragma omp simd
      for (int c = 0; c < Cols; ++c) {
        sum[r][c] = accumulate<R>(sum[r][c], value, strip[k * kCols<T> + c]);
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int c = 0; c < Cols; ++c) out[r * out_stride + c] = sum[r][c];
  }
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

template <RawSum R, int Cols, class T>
void raw_strip(const Panel& p, const T* rows, const T* strip, int64_t dim, T* out) {
  if (p.rows == kRows) return raw_block<R, kRows, Cols>(rows, strip, dim, out, p.stride);
  for (int64_t r = 0; r < p.rows; ++r) raw_block<R, 1, Cols>(rows + r, strip, dim, out + r * p.stride, p.stride);
}

template <RawSum R, class T>
void raw_panel(const GramArgs& a, const GramVariable& v, int64_t slot, const Panel& p, T* out) {
  const T* strips = (const T*)a.workspace + slot * a.workspace_size + v.strips;
  const T* rows = strips + p.row / kCols<T> * kCols<T> * v.dim + p.row % kCols<T>;
  int64_t c = first_column<T>(p);
  if (c % kCols<T> != 0 && c < p.cols) {
    constexpr int half = kCols<T> / 2;
    raw_strip<R, half>(p, rows, strips + (p.col + c - half) * v.dim + half, v.dim, out + c);
    c += half;
  }
  for (; c < p.cols; c += kCols<T>) raw_strip<R, kCols<T>>(p, rows, strips + (p.col + c) * v.dim, v.dim, out + c);
}

// zeroes the entries on or below the diagonal, and the padding of the columns to a multiple of kPad
template <class T>
void clear_outside(const Panel& p, T* out) {
  const int64_t width = (p.cols + kPad - 1) / kPad * kPad;
  for (int64_t r = 0; r < p.rows; ++r) {
    T* row = out + r * p.stride;
    for (int64_t c = 0; c < p.cols && p.col + c <= p.row + r; ++c) row[c] = T(0);
    for (int64_t c = p.cols; c < width; ++c) row[c] = T(0);
  }
}

// out[r][c] = f(out[r][c], r, c)
template <class T, class F>
PYFLOW_FN void each_value(const Panel& p, T* out, F f) {
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
void multiply_panel(const Panel& p, const T* factor, int times, T* out) {
  const int64_t stride = p.stride;
  for (int i = 0; i < times; ++i) {
    each_value(p, out, [=](T x, int64_t r, int64_t c) { return x * factor[r * stride + c]; });
  }
}

template <class T>
bool any_above(const T* value, int64_t n, T bound) {
  int64_t above = 0;
#pragma omp simd reduction(+ : above)
  for (int64_t i = 0; i < n; ++i) above += value[i] > bound;
  return above > 0;
}

// apart[m]: whether both sides of the tile have rows above kApart, whose packed values are too inaccurate
template <class T>
void find_apart(const GramArgs& a, int64_t slot, const Tile& t, double* apart) {
  for (int64_t m = 0; m < a.variables; ++m) {
    const T* halves = (const T*)a.halves + (slot * a.variables + m) * a.padded;
    apart[m] = of_distances(a.variable[m].kernel) && any_above(halves + t.row, t.rows, T(kApart<T>)) &&
               any_above(halves + t.col, t.cols, T(kApart<T>));
  }
}

// sums of squared or absolute differences of the original rows, times the scale, in sixteen lanes
template <bool Square, class T>
void apart_panel(const GramArgs& a, int64_t m, int64_t slot, const Panel& p, T* out) {
  const GramVariable& v = a.variable[m];
  const int64_t item = a.item + slot;
  const T scale = ((const T*)a.scale)[item * a.variables + m];
  const T* z = (const T*)v.z + item * a.tournament.n * v.dim;
  for (int64_t r = 0; r < p.rows; ++r) {
    const T* __restrict x = z + (p.row + r) * v.dim;
    for (int64_t c = first_column<T>(p); c < p.cols; ++c) {
      const T* __restrict y = z + (p.col + c) * v.dim;
      T lane[16] = {};
      const auto add = [&](int64_t k, int j) {
        const T more = (x[k] - y[k]) * scale;
        lane[j] = Square ? fma_(more, more, lane[j]) : lane[j] + abs_(more);
      };
      int64_t k = 0;
      for (; k + 16 <= v.dim; k += 16) {
#pragma omp simd
        for (int j = 0; j < 16; ++j) add(k + j, j);
      }
      for (int j = 0; k + j < v.dim; ++j) add(k + j, j);
      for (int width = 8; width > 0; width /= 2) {
        for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
      }
      out[r * p.stride + c] = lane[0];
    }
  }
}

// a panel of the variable's Gram matrix minus its shift, zero on or below the diagonal; `apart`: see find_apart
template <class T>
void gram_panel(const GramArgs& a, int64_t m, int64_t slot, const Panel& p, bool apart, T* out) {
  const GramVariable& v = a.variable[m];
  const T shift = T(a.shift[(a.item + slot) * a.variables + m]);
  if (apart) {
    const bool square = v.kernel == GramKernel::rbf;
    square ? apart_panel<true>(a, m, slot, p, out) : apart_panel<false>(a, m, slot, p, out);
    const T factor = square ? T(-0.5) : T(-1);
    each_value(p, out, [=](T x, int64_t, int64_t) { return exp_less(factor * x, shift); });
    return clear_outside(p, out);
  }
  switch (raw_sum(v.kernel, v.dim)) {
    case RawSum::product: {
      raw_panel<RawSum::product>(a, v, slot, p, out);
      if (v.kernel == GramKernel::rbf) {
        const T* __restrict halves = (const T*)a.halves + (slot * a.variables + m) * a.padded;
        const T *rows = halves + p.row, *cols = halves + p.col;
        each_value(p, out, [=](T x, int64_t r, int64_t c) { return rbf_of_product(x, rows[r] + cols[c], shift); });
      } else if (v.degree != 1) {
        T once[kPanel * kBlock];
        for (int64_t i = 0; i < (p.rows - 1) * p.stride + p.cols; ++i) once[i] = out[i];
        multiply_panel(p, once, v.degree - 1, out);
      }
      break;
    }
    case RawSum::square:
      raw_panel<RawSum::square>(a, v, slot, p, out);
      each_value(p, out, [=](T x, int64_t, int64_t) { return exp_less(T(-0.5) * x, shift); });
      break;
    case RawSum::distance:
      raw_panel<RawSum::distance>(a, v, slot, p, out);
      each_value(p, out, [=](T x, int64_t, int64_t) { return exp_less(-x, shift); });
      break;
    case RawSum::mismatch:
      raw_panel<RawSum::mismatch>(a, v, slot, p, out);
      each_value(p, out, [=](T x, int64_t, int64_t) { return T(x == T(0)); });
      break;
    case RawSum::none: {
      const int64_t stride = v.dim;
      const T* matrix = (const T*)v.z + ((a.item + slot) * a.tournament.n + p.row) * stride + p.col;
      each_value(p, out, [=](T, int64_t r, int64_t c) { return matrix[r * stride + c]; });
      break;
    }
  }
  clear_outside(p, out);
}

// rows and columns of a tile; 0 rows for a bye or a tile of another part
PYFLOW_FN Tile gram_tile(const GramArgs& a, int64_t tile) {
  const Tournament& t = a.tournament;
  const Pairing p = pairing(t, a.round, tile);
  if (p.second >= t.blocks || (first_tile(t, a.round) + tile) % a.parts != a.part) return {0, 0, 0, 0};
  const int64_t row = p.first * t.block, col = p.second * t.block;
  return {row, smaller(t.block, t.n - row), col, smaller(t.block, t.n - col)};
}

template <class T>
void sums_tile(const GramSums& a, int64_t slot, int64_t tile) {
  const Tile t = gram_tile(a, tile);
  if (t.rows == 0) return;
  const int64_t block = a.tournament.block, width = (t.cols + kPad - 1) / kPad * kPad;
  T* values = (T*)a.scratch;  // (variables, kPanel, block)
  double* column = (double*)(values + a.variables * kPanel * block);
  double* lanes = column + a.variables * block;
  double* apart = lanes + 16 * a.pairs;
  for (int64_t i = 0; i < a.variables * block + 16 * a.pairs; ++i) column[i] = 0;
  find_apart<T>(a, slot, t, apart);
  double* rows = a.rows + (a.item + slot) * a.variables * a.tournament.n;
  for (int64_t i = 0; i < t.rows; i += kRows) {
    const Panel p{t.row + i, smaller(kRows, t.rows - i), t.col, t.cols, block};
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
  }
  for (int64_t m = 0; m < a.variables; ++m) {
    for (int64_t c = 0; c < t.cols; ++c) rows[m * a.tournament.n + t.col + c] += column[m * block + c];
  }
  const int64_t at = first_tile(a.tournament, a.round) + tile, all = first_tile(a.tournament, a.tournament.seats);
  double* cross = a.cross + (slot * all + at) * a.pairs;
  // times 2: (i, j) and (j, i)
  for (int64_t k = 0; k < a.pairs; ++k) cross[k] = 2 * lane_sum(lanes + 16 * k, 16);
}

// dL/dK of one variable in a panel, times the derivative of its kernel; zero on or below the diagonal. `values` (a tile
// per variable) and `out` point to the panel's first row; `raw` is a buffer for one panel.
template <class T>
void weight_panel(const GramBackward& a, int64_t m, int64_t slot, const Panel& p, const T* values, T* raw, T* out) {
  const int64_t item = a.item + slot, tile = p.stride * p.stride, stride = p.stride;
  const GramVariable& v = a.variable[m];
  const double* __restrict grad = a.grad_rows + (item * a.variables + m) * a.tournament.n;
  const double *rows = grad + p.row, *cols = grad + p.col;
  each_value(p, out, [=](T, int64_t r, int64_t c) { return T(rows[r] + cols[c]); });
  for (int64_t k = 0; k < 2 * a.pairs; ++k) {
    if (a.pair[k] != m) continue;
    const T twice = T(2 * a.grad_cross[item * a.pairs + k / 2]);
    const T* other = values + a.pair[k ^ 1] * tile;
    each_value(p, out, [=](T w, int64_t r, int64_t c) { return fma_(twice, other[r * stride + c], w); });
  }
  if (of_distances(v.kernel)) {
    const T shift = T(a.shift[item * a.variables + m]);
    const T* own = values + m * tile;
    each_value(p, out, [=](T w, int64_t r, int64_t c) { return w * (own[r * stride + c] + shift); });
  } else if (v.kernel == GramKernel::polynomial && v.degree != 1) {
    const T degree = T(v.degree);
    raw_panel<RawSum::product>(a, v, slot, p, raw);
    each_value(p, out, [=](T w, int64_t, int64_t) { return w * degree; });
    multiply_panel(p, raw, v.degree - 1, out);
  }
  clear_outside(p, out);
}

// adds another row z, weighted by w, to a gradient: w z for a product, -w sign(own - z) for |own - z|
template <RawSum R, class T>
PYFLOW_FN T spread(T sum, T w, T z, T own) {
  if constexpr (R == RawSum::product) return fma_(w, z, sum);
  return own > z ? sum - w : own < z ? sum + w : sum;
}

// out[r][c] += sum over k < count of w[r * row_step + k * step] z[k][c] (product; else by `spread`). The two steps
// select the weights or their transpose.
template <RawSum R, int Rows, int Cols, class T>
void spread_block(const T* __restrict w, int64_t row_step, int64_t step, int64_t count, const T* __restrict z,
                  int64_t width, const T* __restrict own, T* __restrict out) {
  T sum[Rows][Cols], mine[Rows][Cols];
  for (int r = 0; r < Rows; ++r) {
    for (int c = 0; c < Cols; ++c) {
      sum[r][c] = out[r * width + c];
      mine[r][c] = R == RawSum::product ? T(0) : own[r * width + c];
    }
  }
  for (int64_t k = 0; k < count; ++k) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const T weight = w[r * row_step + k * step];
#pragma omp simd
      for (int c = 0; c < Cols; ++c) {
        sum[r][c] = spread<R>(sum[r][c], weight, z[k * width + c], mine[r][c]);
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int c = 0; c < Cols; ++c) out[r * width + c] = sum[r][c];
  }
}

template <RawSum R, int Cols, class T>
void spread_columns(const T* w, int64_t row_step, int64_t step, int64_t count, const T* z, int64_t width, const T* own,
                    T* out, int64_t rows) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    spread_block<R, kRows, Cols>(w + r * row_step, row_step, step, count, z, width, own + r * width, out + r * width);
  }
  for (; r < rows; ++r) {
    spread_block<R, 1, Cols>(w + r * row_step, row_step, step, count, z, width, own + r * width, out + r * width);
  }
}

// adds `count` weighted rows of z to each of `rows` gradient rows, in blocks of kRows x kCols
template <RawSum R, class T>
void spread_rows(const T* w, int64_t row_step, int64_t step, int64_t count, const T* z, int64_t width, const T* own,
                 T* out, int64_t rows) {
  int64_t c = 0;
  for (; c + kCols<T> <= width; c += kCols<T>) {
    spread_columns<R, kCols<T>>(w, row_step, step, count, z + c, width, own + c, out + c, rows);
  }
  for (; c < width; c += 8) spread_columns<R, 8>(w, row_step, step, count, z + c, width, own + c, out + c, rows);
}

// spread_rows with differences of the original rows. With packed rows, weighted sums would cancel (rbf), and the signs
// of differences would be rounding errors (laplacian).
template <bool Square, class T>
void spread_apart(const GramBackward& a, int64_t m, int64_t slot, const Tile& t, const T* weights) {
  const GramVariable& v = a.variable[m];
  const int64_t item = a.item + slot, block = a.tournament.block;
  const T scale = ((const T*)a.scale)[item * a.variables + m];
  const T* z = (const T*)v.z + item * a.tournament.n * v.dim;
  T* grad = (T*)a.grad_workspace + slot * a.workspace_size + v.rows;
  for (int64_t r = 0; r < t.rows; ++r) {
    const T* __restrict x = z + (t.row + r) * v.dim;
    for (int64_t c = 0; c < t.cols; ++c) {
      const T weight = Square ? weights[r * block + c] * scale : weights[r * block + c];
      if (weight == T(0)) continue;
      const T* __restrict y = z + (t.col + c) * v.dim;
      T* __restrict of_x = grad + (t.row + r) * v.width;
      T* __restrict of_y = grad + (t.col + c) * v.width;
#pragma omp simd
      for (int64_t k = 0; k < v.dim; ++k) {
        const T more = y[k] - x[k];
        const T step = Square ? weight * more : more > T(0) ? weight : more < T(0) ? -weight : T(0);
        of_x[k] += step;
        of_y[k] -= step;
      }
    }
  }
}

template <class T>
void backward_tile(const GramBackward& a, int64_t slot, int64_t tile) {
  const Tile t = gram_tile(a, tile);
  if (t.rows == 0) return;
  const int64_t n = a.tournament.n, block = a.tournament.block, width = (t.cols + kPad - 1) / kPad * kPad;
  T* values = (T*)a.scratch;  // (variables, block, block)
  T* weights = values + a.variables * block * block;
  T* raw = weights + block * block;  // (kPanel, block)
  double* column = (double*)(raw + kPanel * block);
  double* apart = column + a.variables * block + 16 * a.pairs;
  find_apart<T>(a, slot, t, apart);
  for (int64_t i = 0; i < t.rows; i += kRows) {
    const Panel p{t.row + i, smaller(kRows, t.rows - i), t.col, t.cols, block};
    for (int64_t m = 0; m < a.variables; ++m) {
      gram_panel(a, m, slot, p, apart[m] != 0, values + (m * block + i) * block);
    }
  }
  for (int64_t m = 0; m < a.variables; ++m) {
    const GramVariable& v = a.variable[m];
    if (v.kernel == GramKernel::delta) continue;
    for (int64_t i = 0; i < t.rows; i += kRows) {
      const Panel p{t.row + i, smaller(kRows, t.rows - i), t.col, t.cols, block};
      weight_panel(a, m, slot, p, values + i * block, raw, weights + i * block);
    }
    if (v.kernel == GramKernel::precomputed) {
      // entries (i, j) and (j, i): each gets the gradient of its own row sum, and both get `other`
      T* grad = (T*)v.grad + (a.item + slot) * n * n;
      const double* rows = a.grad_rows + ((a.item + slot) * a.variables + m) * n;
      for (int64_t i = t.row; i < t.row + t.rows; ++i) {
        for (int64_t j = t.col > i ? t.col : i + 1; j < t.col + t.cols; ++j) {
          const T other = T(0.5) * (weights[(i - t.row) * block + j - t.col] - T(rows[i] + rows[j]));
          grad[i * n + j] = T(rows[i]) + other;
          grad[j * n + i] = T(rows[j]) + other;
        }
      }
      continue;
    }
    if (apart[m] != 0) {
      const bool square = v.kernel == GramKernel::rbf;
      square ? spread_apart<true>(a, m, slot, t, weights) : spread_apart<false>(a, m, slot, t, weights);
      continue;
    }
    if (v.kernel == GramKernel::rbf) {
      double* sums = a.weight_sums + (slot * a.variables + m) * a.padded;
      for (int64_t c = 0; c < width; ++c) column[c] = 0;
      for (int64_t r = 0; r < t.rows; ++r) sums[t.row + r] += add_row(weights + r * block, column, width);
      for (int64_t c = 0; c < t.cols; ++c) sums[t.col + c] += column[c];
    }
    const T* z = (const T*)a.workspace + slot * a.workspace_size + v.rows;
    T* grad = (T*)a.grad_workspace + slot * a.workspace_size + v.rows;
    const T *zi = z + t.row * v.width, *zj = z + t.col * v.width;
    T *gi = grad + t.row * v.width, *gj = grad + t.col * v.width;
    if (v.kernel == GramKernel::laplacian) {
      spread_rows<RawSum::distance>(weights, block, 1, t.cols, zj, v.width, zi, gi, t.rows);
      spread_rows<RawSum::distance>(weights, 1, block, t.rows, zi, v.width, zj, gj, t.cols);
    } else {
      spread_rows<RawSum::product>(weights, block, 1, t.cols, zj, v.width, zi, gi, t.rows);
      spread_rows<RawSum::product>(weights, 1, block, t.rows, zi, v.width, zj, gj, t.cols);
    }
  }
}

// a unit is a row of a batch item
template <class T>
void finish_row(const GramBackward& a, int64_t slot, int64_t row) {
  const int64_t n = a.tournament.n;
  for (int64_t m = 0; m < a.variables; ++m) {
    const GramVariable& v = a.variable[m];
    if (v.width == 0 || v.kernel == GramKernel::delta) continue;
    const int64_t at = slot * a.workspace_size + v.rows + row * v.width;
    const T *z = (const T*)a.workspace + at, *sum = (const T*)a.grad_workspace + at;
    // rbf: sum_j w_j (z_j - z_i) = sum_j w_j z_j - z_i sum_j w_j
    const bool rbf = v.kernel == GramKernel::rbf;
    const T own = rbf ? T(a.weight_sums[(slot * a.variables + m) * a.padded + row]) : T(0);
    T* grad = (T*)v.grad + ((a.item + slot) * n + row) * v.dim;
    const T scale = of_distances(v.kernel) ? ((const T*)a.scale)[(a.item + slot) * a.variables + m] : T(1);
    for (int64_t k = 0; k < v.dim; ++k) grad[k] = scale * fma_(-own, z[k], sum[k]);
  }
}

// twice the sum over i < j of x[i][j] y[p[i]][p[j]]
template <class T>
double permuted_sum(const PermutedArgs& a, const int32_t* __restrict p) {
  double total = 0;
  for (int64_t i = 0; i < a.n; ++i) {
    const T* __restrict x = (const T*)a.x + i * a.n;
    const T* __restrict y = (const T*)a.y + p[i] * a.n;
    double lane[16] = {};
    int64_t j = i + 1;
    for (; j + 16 <= a.n; j += 16) {
      for (int k = 0; k < 16; ++k) lane[k] = fma_(double(x[j + k]), double(y[p[j + k]]), lane[k]);
    }
    for (int k = 0; j + k < a.n; ++k) lane[k] = fma_(double(x[j + k]), double(y[p[j + k]]), lane[k]);
    total += lane_sum(lane, 16);
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

void gram_backward(const GramBackward& a, int64_t begin, int64_t end) {
  const int64_t tiles = tiles_of(a.tournament, a.round);
  for (int64_t u = begin; u < end; ++u) {
    a.f64 ? backward_tile<double>(a, u / tiles, u % tiles) : backward_tile<float>(a, u / tiles, u % tiles);
  }
}

void gram_finish(const GramBackward& a, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) {
    const int64_t slot = u / a.tournament.n, row = u % a.tournament.n;
    a.f64 ? finish_row<double>(a, slot, row) : finish_row<float>(a, slot, row);
  }
}

void gram_permuted(const PermutedArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const int32_t* p = a.permutations + r * a.n;
    a.out[r] = a.f64 ? permuted_sum<double>(a, p) : permuted_sum<float>(a, p);
  }
}

}  // namespace pyflow::PYFLOW_ISA
