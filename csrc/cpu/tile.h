// Reads and writes a tile of a strided tensor of any dtype as contiguous values of the compute type. A tile that
// already has that form is used in place; any other goes through a buffer in L1, so a kernel is one loop over plain
// arrays.
#pragma once

#include "../math/half.h"
#include "../tiles/plan.h"
#include "stream.h"

#if !defined(PYFLOW_ISA)
#error "compiled once per instruction set: PYFLOW_ISA names it"
#endif

namespace pyflow::PYFLOW_ISA {

struct Tile {
  int64_t row, rows, col, cols;
  int64_t count() const { return rows * cols; }
};

// rows and columns of a unit of the plan
PYFLOW_FN Tile unit_tile(const Space& s, const Plan& p, int64_t unit) {
  const int64_t row = unit / p.segments * p.tile_rows, col = unit % p.segments * p.segment;
  return {row, smaller(s.rows - row, p.tile_rows), col, smaller(s.cols - col, p.segment)};
}

// the tile of the same size to the right of t, for prefetching
PYFLOW_FN Tile next_tile(const Tile& t) { return {t.row, t.rows, t.col + t.cols, t.cols}; }

// the chunk after t in a unit, for prefetching: the next one of the same rows, or the first one of the rows below
PYFLOW_FN Tile next_tile(const Tile& unit, const Tile& t) {
  const int64_t end = unit.col + unit.cols, col = t.col + t.cols;
  if (col < end) return {t.row, t.rows, col, smaller(end - col, kChunk)};
  return {t.row + t.rows, t.rows, unit.col, smaller(unit.cols, kChunk)};
}

// calls f(unit, its segment of the row, T()) for units [begin, end) of the plan, where T is the compute type
template <class Args, class F>
PYFLOW_FN void for_each_unit(const Args& a, int64_t begin, int64_t end, F f) {
  for (int64_t u = begin; u < end; ++u) {
    const Tile unit = unit_tile(a.space, a.plan, u);
    a.f64 ? f(unit, u % a.plan.segments, double()) : f(unit, u % a.plan.segments, float());
  }
  stream_fence();
}

// calls f(first, count) for every chunk of [begin, end)
template <class F>
PYFLOW_FN void for_each_chunk(int64_t begin, int64_t end, F f) {
  for (int64_t i = begin; i < end; i += kChunk) f(i, smaller(end - i, kChunk));
}

// calls f(chunk, the chunk after it) for every chunk of a unit
template <class F>
PYFLOW_FN void for_each_chunk(const Tile& unit, F f) {
  for_each_chunk(0, unit.cols, [&](int64_t c, int64_t count) {
    const Tile t{unit.row, unit.rows, unit.col + c, count};
    f(t, next_tile(unit, t));
  });
}

template <class T>
constexpr DType kComputeType = sizeof(T) == 8 ? DType::f64 : DType::f32;

// whether the tile's columns lie in one run of the innermost dim
PYFLOW_FN bool one_run(const Space& s, const Tile& t) {
  const int64_t inner = s.size[s.row_dims + s.col_dims - 1];
  return s.col_dims == 1 || t.col % inner + t.cols <= inner;
}

PYFLOW_FN int64_t run_offset(const Space& s, const View& v, const Tile& t) {
  return row_offset(s, v, t.row) + col_offset(s, v, t.col);
}

template <class T>
PYFLOW_FN bool in_place(const Space& s, const View& v, const Tile& t) {
  if (v.dtype != kComputeType<T> || v.stride[s.row_dims + s.col_dims - 1] != 1 || !one_run(s, t)) return false;
  return t.rows == 1 || (s.row_dims == 1 && s.col_dims == 1 && v.stride[0] == s.cols);
}

template <class T>
PYFLOW_FN void fill(T* to, T value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = value;
}

// strides 0, 1 and 2 have loops of constant stride, which the compiler vectorises
template <class T, class S, class F>
PYFLOW_FN void read_run(const S* __restrict src, int64_t stride, int64_t n, T* __restrict dst, F f) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) dst[i] = T(f(src[i]));
  } else if (stride == 2) {
    for (int64_t i = 0; i < n; ++i) dst[i] = T(f(src[2 * i]));
  } else if (stride == 0) {
    const T value = n > 0 ? T(f(src[0])) : T(0);
    for (int64_t i = 0; i < n; ++i) dst[i] = value;
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i] = T(f(src[i * stride]));
  }
}

