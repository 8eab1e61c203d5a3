// Steps of reverse SDEs with their gradients, the denoising loss, and the squared norms of score and noise for Langevin
// step sizes. Noise is given or drawn chunk by chunk. A unit is a block of whole short rows or one segment of a long
// row.
#include "../args/sde.h"

#include "draw.h"

namespace pyflow::PYFLOW_ISA {
namespace {

// whether all rows share one a, b and c
bool shared(const SdeArgs& a) { return a.a.view.stride[0] == 0 && a.b.view.stride[0] == 0 && a.c.view.stride[0] == 0; }

// the tile's noise in the compute type: given, or drawn into `buffer`
PYFLOW_FN const float* noise_values(const SdeArgs& a, const Tile& t, DrawBuffer& b, float* buffer) {
  if (a.noise.data) return load(a.space, a.noise, t, buffer);
  draw<NoiseKind::normal>(a.stream, a.space, t, b, buffer);
  return buffer;
}

PYFLOW_FN const double* noise_values(const SdeArgs& a, const Tile& t, DrawBuffer& b, double* buffer) {
  if (a.noise.data) return load(a.space, a.noise, t, buffer);
  alignas(64) float z[kChunk];
  draw<NoiseKind::normal>(a.stream, a.space, t, b, z);
  for (int64_t i = 0; i < t.count(); ++i) buffer[i] = double(z[i]);
  return buffer;
}

template <class T>
void mean_row(const T* __restrict x, const T* __restrict score, T a, T b, T* __restrict mean, int64_t n) {
  if (score) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      mean[i] = drift(x[i], score[i], a, b);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      mean[i] = a * x[i];
    }
  }
}

template <class T>
void diffuse_row(const T* __restrict mean, const T* __restrict z, T c, T* __restrict y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    y[i] = diffuse(mean[i], c, z[i]);
  }
}

template <class T>
void scale_row(const T* __restrict from, T by, T* __restrict to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    to[i] = by * from[i];
  }
}

template <class T>
void add_row(const T* __restrict from, T* __restrict to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    to[i] += from[i];
  }
}

template <bool Score, class T>
void residual_row(const T* __restrict pred, const T* __restrict z, T std, T* __restrict r, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    r[i] = residual<Score>(pred[i], std, z[i]);
  }
}

PYFLOW_FN void prefetch_inputs(const SdeArgs& a, const Tile& t) {
  const View* const inputs[] = {&a.x, &a.score, &a.noise, &a.gy, &a.gmean};
  for (const View* v : inputs) prefetch(a.space, *v, t);
}

// Sums of a unit of several rows or one segment of a row, kept here until the unit is done. They start at -0, since -0
// + v has the bits of v.
template <int N>
struct UnitSums {
  double sum[N][kChunk];

  explicit UnitSums(const Tile& unit) {
    for (int which = 0; which < N; ++which) fill(sum[which], -0.0, unit.rows);
  }

  template <class T>
  void write(const SdeArgs& a, const Tile& unit, int64_t segment) const {
    for (int which = 0; which < N; ++which) {
      for (int64_t r = 0; r < unit.rows; ++r) {
        write_row_sum<T>(a.sums, a.plan, which * a.space.rows + unit.row + r, segment, sum[which][r]);
      }
    }
  }
};

// whether noise is needed: given noise always, drawn noise only if a c of the tile is not 0
template <class T>
bool adds_noise(const SdeArgs& a, const Tile& t) {
  const int64_t rows = a.c.view.stride[0] == 0 ? 1 : t.rows;
  for (int64_t r = 0; r < rows; ++r) {
    if (row_value<T>(a.c, t.row + r) != T(0)) return true;
  }
  return a.noise.data != nullptr;
}

template <class T>
void step_unit(const SdeArgs& a, const Tile& unit, DrawBuffer& draws) {
  alignas(64) T xs[kChunk], scores[kChunk], zs[kChunk], means[kChunk], ys[kChunk];
  const Space& s = a.space;
  for_each_chunk(unit, [&](const Tile& t, const Tile& next) {
    prefetch_inputs(a, next);
    const T* x = load(s, a.x, t, xs);
    const T* score = a.score.data ? load(s, a.score, t, scores) : nullptr;
    const T* z = zs;
    if (adds_noise<T>(a, t)) {
      z = noise_values(a, t, draws, zs);
    } else {
      fill(zs, T(0), t.count());
    }
    T* mean = a.mean.data ? target(s, a.mean, t, means) : means;
    T* y = target(s, a.y, t, ys);
    const int64_t rows = shared(a) ? 1 : t.rows, n = t.count() / rows;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = r * n, row = t.row + r;
      mean_row(x + at, score ? score + at : nullptr, row_value<T>(a.a, row), row_value<T>(a.b, row), mean + at, n);
      diffuse_row(mean + at, z + at, row_value<T>(a.c, row), y + at, n);
    }
    if (a.mean.data) store(s, a.mean, t, mean);
    store(s, a.y, t, y);
  });
}

