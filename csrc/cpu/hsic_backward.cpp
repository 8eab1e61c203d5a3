// Gradients of the sums of hsic.cpp. A unit is one tile of one batch item: the gradients of its entries are spread over
// the rows and columns of the tile. Tiles of a round share no rows.
#include "gram.h"

namespace pyflow::PYFLOW_ISA {
namespace {

// dL/dK of one variable in a panel, times the derivative of its kernel; zero on or below the diagonal. `values` (a tile
// per variable) and `out` point to the panel's first row; `raw` is a buffer for one panel.
template <class T>
void weight_panel(const GramBackward& a, int64_t m, int64_t slot, const Panel& p, const T* values, T* raw, T* out) {
  const int64_t item = a.item + slot, tile = p.stride * p.stride, stride = p.stride;
  const GramVariable& v = a.variable[m];
  const double* __restrict grad = a.grad_rows + (item * a.variables + m) * a.tournament.n;
  const double *rows = grad + p.row, *cols = grad + p.col;
  for_each_value(p, out, [=](T, int64_t r, int64_t c) { return T(rows[r] + cols[c]); });
  for (int64_t k = 0; k < 2 * a.pairs; ++k) {
    if (a.pair[k] != m) continue;
    const T twice = T(2 * a.grad_cross[item * a.pairs + k / 2]);
    const T* other = values + a.pair[k ^ 1] * tile;
    for_each_value(p, out, [=](T w, int64_t r, int64_t c) { return fma_(twice, other[r * stride + c], w); });
  }
  if (of_distances(v.kernel)) {
    const T shift = T(a.shift[item * a.variables + m]);
    const T* own = values + m * tile;
    for_each_value(p, out, [=](T w, int64_t r, int64_t c) { return w * (own[r * stride + c] + shift); });
  } else if (v.kernel == GramKernel::polynomial && v.degree != 1) {
    const T degree = T(v.degree);
    product_panel(a, m, slot, p, raw);
    for_each_value(p, out, [=](T w, int64_t, int64_t) { return w * degree; });
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
void spread_tile(const T* __restrict w, int64_t row_step, int64_t step, int64_t count, const T* __restrict z,
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
    spread_tile<R, kRows, Cols>(w + r * row_step, row_step, step, count, z, width, own + r * width, out + r * width);
  }
  for (; r < rows; ++r) {
    spread_tile<R, 1, Cols>(w + r * row_step, row_step, step, count, z, width, own + r * width, out + r * width);
  }
}

// adds `count` weighted rows of z to each of `rows` gradient rows, in register tiles of kRows x kCols
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

// the gradient of a precomputed matrix: entries (i, j) and (j, i) each get the gradient of their own row sum, and both
// get `other`
template <class T>
void precomputed_gradient(const GramBackward& a, int64_t m, int64_t slot, const Tile& t, const T* weights) {
  const int64_t n = a.tournament.n, block = a.tournament.block;
  T* grad = (T*)a.variable[m].grad + (a.item + slot) * n * n;
  const double* rows = a.grad_rows + ((a.item + slot) * a.variables + m) * n;
  for (int64_t i = t.row; i < t.row + t.rows; ++i) {
    for (int64_t j = t.col > i ? t.col : i + 1; j < t.col + t.cols; ++j) {
      const T other = T(0.5) * (weights[(i - t.row) * block + j - t.col] - T(rows[i] + rows[j]));
      grad[i * n + j] = T(rows[i]) + other;
      grad[j * n + i] = T(rows[j]) + other;
    }
  }
}

// adds the weights of a tile to the weight sums of its rows and columns; `column` is a buffer for one row
template <class T>
void add_weights(const GramBackward& a, int64_t m, int64_t slot, const Tile& t, const T* weights, double* column) {
  const int64_t block = a.tournament.block, width = round_up(t.cols, kPad);
  double* sums = a.weight_sums + (slot * a.variables + m) * a.padded;
  fill(column, 0.0, width);
  for (int64_t r = 0; r < t.rows; ++r) sums[t.row + r] += add_row(weights + r * block, column, width);
  for (int64_t c = 0; c < t.cols; ++c) sums[t.col + c] += column[c];
}

// adds the weighted packed rows of the tile's columns to the gradients of its rows, and the other way round
template <RawSum R, class T>
void spread_packed(const GramBackward& a, int64_t m, int64_t slot, const Tile& t, const T* weights) {
  const GramVariable& v = a.variable[m];
  const int64_t at = slot * a.workspace_size + v.rows, block = a.tournament.block;
  const T *zi = (const T*)a.workspace + at + t.row * v.width, *zj = (const T*)a.workspace + at + t.col * v.width;
  T *gi = (T*)a.grad_workspace + at + t.row * v.width, *gj = (T*)a.grad_workspace + at + t.col * v.width;
  spread_rows<R>(weights, block, 1, t.cols, zj, v.width, zi, gi, t.rows);
  spread_rows<R>(weights, 1, block, t.rows, zi, v.width, zj, gj, t.cols);
}

template <class T>
void backward_tile(const GramBackward& a, int64_t slot, int64_t tile) {
  const Tile t = gram_tile(a, tile);
  if (t.rows == 0) return;
  const int64_t block = a.tournament.block;
  T* values = (T*)a.scratch;  // (variables, block, block)
  T* weights = values + a.variables * block * block;
  T* raw = weights + block * block;  // (kPanel, block)
  double* column = (double*)(raw + kPanel * block);
  double* apart = column + a.variables * block + 16 * a.pairs;
  find_apart(a, slot, t, apart);
  for_each_panel(t, block, [&](const Panel& p, int64_t i) {
    for (int64_t m = 0; m < a.variables; ++m) {
      gram_panel(a, m, slot, p, apart[m] != 0, values + (m * block + i) * block);
    }
  });
  for (int64_t m = 0; m < a.variables; ++m) {
    const GramKernel kernel = a.variable[m].kernel;
    if (kernel == GramKernel::delta) continue;
    for_each_panel(t, block, [&](const Panel& p, int64_t i) {
      weight_panel(a, m, slot, p, values + i * block, raw, weights + i * block);
    });
    const bool rbf = kernel == GramKernel::rbf;
    if (kernel == GramKernel::precomputed) {
      precomputed_gradient(a, m, slot, t, weights);
    } else if (apart[m] != 0) {
      rbf ? spread_apart<true>(a, m, slot, t, weights) : spread_apart<false>(a, m, slot, t, weights);
    } else {
      if (rbf) add_weights(a, m, slot, t, weights, column);
      kernel == GramKernel::laplacian ? spread_packed<RawSum::distance>(a, m, slot, t, weights)
                                      : spread_packed<RawSum::product>(a, m, slot, t, weights);
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

}  // namespace

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

}  // namespace pyflow::PYFLOW_ISA