template <class T, class D, class F>
PYFLOW_FN void write_run(const T* __restrict src, int64_t stride, int64_t n, D* __restrict dst, F f) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) dst[i] = f(src[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i * stride] = f(src[i]);
  }
}

template <class T>
void read_typed(const View& v, int64_t offset, int64_t stride, int64_t n, T* dst) {
  switch (v.dtype) {
    case DType::f32: read_run((const float*)v.data + offset, stride, n, dst, [](float x) { return x; }); break;
    case DType::f64: read_run((const double*)v.data + offset, stride, n, dst, [](double x) { return x; }); break;
    case DType::bf16:
      read_run((const uint16_t*)v.data + offset, stride, n, dst, [](uint16_t x) { return bf16_to_float(x); });
      break;
    case DType::f16:
      read_run((const uint16_t*)v.data + offset, stride, n, dst, [](uint16_t x) { return half_to_float(x); });
      break;
    case DType::u8:
      read_run((const uint8_t*)v.data + offset, stride, n, dst, [](uint8_t x) { return x ? 1.f : 0.f; });
      break;
    default: break;  // kernels read indices directly
  }
}

template <class T>
void write_typed(const View& v, int64_t offset, int64_t stride, int64_t n, const T* src) {
  switch (v.dtype) {
    case DType::f32: write_run(src, stride, n, (float*)v.data + offset, [](T x) { return float(x); }); break;
    case DType::f64: write_run(src, stride, n, (double*)v.data + offset, [](T x) { return double(x); }); break;
    case DType::bf16:
      write_run(src, stride, n, (uint16_t*)v.data + offset, [](T x) { return float_to_bf16(float(x)); });
      break;
    case DType::f16:
      write_run(src, stride, n, (uint16_t*)v.data + offset, [](T x) { return float_to_half(float(x)); });
      break;
    default: break;  // masks are never written; kernels write indices directly
  }
}

template <class T>
PYFLOW_FN T read(const View& v, int64_t at) {
  T value = T(0);
  read_typed(v, at, 1, 1, &value);
  return value;
}

template <class T>
PYFLOW_FN T row_value(const RowView& v, int64_t row) {
  return v.view.data ? read<T>(v.view, row * v.view.stride[0]) : T(v.value);
}

// the value of its row for each element of a tile
template <class T>
void load_rows(const RowView& v, const Tile& t, T* to) {
  for (int64_t r = 0; r < t.rows; ++r) fill(to + r * t.cols, row_value<T>(v, t.row + r), t.cols);
}

template <class T>
PYFLOW_FN void write_row_value(const RowView& v, int64_t row, T value) {
  write_typed(v.view, row * v.view.stride[0], 1, 1, &value);
}

// stores the sum of a row over one segment; `row` counts the rows of all sums
template <class T>
PYFLOW_FN void write_row_sum(const RowSums& sums, const Plan& p, int64_t row, int64_t segment, double sum) {
  if (sums.partial) {
    ((double*)sums.partial)[row * p.segments + segment] = sum;
  } else {
    ((T*)sums.out)[row] = T(sum);
  }
}

PYFLOW_FN int64_t size_of(DType d) { return d == DType::f64 ? 8 : d == DType::f32 ? 4 : d == DType::u8 ? 1 : 2; }

// calls run(offset in v, offset in the tile, length, stride) for every innermost run of the tile
template <class F>
PYFLOW_FN void for_each_run(const Space& s, const View& v, const Tile& t, F run) {
  const int last = s.row_dims + s.col_dims - 1;
  const int64_t inner = s.size[last];
  if (t.rows > 1 && last == 1 && t.cols == s.cols) {
    // rows that follow each other are one run, as are rows of one column
    const int64_t stride = s.cols == 1 ? v.stride[0] : v.stride[1];
    if (v.stride[0] == s.cols * stride) return run(t.row * v.stride[0], 0, t.count(), stride);
  }
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t base = row_offset(s, v, t.row + r);
    for (int64_t c = 0; c < t.cols;) {
      const int64_t n = smaller(inner - (t.col + c) % inner, t.cols - c);
      run(base + col_offset(s, v, t.col + c), r * t.cols + c, n, v.stride[last]);
      c += n;
    }
  }
}

