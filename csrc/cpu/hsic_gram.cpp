// Panels of Gram matrices: raw sums over the features from packed strips, or from the original rows where packed values
// are too inaccurate, then the kernel function.
#include "gram.h"

namespace pyflow::PYFLOW_ISA {
namespace {

// out[r][c]: raw sum over the features of column r of strip `a` and column c of `strip`, both (dim, kCols)
template <RawSum R, int Rows, int Cols, class T>
void raw_tile(const T* __restrict a, const T* __restrict strip, int64_t dim, T* __restrict out, int64_t out_stride) {
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

template <RawSum R, int Cols, class T>
void raw_strip(const Panel& p, const T* rows, const T* strip, int64_t dim, T* out) {
  if (p.rows == kRows) return raw_tile<R, kRows, Cols>(rows, strip, dim, out, p.stride);
  for (int64_t r = 0; r < p.rows; ++r) raw_tile<R, 1, Cols>(rows + r, strip, dim, out + r * p.stride, p.stride);
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

template <class T>
bool any_above(const T* value, int64_t n, T bound) {
  int64_t above = 0;
#pragma omp simd reduction(+ : above)
  for (int64_t i = 0; i < n; ++i) above += value[i] > bound;
  return above > 0;
}

template <class T>
void find_apart_as(const GramArgs& a, int64_t slot, const Tile& t, double* apart) {
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
      out[r * p.stride + c] = fold<16>(lane);
    }
  }
}

template <class T>
void gram_panel_as(const GramArgs& a, int64_t m, int64_t slot, const Panel& p, bool apart, T* out) {
  const GramVariable& v = a.variable[m];
  const T shift = T(a.shift[(a.item + slot) * a.variables + m]);
  if (apart) {
    const bool square = v.kernel == GramKernel::rbf;
    square ? apart_panel<true>(a, m, slot, p, out) : apart_panel<false>(a, m, slot, p, out);
    const T factor = square ? T(-0.5) : T(-1);
    for_each_value(p, out, [=](T x, int64_t, int64_t) { return exp_less(factor * x, shift); });
    return clear_outside(p, out);
  }
  switch (raw_sum(v.kernel, v.dim)) {
    case RawSum::product: {
      raw_panel<RawSum::product>(a, v, slot, p, out);
      if (v.kernel == GramKernel::rbf) {
        const T* __restrict halves = (const T*)a.halves + (slot * a.variables + m) * a.padded;
        const T *rows = halves + p.row, *cols = halves + p.col;
        for_each_value(p, out, [=](T x, int64_t r, int64_t c) { return rbf_of_product(x, rows[r] + cols[c], shift); });
        break;
      }
      if (v.degree != 1) {
        T once[kPanel * kBlock];
        for (int64_t i = 0; i < (p.rows - 1) * p.stride + p.cols; ++i) once[i] = out[i];
        multiply_panel(p, once, v.degree - 1, out);
      }
      if (shift != T(0)) for_each_value(p, out, [=](T x, int64_t, int64_t) { return x - shift; });
      break;
    }
    case RawSum::square:
      raw_panel<RawSum::square>(a, v, slot, p, out);
      for_each_value(p, out, [=](T x, int64_t, int64_t) { return exp_less(T(-0.5) * x, shift); });
      break;
    case RawSum::distance:
      raw_panel<RawSum::distance>(a, v, slot, p, out);
      for_each_value(p, out, [=](T x, int64_t, int64_t) { return exp_less(-x, shift); });
      break;
    case RawSum::mismatch:
      raw_panel<RawSum::mismatch>(a, v, slot, p, out);
      for_each_value(p, out, [=](T x, int64_t, int64_t) { return T(x == T(0)); });
      break;
    case RawSum::none: {
      const int64_t stride = v.dim;
      const T* matrix = (const T*)v.z + ((a.item + slot) * a.tournament.n + p.row) * stride + p.col;
      for_each_value(p, out, [=](T, int64_t r, int64_t c) { return matrix[r * stride + c]; });
      break;
    }
  }
  clear_outside(p, out);
}

}  // namespace

void find_apart(const GramArgs& a, int64_t slot, const Tile& t, double* apart) {
  a.f64 ? find_apart_as<double>(a, slot, t, apart) : find_apart_as<float>(a, slot, t, apart);
}

void gram_panel(const GramArgs& a, int64_t m, int64_t slot, const Panel& p, bool apart, float* out) {
  gram_panel_as(a, m, slot, p, apart, out);
}

void gram_panel(const GramArgs& a, int64_t m, int64_t slot, const Panel& p, bool apart, double* out) {
  gram_panel_as(a, m, slot, p, apart, out);
}

void product_panel(const GramArgs& a, int64_t m, int64_t slot, const Panel& p, float* out) {
  raw_panel<RawSum::product>(a, a.variable[m], slot, p, out);
}

void product_panel(const GramArgs& a, int64_t m, int64_t slot, const Panel& p, double* out) {
  raw_panel<RawSum::product>(a, a.variable[m], slot, p, out);
}

}  // namespace pyflow::PYFLOW_ISA
