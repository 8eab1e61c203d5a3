// Prepares the tiles of hsic.cpp: statistics of the features (centres, shifts), rows packed as strips, cleared
// gradients. A unit is one variable of one batch item (statistics), or kPad rows of it.
#include "strips.h"
#include "sums.h"

namespace pyflow::PYFLOW_ISA {
namespace {

// rows summed in the compute type, and prefetch distance in rows
constexpr int64_t kStatsRows = 32, kStatsAhead = 8;

// Adds the sums and squared sums of `rows` rows minus the first row. The compute type is accurate enough for so few
// rows: the result only decides between K and K - 1.
template <class T>
void add_moments(const T* __restrict first, const T* __restrict row, int64_t rows, int64_t stride, int64_t count,
                 double* __restrict sum, double* __restrict square) {
  T some[kChunk] = {}, squares[kChunk] = {};
  for (int64_t j = 0; j < rows; ++j, row += stride) {
    for (int64_t c = 0; c < count; c += 64 / sizeof(T)) __builtin_prefetch(row + kStatsAhead * stride + c, 0, 2);
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) {
      const T more = row[c] - first[c];
      some[c] += more;
      squares[c] = fma_(more, more, squares[c]);
    }
  }
#pragma omp simd
  for (int64_t c = 0; c < count; ++c) {
    sum[c] += double(some[c]);
    square[c] += double(squares[c]);
  }
}

// the median of five
template <class T>
PYFLOW_FN T middle(const T* x, int64_t step) {
  const auto less = [](T a, T b) { return a < b ? a : b; };
  const auto more = [](T a, T b) { return a < b ? b : a; };
  const T a = x[0], b = x[step], c = x[2 * step], d = x[3 * step], e = x[4 * step];
  // the smallest and the largest of four cannot be the median
  const T low = more(less(a, b), less(c, d)), high = less(more(a, b), more(c, d));
  return more(less(low, high), less(more(low, high), e));
}

// the shift that is subtracted from the kernel, and for kernels of distances, whose shift follows from the variances of
// the features, the centres of the features
template <class T>
void item_stats(const GramArgs& a, int64_t slot, int64_t m) {
  const GramVariable& v = a.variable[m];
  const int64_t n = a.tournament.n, item = a.item + slot;
  double& shift = a.shift[item * a.variables + m];
  const double scale = double(((const T*)a.scale)[item * a.variables + m]);
  shift = v.kernel == GramKernel::polynomial ? scale : 0;
  if (!of_distances(v.kernel)) return;
  const T* z = (const T*)v.z + item * n * v.dim;
  T* centres = (T*)a.centres + slot * a.columns + v.first;
  double spread = 0;
  for_each_chunk(0, v.dim, [&](int64_t k, int64_t count) {
    // moments of the differences to the first row: a common offset costs no digits
    double sum[kChunk] = {}, square[kChunk] = {};
    const T* first = z + k;
    for (int64_t j = 1; j < n; j += kStatsRows) {
      add_moments(first, first + j * v.dim, smaller(kStatsRows, n - j), v.dim, count, sum, square);
    }
    for (int64_t c = 0; c < count; ++c) {
      const double mean = sum[c] / double(n);
      const double variance = (square[c] - mean * sum[c]) / double(n > 1 ? n - 1 : 1);
      spread += v.kernel == GramKernel::rbf ? variance : __builtin_sqrt(variance > 0 ? variance : 0);
    }
  });
  // the centre is the median of five rows: a few outliers do not move it
  T five[5 * kChunk];
  for_each_chunk(0, v.dim, [&](int64_t k, int64_t count) {
    for (int64_t i = 0; i < 5; ++i) {
      const T* row = z + i * (n - 1) / 4 * v.dim + k;
      for (int64_t c = 0; c < count; ++c) five[i * kChunk + c] = row[c];
    }
    for (int64_t c = 0; c < count; ++c) centres[k + c] = middle(five + c, kChunk);
  });
  shift = v.kernel == GramKernel::rbf ? spread * scale * scale <= kWideVariance : spread * scale <= kWideDeviation;
}

// shuffles the elements of x (0 to 3) and y (4 to 7); gcc has clang's builtin from version 12 on
template <int A, int B, int C, int D, class V>
PYFLOW_FN V pick(V x, V y) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(x, y, A, B, C, D);
#else
  return __builtin_shuffle(x, y, decltype(x < y){A, B, C, D});
#endif
}

// transposes four rows of n values, kChunk apart, into four columns of a strip. By 4 x 4 blocks: gcc does not vectorise
// the plain loop.
template <class T>
void transpose_rows(const T* __restrict rows, T* __restrict strip, int64_t n) {
  typedef T Four __attribute__((vector_size(4 * sizeof(T))));
  int64_t k = 0;
  for (; k + 4 <= n; k += 4) {
    Four row[4], column[4];
    for (int r = 0; r < 4; ++r) __builtin_memcpy(&row[r], rows + r * kChunk + k, sizeof(Four));
    const Four low01 = pick<0, 4, 1, 5>(row[0], row[1]), low23 = pick<0, 4, 1, 5>(row[2], row[3]);
    const Four high01 = pick<2, 6, 3, 7>(row[0], row[1]), high23 = pick<2, 6, 3, 7>(row[2], row[3]);
    column[0] = pick<0, 1, 4, 5>(low01, low23);
    column[1] = pick<2, 3, 6, 7>(low01, low23);
    column[2] = pick<0, 1, 4, 5>(high01, high23);
    column[3] = pick<2, 3, 6, 7>(high01, high23);
    for (int r = 0; r < 4; ++r) __builtin_memcpy(strip + (k + r) * kCols<T>, &column[r], sizeof(Four));
  }
  for (; k < n; ++k) {
    for (int r = 0; r < 4; ++r) strip[k * kCols<T> + r] = rows[r * kChunk + k];
  }
}