// returns the tile as contiguous values: a pointer into v, or `buffer` after filling it
template <class T>
const T* load(const Space& s, const View& v, const Tile& t, T* buffer) {
  if (in_place<T>(s, v, t)) return (const T*)v.data + run_offset(s, v, t);
  for_each_run(s, v, t, [&](int64_t offset, int64_t at, int64_t n, int64_t stride) {
    read_typed(v, offset, stride, n, buffer + at);
  });
  return buffer;
}

// Prefetches a tile that is one run of memory. The hardware prefetcher does not help: a kernel computes for long
// between two loads, and the short rows of a strided half lie far apart. Inputs are prefetched into L2, which allows
// many more outstanding misses (two cores of a Zen 4: strided halves take 2.3 times as long as a whole tensor with
// prefetches into L1, 1.1 times with prefetches into L2).
template <bool Write = false>
PYFLOW_FN void prefetch(const Space& s, const View& v, const Tile& t) {
  const int64_t step = v.stride[s.row_dims + s.col_dims - 1] * size_of(v.dtype);
  if (!v.data || v.stream || t.row >= s.rows || !one_run(s, t) || step < 1 || step > 8) return;
  const char* p = v.data + run_offset(s, v, t) * size_of(v.dtype);
  for (int64_t i = 0; i < t.count() * step; i += 64) __builtin_prefetch(p + i, Write, Write ? 3 : 2);
}

// fills `to` with the value that v has for the row of each element, 0 if v is absent; a unit has one chunk or one row
template <class T>
void load_rows(const Space& s, const View& v, const Tile& unit, T* to) {
  const int64_t cols = smaller(unit.cols, kChunk);
  T values[kChunk] = {};
  if (v.data && s.row_dims == 1) {
    read_typed(v, unit.row * v.stride[0], v.stride[0], unit.rows, values);
  } else if (v.data) {
    for (int64_t r = 0; r < unit.rows; ++r) values[r] = read<T>(v, row_offset(s, v, unit.row + r));
  }
  for (int64_t r = 0; r < unit.rows; ++r) fill(to + r * cols, values[r], cols);
}

// returns where to write the tile: into v, or to `buffer`, which `store` then copies to v
template <class T>
T* target(const Space& s, const View& v, const Tile& t, T* buffer) {
  return in_place<T>(s, v, t) && !v.stream ? (T*)v.data + run_offset(s, v, t) : buffer;
}

template <class T>
void store(const Space& s, const View& v, const Tile& t, const T* values) {
  if (in_place<T>(s, v, t)) {
    if (v.stream) stream((T*)v.data + run_offset(s, v, t), values, t.count());
    return;
  }
  for_each_run(s, v, t, [&](int64_t offset, int64_t at, int64_t n, int64_t stride) {
    write_typed(v, offset, stride, n, values + at);
  });
}

// whether a and b are the even and the odd elements of one array of the compute type
template <class T>
PYFLOW_FN bool interleaved(const Space& s, const View& a, const View& b) {
  const int last = s.row_dims + s.col_dims - 1;
  const bool floats = a.dtype == kComputeType<T> && b.dtype == kComputeType<T>;
  return floats && (T*)b.data == (T*)a.data + 1 && a.stride[last] == 2 && b.stride[last] == 2;
}

// reads an interleaved pair in one vectorised pass instead of two strided ones; store_pair writes one
template <class T>
void load_pair(const Space& s, const View& a, const Tile& t, T* va, T* vb) {
  for_each_run(s, a, t, [&](int64_t offset, int64_t at, int64_t n, int64_t) {
    const T* __restrict src = (const T*)a.data + offset;
    T* __restrict pa = va + at;
    T* __restrict pb = vb + at;
    for (int64_t i = 0; i < n; ++i) {
      pa[i] = src[2 * i];
      pb[i] = src[2 * i + 1];
    }
  });
}

