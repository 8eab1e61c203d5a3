// Spectral normalisation of many layers: power iteration, W / sigma, and the gradient. A unit is a run of whole rows of
// one layer; start and iterate have one unit per layer.
#include "../args/spectral.h"

#include "tile.h"

namespace pyflow::PYFLOW_ISA {
namespace {

// the layer of a unit, by binary search
SpectralLayer& layer_of(const SpectralArgs& a, int64_t unit) {
  int64_t low = 0, high = a.count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    a.layers[middle].first_unit <= unit ? low = middle : high = middle - 1;
  }
  return a.layers[low];
}

struct Rows {
  int64_t begin, end;
};

Rows rows_of(const SpectralLayer& l, int64_t unit) {
  const int64_t begin = unit * l.unit_rows, rest = l.space.rows - begin;
  return {begin, begin + smaller(rest, l.unit_rows)};
}

// sum of n <= kChunk products in 32 lanes, folded by lane_sum
template <class T>
T dot_chunk(const T* __restrict a, const T* __restrict b, int64_t n) {
  T lane[32] = {};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
#pragma omp simd
    for (int j = 0; j < 32; ++j) {
      lane[j] = fma_(a[i + j], b[i + j], lane[j]);
    }
  }
  for (int j = 0; i + j < n; ++j) lane[j] = fma_(a[i + j], b[i + j], lane[j]);
  return lane_sum(lane, 32);
}

double square_sum(const double* v, int64_t n) {
  double lane[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
#pragma omp simd
    for (int j = 0; j < 16; ++j) {
      lane[j] = fma_(v[i + j], v[i + j], lane[j]);
    }
  }
  for (int j = 0; i + j < n; ++j) lane[j] = fma_(v[i + j], v[i + j], lane[j]);
  return lane_sum(lane, 16);
}

// sum[i] += y w[i]
template <class T>
void add_row(const T* __restrict w, T y, T* __restrict sum, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    sum[i] = fma_(y, w[i], sum[i]);
  }
}

template <class T>
void add_four_rows(const T* __restrict a, const T* __restrict b, const T* __restrict c, const T* __restrict d,
                   const T* y, T* __restrict sum, int64_t n) {
  const T ya = y[0], yb = y[1], yc = y[2], yd = y[3];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    sum[i] = fma_(yd, d[i], fma_(yc, c[i], fma_(yb, b[i], fma_(ya, a[i], sum[i]))));
  }
}

// adds W' y of rows [r, r + n), n <= 4, to sum
template <class T>
void add_rows(const SpectralLayer& l, int64_t r, int64_t n, const T* y, T* sum) {
  alignas(64) T buffer[4][kChunk];
  for_each_chunk(0, l.space.cols, [&](int64_t c, int64_t width) {
    const T* w[4];
    for (int64_t i = 0; i < n; ++i) w[i] = load(l.space, l.w, {r + i, 1, c, width}, buffer[i]);
    if (n == 4) {
      add_four_rows(w[0], w[1], w[2], w[3], y, sum + c, width);
    } else {
      for (int64_t i = 0; i < n; ++i) add_row(w[i], y[i], sum + c, width);
    }
  });
}

// y = W v for the rows of a unit, and their partial sums of W' y while the rows are in the cache; a vector has y = 1
template <class T>
void product_unit(const SpectralArgs& a, const SpectralLayer& l, int64_t unit) {
  const bool vector = !l.v.data, products = a.n_iter > 0 || vector;
  const Rows rows = rows_of(l, unit);
  alignas(64) T buffer[kChunk];
  T* sum = (T*)l.sum + unit * l.space.cols;
  double* partial = l.partial + unit * l.space.cols;
  if (products) {
    for (int64_t c = 0; c < l.space.cols; ++c) partial[c] = 0, sum[c] = 0;
  }
  int64_t added = 0;
  for (int64_t r = rows.begin; r < rows.end; r += 4) {
    const int64_t n = smaller(rows.end - r, 4);
    T y[4];
    for (int64_t i = 0; i < n; ++i) {
      double total = vector ? 1.0 : -0.0;
      for_each_chunk(0, vector ? 0 : l.space.cols, [&](int64_t c, int64_t width) {
        total += double(dot_chunk(load(l.space, l.w, {r + i, 1, c, width}, buffer), (const T*)l.right + c, width));
      });
      l.y[r + i] = total;
      y[i] = T(total);
    }
    if (!products) continue;
    add_rows(l, r, n, y, sum);
    added += n;
    if (added < kSpectralRows && r + n < rows.end) continue;
    for (int64_t c = 0; c < l.space.cols; ++c) partial[c] += double(sum[c]), sum[c] = 0;
    added = 0;
  }
}