// packs kCols rows, centred and scaled for distance kernels, as a strip; also |row|^2 / 2 for distance kernels, and
// padded rows if there is a gradient
template <class T>
void pack_strip(const GramArgs& a, int64_t slot, int64_t m, int64_t strip) {
  const GramVariable& v = a.variable[m];
  if (v.width == 0) return;
  const bool centred = of_distances(v.kernel);
  const int64_t n = a.tournament.n, item = a.item + slot, begin = strip * kCols<T>;
  const T scale = centred ? ((const T*)a.scale)[item * a.variables + m] : T(1);
  const T* centres = (const T*)a.centres + slot * a.columns + v.first;
  T* workspace = (T*)a.workspace + slot * a.workspace_size;
  T* __restrict out = workspace + v.strips + begin * v.dim;
  alignas(64) T rows[4][kChunk];
  for (int64_t c = 0; c < kCols<T>; c += 4) {
    const T* z = (const T*)v.z + (item * n + begin + c) * v.dim;
    for_each_chunk(0, v.width, [&](int64_t first, int64_t padded) {
      const int64_t dims = smaller(padded, v.dim - first);
      for (int64_t r = 0; r < 4; ++r) {
        const int64_t count = begin + c + r < n ? dims : 0;
        const T* __restrict value = z + r * v.dim + first;
        const T* __restrict centre = centres + first;
        T* __restrict row = rows[r];
        for (int64_t k = 0; k < count; ++k) row[k] = centred ? (value[k] - centre[k]) * scale : value[k];
        for (int64_t k = count; k < padded; ++k) row[k] = T(0);
        T* __restrict kept = workspace + v.rows + (begin + c + r) * v.width + first;
        for (int64_t k = 0; v.rows >= 0 && k < padded; ++k) kept[k] = row[k];
      }
      transpose_rows(rows[0], out + first * kCols<T> + c, dims);
    });
  }
  if (!centred) return;
  double square[kCols<T>] = {};
  for (const T* __restrict values = out; values < out + v.dim * kCols<T>; values += kCols<T>) {
#pragma omp simd
    for (int c = 0; c < kCols<T>; ++c) {
      square[c] = fma_(double(values[c]), double(values[c]), square[c]);
    }
  }
  T* halves = (T*)a.halves + (slot * a.variables + m) * a.padded + begin;
  for (int c = 0; c < kCols<T>; ++c) halves[c] = T(0.5 * square[c]);
}

// zeroes the gradient rows and the weight sums
template <class T>
void clear_strip(const GramBackward& a, int64_t slot, int64_t m, int64_t strip) {
  const GramVariable& v = a.variable[m];
  const int64_t n = a.tournament.n, begin = strip * kCols<T>;
  for (int64_t j = begin; j < begin + kCols<T> && j < n; ++j) {
    a.weight_sums[(slot * a.variables + m) * a.padded + j] = 0;
    if (v.rows >= 0) {
      T* row = (T*)a.grad_workspace + slot * a.workspace_size + v.rows + j * v.width;
      for (int64_t k = 0; k < v.width; ++k) row[k] = T(0);
    }
    T* grad = (T*)v.grad + ((a.item + slot) * n + j) * v.dim;
    for (int64_t k = 0; k < v.dim; ++k) grad[k] = T(0);
  }
}

// calls f(slot, variable, strip) for every strip of the units [begin, end); a unit is kPad rows of an (item, variable)
template <class F>
PYFLOW_FN void for_each_strip(const GramArgs& a, int64_t begin, int64_t end, F f) {
  const int64_t units = a.padded / kPad, strips = kPad / (a.f64 ? kCols<double> : kCols<float>);
  for (int64_t u = begin; u < end; ++u) {
    const int64_t row = u / units, first = u % units * strips;
    for (int64_t s = first; s < first + strips; ++s) f(row / a.variables, row % a.variables, s);
  }
}

}  // namespace

// a unit is an (item, variable)
void gram_stats(const GramArgs& a, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) {
    const int64_t slot = u / a.variables, m = u % a.variables;
    a.f64 ? item_stats<double>(a, slot, m) : item_stats<float>(a, slot, m);
  }
}

void gram_pack(const GramArgs& a, int64_t begin, int64_t end) {
  for_each_strip(a, begin, end, [&](int64_t slot, int64_t m, int64_t strip) {
    a.f64 ? pack_strip<double>(a, slot, m, strip) : pack_strip<float>(a, slot, m, strip);
  });
}

void gram_clear(const GramBackward& a, int64_t begin, int64_t end) {
  for_each_strip(a, begin, end, [&](int64_t slot, int64_t m, int64_t strip) {
    a.f64 ? clear_strip<double>(a, slot, m, strip) : clear_strip<float>(a, slot, m, strip);
  });
}

}  // namespace pyflow::PYFLOW_ISA