template <class T>
void store_pair(const Space& s, const View& a, const Tile& t, const T* va, const T* vb) {
  alignas(64) T pairs[2 * kChunk];
  for_each_run(s, a, t, [&](int64_t offset, int64_t at, int64_t n, int64_t) {
    T* __restrict dst = a.stream ? pairs : (T*)a.data + offset;
    const T* __restrict pa = va + at;
    const T* __restrict pb = vb + at;
    for (int64_t i = 0; i < n; ++i) {
      dst[2 * i] = pa[i];
      dst[2 * i + 1] = pb[i];
    }
    if (a.stream) stream((T*)a.data + offset, pairs, 2 * n);
  });
}

// the sum of N lanes by halves, in place; N is a power of two
template <int N, class T>
PYFLOW_FN T fold(T* lane) {
  for (int width = N / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
  }
  return lane[0];
}

// Sum of n <= kChunk values in sixteen lanes and a fixed fold: the same bits for every vector width. Error at most
// (n / 16 + 4) ulp / 2, relative to the sum of the magnitudes.
template <class T>
PYFLOW_FN T lane_sum(const T* v, int64_t n) {
  T lane[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int j = 0; j < 16; ++j) lane[j] += v[i + j];
  }
  for (int j = 0; i + j < n; ++j) lane[j] += v[i + j];
  return fold<16>(lane);
}

// the sum of 2 * Width lanes by halves, in place; those from Cols on are 0 and left out
template <int Width, int Cols, class T>
PYFLOW_FN void fold_short(T* lane) {
  for (int j = 0; j < Width && j + Width < Cols; ++j) lane[j] += lane[j + Width];
  if constexpr (Width > 1) fold_short<Width / 2, Cols>(lane);
}

// lane_sum of rows of Cols <= 16 values each, times sign: the other lanes are 0
template <int Cols, class T>
void short_row_sums(const T* __restrict v, int64_t rows, T sign, T* __restrict out) {
  for (int64_t r = 0; r < rows; ++r) {
    T lane[Cols];
    for (int j = 0; j < Cols; ++j) lane[j] = v[r * Cols + j];
    fold_short<8, Cols>(lane);
    out[r] = sign * (lane[0] + T(0));  // -0 becomes 0, as in a lane
  }
}

// lane_sum of each of a tile's whole rows, times sign
template <class T>
void row_sums(const Tile& t, const T* v, T sign, T* out) {
  switch (t.cols) {
    case 1: return short_row_sums<1>(v, t.rows, sign, out);
    case 2: return short_row_sums<2>(v, t.rows, sign, out);
    case 3: return short_row_sums<3>(v, t.rows, sign, out);
    case 4: return short_row_sums<4>(v, t.rows, sign, out);
    case 5: return short_row_sums<5>(v, t.rows, sign, out);
    case 6: return short_row_sums<6>(v, t.rows, sign, out);
    case 7: return short_row_sums<7>(v, t.rows, sign, out);
    case 8: return short_row_sums<8>(v, t.rows, sign, out);
    default: break;
  }
  for (int64_t r = 0; r < t.rows; ++r) out[r] = sign * lane_sum(v + r * t.cols, t.cols);
}

// stores the sums of whole rows, several to a unit
template <class T>
PYFLOW_FN void write_row_sums(const RowSums& sums, const Tile& t, const T* v, T sign) {
  row_sums(t, v, sign, (T*)sums.out + t.row);
}

// the sum of p q for each row of a tile
template <class T>
void dot_rows(const Tile& t, const T* __restrict p, const T* __restrict q, T* out) {
  alignas(64) T product[kChunk];
#pragma omp simd
  for (int64_t i = 0; i < t.count(); ++i) {
    product[i] = p[i] * q[i];
  }
  row_sums(t, product, T(1), out);
}

// adds dot_rows to the sums of a unit
template <class T>
void add_dot_rows(const Tile& t, const T* p, const T* q, double* sums) {
  T part[kChunk];
  dot_rows(t, p, q, part);
  for (int64_t r = 0; r < t.rows; ++r) sums[r] += double(part[r]);
}

}  // namespace pyflow::PYFLOW_ISA