// Ends a round: sigma and the new u and v from the norms of W v and W' u; writes the results in the last round. If a
// norm vanishes, u and v stay unchanged and sigma is u' W v.
template <class T>
void iterate_layer(const SpectralArgs& a, SpectralLayer& l) {
  double* z = l.partial;
  T* right = (T*)l.right;
  const bool vector = !l.v.data;
  double sigma = 0;
  bool moves = false;
  if (a.n_iter > 0 || vector) {
    for (int64_t unit = 1; unit < l.units; ++unit) {
      const double* part = l.partial + unit * l.space.cols;
      for (int64_t c = 0; c < l.space.cols; ++c) z[c] += part[c];
    }
    const double left_norm = __builtin_sqrt(square_sum(l.y, l.space.rows));
    const double right_norm = __builtin_sqrt(square_sum(z, l.space.cols));
    moves = !vector && !spectral_vanishes(left_norm) && !spectral_vanishes(right_norm / left_norm);
    sigma = right_norm / left_norm;
    if (moves) {
      for (int64_t c = 0; c < l.space.cols; ++c) right[c] = T(z[c] / right_norm);
      for (int64_t r = 0; r < l.space.rows; ++r) l.y[r] /= left_norm;
    }
  }
  if (!a.last) return;
  if (!vector && !moves) {
    sigma = -0.0;
    for (int64_t r = 0; r < l.space.rows; ++r) {
      T u;
      read_typed(l.u, r * l.u.stride[0], 1, 1, &u);
      sigma = fma_(double(u), l.y[r], sigma);
    }
  }
  const int64_t n = vector ? 0 : l.space.rows;
  for (int64_t r = 0; r < n; ++r) {
    T u = T(l.y[r]);
    if (!moves) read_typed(l.u, r * l.u.stride[0], 1, 1, &u);
    write_typed(l.u_out, r, 1, 1, &u);
  }
  if (!vector) write_typed(l.v_out, 0, 1, l.space.cols, right);
  // the divisor is the returned sigma, rounded to the compute type
  const T returned = T(spectral_floored(sigma));
  write_typed(l.sigma, 0, 1, 1, &returned);
  l.divisor = double(returned);
}

// W / sigma
template <class T>
void scale_unit(const SpectralLayer& l, int64_t unit) {
  alignas(64) T in[kChunk], out[kChunk];
  const T sigma = T(l.divisor);
  const Rows rows = rows_of(l, unit);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    for_each_chunk(0, l.space.cols, [&](int64_t c, int64_t width) {
      const Tile t{r, 1, c, width};
      const T* __restrict w = load(l.space, l.w, t, in);
      T* __restrict to = target(l.space, l.out, t, out);
#pragma omp simd
      for (int64_t i = 0; i < t.cols; ++i) {
        to[i] = w[i] / sigma;
      }
      store(l.space, l.out, t, to);
    });
  }
}

// partial sum(grad * W) of a unit
template <class T>
void dot_unit(const SpectralLayer& l, int64_t unit) {
  alignas(64) T first[kChunk], second[kChunk];
  const Rows rows = rows_of(l, unit);
  double total = -0.0;
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    for_each_chunk(0, l.space.cols, [&](int64_t c, int64_t width) {
      const Tile t{r, 1, c, width};
      total += double(dot_chunk(load(l.space, l.grad, t, first), load(l.space, l.w, t, second), t.cols));
    });
  }
  l.partial[unit] = total;
}

// gradient of the weight, from the partial sums of all units of the layer
template <class T>
void gradient_unit(const SpectralLayer& l, int64_t unit) {
  alignas(64) T in[kChunk], along[kChunk], out[kChunk];
  const bool vector = !l.v.data;
  const Rows rows = rows_of(l, unit);
  T sigma, grad_sigma;
  read_typed(l.sigma, 0, 1, 1, &sigma);
  read_typed(l.grad_sigma, 0, 1, 1, &grad_sigma);
  double dot = -0.0;
  for (int64_t i = 0; i < l.units; ++i) dot += l.partial[i];
  const double slope = spectral_slope(double(grad_sigma), dot, double(sigma));
  const T inverse = T(1) / sigma;
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    // for a vector, u v' is w / sigma
    T u = inverse;
    if (!vector) read_typed(l.u, r * l.u.stride[0], 1, 1, &u);
    const T of_row = T(slope * double(u));
    for_each_chunk(0, l.space.cols, [&](int64_t c, int64_t width) {
      const Tile t{r, 1, c, width};
      const T* __restrict g = load(l.space, l.grad, t, in);
      const T* __restrict v = along;
      if (vector) {
        v = load(l.space, l.w, t, along);
      } else {
        read_typed(l.v, c * l.v.stride[0], l.v.stride[0], t.cols, along);
      }
      T* __restrict to = target(l.space, l.out, t, out);
#pragma omp simd
      for (int64_t i = 0; i < t.cols; ++i) {
        to[i] = spectral_gradient_of(g[i], inverse, of_row, v[i]);
      }
      store(l.space, l.out, t, to);
    });
  }
}

}  // namespace

// copies v to the compute type
void spectral_start(const SpectralArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const SpectralLayer& l = a.layers[i];
    if (!l.v.data) continue;
    l.f64 ? read_typed(l.v, 0, l.v.stride[0], l.space.cols, (double*)l.right)
          : read_typed(l.v, 0, l.v.stride[0], l.space.cols, (float*)l.right);
  }
}

void spectral_product(const SpectralArgs& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const SpectralLayer& l = layer_of(a, unit);
    l.f64 ? product_unit<double>(a, l, unit - l.first_unit) : product_unit<float>(a, l, unit - l.first_unit);
  }
}

void spectral_iterate(const SpectralArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    a.layers[i].f64 ? iterate_layer<double>(a, a.layers[i]) : iterate_layer<float>(a, a.layers[i]);
  }
}

void spectral_scale(const SpectralArgs& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const SpectralLayer& l = layer_of(a, unit);
    l.f64 ? scale_unit<double>(l, unit - l.first_unit) : scale_unit<float>(l, unit - l.first_unit);
  }
  stream_fence();
}

void spectral_dot(const SpectralArgs& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const SpectralLayer& l = layer_of(a, unit);
    l.f64 ? dot_unit<double>(l, unit - l.first_unit) : dot_unit<float>(l, unit - l.first_unit);
  }
}

void spectral_gradient(const SpectralArgs& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const SpectralLayer& l = layer_of(a, unit);
    l.f64 ? gradient_unit<double>(l, unit - l.first_unit) : gradient_unit<float>(l, unit - l.first_unit);
  }
  stream_fence();
}

}  // namespace pyflow::PYFLOW_ISA
