// A tile of a program: its rows lie in blocks of kWidth rows, every array as (blocks, columns, kWidth), so that a
// column of a block is a few registers and a matrix product reads memory in order.
#pragma once

#include "../../args/flow_program.h"
#include "../strips.h"
#include "../transpose.h"

namespace pyflow::PYFLOW_ISA {

template <class T>
constexpr int kWidth = kCols<T>;  // rows of a block
static_assert(kProgramRows % kWidth<float> == 0 && kProgramRows % kWidth<double> == 0);

// what a tile keeps of its columns: `count` columns of every block, `step` columns apart
template <class T>
struct Columns {
  T* data;
  int64_t count, step = count;
  T* at(int64_t block, int64_t column) const { return data + (block * step + column) * kWidth<T>; }
};

template <class T>
struct ProgramTile {
  const ProgramArgs& args;
  const ProgramBackward* back;            // null in the forward, which keeps no tape
  int64_t row = 0, rows = 0, blocks = 0;  // first row, rows of the batch, blocks that hold them
  Columns<T> state{}, context{}, scratch{};
  T *tape = nullptr, *kept = nullptr;
  double* logdet = nullptr;  // of every row
  // backward
  Columns<T> grad{}, grad_context{};
  T* arrays = nullptr;       // of gradients inside a net; in the first a transform leaves those of its numbers
  T* grad_solve = nullptr;   // of the values of an autoregressive inverse
  T* grad_logdet = nullptr;  // of every row
  T* turned = nullptr;       // a transposed array
  T* sums = nullptr;         // of the group; null: no gradients of weights
  bool adds = false;         // whether the group has sums of tiles before this one

