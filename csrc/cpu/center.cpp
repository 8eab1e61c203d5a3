// Centred Gram matrices HKH in three steps: sums of rows and columns, means, subtraction. A unit is kCenterRows rows of
// a matrix; for the means it is a matrix.
#include "../args/center.h"

#include "sums.h"

namespace pyflow::PYFLOW_ISA {
namespace {

// the row means of a block of rows, and its column sums
template <class T>
void center_sums_block(const CenterArgs& a, int64_t unit) {
  const int64_t first = unit / a.blocks * a.n, row = unit % a.blocks * kCenterRows;
  double* __restrict column = a.columns + unit * a.n;
  for (int64_t c = 0; c < a.n; ++c) column[c] = 0;
  alignas(64) T buffer[kChunk];
  for (int64_t r = row; r < smaller(row + kCenterRows, a.n); ++r) {
    double total = 0;
    for_each_chunk({first + r, 1, 0, a.n}, [&](const Tile& t, const Tile&) {
      const int64_t whole = t.cols / 16 * 16;
      const T* values = load(a.space, a.gram, t, buffer);
      total += add_row(values, column + t.col, whole);
      for (int64_t k = whole; k < t.cols; ++k) {
        total += double(values[k]);
        column[t.col + k] += double(values[k]);
      }
    });
    a.row_means[first + r] = total / double(a.n);
  }
}

template <class T>
void center_block(const CenterArgs& a, int64_t unit) {
  const int64_t matrix = unit / a.blocks, first = matrix * a.n, row = unit % a.blocks * kCenterRows;
  const double* __restrict column = a.columns + matrix * a.blocks * a.n;
  alignas(64) T buffer[kChunk], out[kChunk];
  for (int64_t r = row; r < smaller(row + kCenterRows, a.n); ++r) {
    const double own = a.row_means[first + r] - a.means[matrix];
    for_each_chunk({first + r, 1, 0, a.n}, [&](const Tile& t, const Tile&) {
      // no __restrict: gram and out may be the same memory
      const T* values = load(a.space, a.gram, t, buffer);
      T* to = target(a.space, a.out, t, out);
#pragma omp simd
      for (int64_t k = 0; k < t.cols; ++k) {
        to[k] = T(double(values[k]) - (own + column[t.col + k]));
      }
      store(a.space, a.out, t, to);
    });
  }
}

}  // namespace

void center_sums(const CenterArgs& a, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) a.f64 ? center_sums_block<double>(a, u) : center_sums_block<float>(a, u);
}

// a unit is a matrix
void center_means(const CenterArgs& a, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) {
    double* __restrict column = a.columns + u * a.blocks * a.n;
    for (int64_t b = 1; b < a.blocks; ++b) {
      const double* __restrict more = column + b * a.n;
      for (int64_t c = 0; c < a.n; ++c) column[c] += more[c];
    }
    double total = 0;
    for (int64_t c = 0; c < a.n; ++c) {
      total += column[c];
      column[c] /= double(a.n);
    }
    a.means[u] = total / (double(a.n) * double(a.n));
  }
}

void center_apply(const CenterArgs& a, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) a.f64 ? center_block<double>(a, u) : center_block<float>(a, u);
  stream_fence();
}

}  // namespace pyflow::PYFLOW_ISA