template <class T>
void step_backward_unit(const SdeArgs& a, const Tile& unit, int64_t segment, DrawBuffer& draws) {
  alignas(64) T gys[kChunk], gmeans[kChunk], total[kChunk], buffer[kChunk], out[kChunk];
  const Space& s = a.space;
  const bool summed = a.sums.out != nullptr;
  UnitSums<3> sums(unit);
  for_each_chunk(unit, [&](const Tile& t, const Tile& next) {
    prefetch_inputs(a, next);
    const int64_t count = t.count();
    fill(total, T(0), count);
    const T* gy = a.gy.data ? load(s, a.gy, t, gys) : nullptr;
    if (gy) add_row(gy, total, count);
    if (a.gmean.data) add_row(load(s, a.gmean, t, gmeans), total, count);
    const auto scaled = [&](const View& view, const RowView& by, const T* from) {
      if (!view.data) return;
      T* to = target(s, view, t, out);
      if (!from) fill(to, T(0), count);
      for (int64_t r = 0; from && r < t.rows; ++r) {
        scale_row(from + r * t.cols, row_value<T>(by, t.row + r), to + r * t.cols, t.cols);
      }
      store(s, view, t, to);
    };
    scaled(a.gx, a.a, total);
    scaled(a.gscore, a.b, total);
    scaled(a.gnoise, a.c, gy);
    if (!summed) return;
    add_dot_rows(t, total, load(s, a.x, t, buffer), sums.sum[0]);
    if (a.score.data) add_dot_rows(t, total, load(s, a.score, t, buffer), sums.sum[1]);
    if (gy) add_dot_rows(t, gy, noise_values(a, t, draws, buffer), sums.sum[2]);
  });
  if (summed) sums.template write<T>(a, unit, segment);
}

template <bool Score, class T>
void loss_unit(const SdeArgs& a, const Tile& unit, int64_t segment, DrawBuffer& draws) {
  alignas(64) T preds[kChunk], zs[kChunk], r[kChunk], out[kChunk], part[kChunk];
  const Space& s = a.space;
  UnitSums<1> sums(unit);
  for_each_chunk(unit, [&](const Tile& t, const Tile& next) {
    prefetch_inputs(a, next);
    const T* pred = load(s, a.x, t, preds);
    const T* z = noise_values(a, t, draws, zs);
    T* gx = a.gx.data ? target(s, a.gx, t, out) : nullptr;
    for (int64_t i = 0; i < t.rows; ++i) {
      const int64_t at = i * t.cols, row = t.row + i;
      const T std = Score ? row_value<T>(a.c, row) : T(1);
      residual_row<Score>(pred + at, z + at, std, r + at, t.cols);
      if (gx) {
        const T grad = row_value<T>(a.a, row);
        scale_row(r + at, grad * std, gx + at, t.cols);
      }
    }
    dot_rows(t, gx ? pred : r, r, part);
    for (int64_t i = 0; i < t.rows; ++i) {
      sums.sum[0][i] += double(gx ? row_value<T>(a.a, t.row + i) : T(0.5)) * double(part[i]);
    }
    if (gx) store(s, a.gx, t, gx);
  });
  sums.template write<T>(a, unit, segment);
}

template <class T>
void squares_unit(const SdeArgs& a, const Tile& unit, int64_t segment, DrawBuffer& draws) {
  alignas(64) T scores[kChunk], zs[kChunk];
  UnitSums<2> sums(unit);
  for_each_chunk(unit, [&](const Tile& t, const Tile& next) {
    prefetch_inputs(a, next);
    const T* score = load(a.space, a.score, t, scores);
    const T* z = noise_values(a, t, draws, zs);
    add_dot_rows(t, score, score, sums.sum[0]);
    add_dot_rows(t, z, z, sums.sum[1]);
  });
  sums.template write<T>(a, unit, segment);
}

}  // namespace

void sde_step(const SdeArgs& a, int64_t begin, int64_t end) {
  DrawBuffer draws;
  for_each_unit(a, begin, end,
                [&](const Tile& unit, int64_t, auto zero) { step_unit<decltype(zero)>(a, unit, draws); });
}

void sde_step_backward(const SdeArgs& a, int64_t begin, int64_t end) {
  DrawBuffer draws;
  for_each_unit(a, begin, end, [&](const Tile& unit, int64_t segment, auto zero) {
    step_backward_unit<decltype(zero)>(a, unit, segment, draws);
  });
}

// forward; backward if gx is present
void denoising_loss(const SdeArgs& a, int64_t begin, int64_t end) {
  DrawBuffer draws;
  for_each_unit(a, begin, end, [&](const Tile& unit, int64_t segment, auto zero) {
    using T = decltype(zero);
    a.score_given ? loss_unit<true, T>(a, unit, segment, draws) : loss_unit<false, T>(a, unit, segment, draws);
  });
}

void langevin_squares(const SdeArgs& a, int64_t begin, int64_t end) {
  DrawBuffer draws;
  for_each_unit(a, begin, end, [&](const Tile& unit, int64_t segment, auto zero) {
    squares_unit<decltype(zero)>(a, unit, segment, draws);
  });
}

}  // namespace pyflow::PYFLOW_ISA