  int64_t padded() const { return blocks * kWidth<T>; }
  Columns<T> taped_at(int64_t place, int64_t count) const {
    return {is_kept(place) ? kept + kept_place(place) * padded() : tape + place * padded(), count};
  }
  Columns<T> array(int64_t k, int64_t count) const { return {arrays + k * args.width * args.tile_rows, count}; }
};

// calls f(block, column of the state, i) for the columns that an instruction names
template <class T, class F>
PYFLOW_FN void for_each_column(const ProgramTile<T>& t, const ProgramInstruction& in, F f) {
  for (int64_t b = 0; b < t.blocks; ++b) {
    for (int64_t i = 0; i < in.count; ++i) f(b, in.columns[i], i);
  }
}

template <class T>
PYFLOW_FN void copy_column(const T* __restrict from, T* __restrict to) {
  for (int r = 0; r < kWidth<T>; ++r) to[r] = from[r];
}

template <class T>
PYFLOW_FN void add_column(const T* __restrict from, T* __restrict to) {
  for (int r = 0; r < kWidth<T>; ++r) to[r] += from[r];
}

// the named columns of `from`, in order
template <class T>
PYFLOW_FN void gather(const ProgramTile<T>& t, const ProgramInstruction& in, const Columns<T>& from,
                      const Columns<T>& to) {
  for_each_column(t, in, [&](int64_t b, int64_t c, int64_t i) { copy_column(from.at(b, c), to.at(b, i)); });
}

template <class T>
PYFLOW_FN void scatter(const ProgramTile<T>& t, const ProgramInstruction& in, const Columns<T>& from,
                       const Columns<T>& to) {
  for_each_column(t, in, [&](int64_t b, int64_t c, int64_t i) { copy_column(from.at(b, i), to.at(b, c)); });
}

// keeps the named columns for the backward
template <class T>
PYFLOW_FN void save(const ProgramTile<T>& t, const ProgramInstruction& in) {
  if (t.back) gather(t, in, t.state, t.taped_at(in.saved, in.count));
}

// runs a transform, or takes what the forward has left of it; its columns before it are saved, those after it kept
template <class T, class F>
PYFLOW_FN void transform_once(const ProgramTile<T>& t, const ProgramInstruction& in, F run) {
  save(t, in);
  if (t.back && is_kept(in.after)) return scatter(t, in, t.taped_at(in.after, in.count), t.state);
  run();
  if (is_kept(in.after)) gather(t, in, t.state, t.taped_at(in.after, in.count));
}

template <class T>
PYFLOW_FN void add_logdet(const ProgramTile<T>& t, int64_t block, const T* __restrict more) {
  double* __restrict logdet = t.logdet + block * kWidth<T>;
  for (int r = 0; r < kWidth<T>; ++r) logdet[r] += double(more[r]);
}

template <class T>
PYFLOW_FN void add_logdet(const ProgramTile<T>& t, double more) {
  for (int64_t r = 0; r < t.padded(); ++r) t.logdet[r] += more;
}

// rows of a block that belong to the batch
template <class T>
PYFLOW_FN int64_t rows_of(const ProgramTile<T>& t, int64_t block) {
  return smaller(kWidth<T>, t.rows - block * kWidth<T>);
}

// reads n rows of a matrix, from `first` on, to the lanes of a block from `lane` on
template <class T>
void load_lanes(const ProgramMatrix& m, int64_t first, int64_t n, const Columns<T>& to, int64_t b, int64_t lane) {
  const T* from = (const T*)m.data + first * m.row;
  if (m.col == 1) return transpose(from, m.row, to.count, n, to.at(b, 0) + lane, kWidth<T>);
  for (int64_t c = 0; c < to.count; ++c) {
    for (int64_t r = 0; r < n; ++r) to.at(b, c)[lane + r] = from[r * m.row + c * m.col];
  }
}

// Lanes after the last row hold it again, so that they have no NaN of their own; `Clear`: they hold 0.
template <bool Clear, class T>
void fill_lanes(const ProgramTile<T>& t, const Columns<T>& to, int64_t b) {
  const int64_t n = rows_of(t, b);
  for (int64_t c = 0; c < to.count && n < kWidth<T>; ++c)
    fill(to.at(b, c) + n, Clear ? T(0) : to.at(b, c)[n - 1], kWidth<T> - n);
}

// reads the tile's rows of a matrix
template <bool Clear, class T>
void load_rows(const ProgramTile<T>& t, const ProgramMatrix& m, const Columns<T>& to) {
  for (int64_t b = 0; b < t.blocks; ++b) {
    load_lanes(m, t.row + b * kWidth<T>, rows_of(t, b), to, b, 0);
    fill_lanes<Clear>(t, to, b);
  }
}

// reads what the tile's rows have in a matrix with the rows of the context, from column `first` on
template <class T>
void load_given(const ProgramTile<T>& t, const ProgramMatrix& m, int64_t first, const Columns<T>& to) {
  const int64_t rows = t.args.context_rows, repeats = t.args.repeats;
  const ProgramMatrix some{m.data + first * m.col * int64_t(sizeof(T)), m.row, m.col};
  for (int64_t b = 0; b < t.blocks; ++b) {
    const int64_t n = rows_of(t, b);
    for (int64_t lane = 0, count; lane < n; lane += count) {
      const int64_t row = t.row + b * kWidth<T> + lane, of_context = row / repeats % rows;
      count = smaller(n - lane, repeats > 1 ? repeats - row % repeats : rows - of_context);
      if (repeats == 1) {
        load_lanes(some, of_context, count, to, b, lane);
        continue;
      }
      const T* from = (const T*)some.data + of_context * m.row;
      for (int64_t c = 0; c < to.count; ++c) fill(to.at(b, c) + lane, from[c * m.col], count);
    }
    fill_lanes<false>(t, to, b);
  }
}

template <class T>
void store_rows(const ProgramTile<T>& t, const Columns<T>& from, const ProgramMatrix& m) {
  for (int64_t b = 0; b < t.blocks; ++b) {
    T* to = (T*)m.data + (t.row + b * kWidth<T>)*m.row;
    transpose(from.at(b, 0), kWidth<T>, rows_of(t, b), from.count, to, m.row);
  }
}

// adds a column to the lanes of a sum over rows
template <class T>
PYFLOW_FN void add_lanes(int64_t block, const T* __restrict column, T* __restrict lanes) {
  constexpr int step = kWidth<T> < kProgramLanes ? kWidth<T> : int(kProgramLanes);
  // blocks of fewer rows than lanes take turns
  lanes += block * kWidth<T> % kProgramLanes;
  for (int r = 0; r < kWidth<T>; r += step) {
#pragma omp simd
    for (int j = 0; j < step; ++j) {
      lanes[j] += column[r + j];
    }
  }
}

// the lanes of entry i of the gradient of a weight that is a vector
template <class T>
PYFLOW_FN T* lanes_of(const ProgramTile<T>& t, int64_t place, int64_t i) {
  return t.sums + t.back->sum[place].offset + i * kProgramLanes;
}

// the gradient of a vector whose entries are added to the columns of g
template <class T>
void add_lanes(const ProgramTile<T>& t, const ProgramWeight& w, const Columns<T>& g) {
  if (!t.sums || !w.data) return;
  for (int64_t b = 0; b < t.blocks; ++b) {
    for (int64_t i = 0; i < g.count; ++i) add_lanes(b, g.at(b, i), lanes_of(t, w.place, i));
  }
}

}  // namespace pyflow::PYFLOW_ISA
