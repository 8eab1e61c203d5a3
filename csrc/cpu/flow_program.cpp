// Programs of flows: tile by tile, all instructions forward; in the backward forward again with everything that they
// need kept on a tape, but for what the forward has left, then back.
#include "../args/flow_program.h"

#include "program/additive.h"
#include "program/affine.h"
#include "program/autoregressive.h"
#include "program/linear.h"
#include "program/multiplicative.h"
#include "program/net.h"
#include "program/prior.h"
#include "program/scale.h"
#include "program/spline.h"
#include "program/uniform.h"
#include "program/wrap.h"

namespace pyflow::PYFLOW_ISA {
namespace {

// a tile without its rows
template <class T>
ProgramTile<T> new_tile(const ProgramArgs& a, const ProgramBackward* back) {
  T* next = (T*)a.memory;
  const auto take = [&](int64_t columns) {
    next += a.tile_rows * columns;
    return next - a.tile_rows * columns;
  };
  ProgramTile<T> t{a, back};
  t.state = {take(a.columns), a.columns};
  t.context = {take(a.context_columns), a.context_columns};
  t.scratch = {take(a.width), a.width};
  t.tape = take(a.tape);
  if (!back) return t;
  t.grad = {take(a.columns), a.columns};
  t.grad_context = {take(a.context_columns), a.context_columns};
  t.grad_solve = take(back->solve_columns);
  t.arrays = take(back->arrays * a.width);
  t.turned = take(round_up(a.width, kProgramPad));
  return t;
}

template <class T>
void place_rows(ProgramTile<T>& t, int64_t row, int64_t rows) {
  t.row = row;
  t.rows = rows;
  t.blocks = ceil_div(rows, kWidth<T>);
  t.kept = (T*)t.args.kept + row * t.args.kept_columns;
}

template <class T>
void run_forward(const ProgramTile<T>& t) {
  load_rows<false>(t, t.args.x, t.state);
  if (t.context.count) load_given(t, t.args.context, 0, t.context);
  fill(t.logdet, 0.0, t.padded());
  for (int64_t i = 0; i < t.args.instructions; ++i) {
    const ProgramInstruction& in = t.args.instruction[i];
    as_constant(in.kind, [&](auto kind) { Rule<kind.value>::forward(t, in); });
  }
}

template <class T>
void run_backward(const ProgramTile<T>& t) {
  for (int64_t i = t.args.instructions - 1; i >= 0; --i) {
    const ProgramInstruction& in = t.args.instruction[i];
    as_constant(in.kind, [&](auto kind) { Rule<kind.value>::backward(t, in); });
  }
}

template <class T>
void store_outputs(const ProgramTile<T>& t) {
  const ProgramArgs& a = t.args;
  if (a.output_count) {
    const Columns<T> y{t.scratch.data, a.output_count};
    for (int64_t b = 0; b < t.blocks; ++b) {
      for (int64_t i = 0; i < a.output_count; ++i) copy_column(t.state.at(b, a.outputs[i]), y.at(b, i));
    }
    store_rows(t, y, a.y);
  }
  T* logdet = (T*)a.logdet + t.row;
  for (int64_t r = 0; r < t.rows; ++r) logdet[r] = T(t.logdet[r]);
}

// what a part makes of the context alone
template <class T>
void run_context(const ProgramTile<T>& t, const ProgramPart& part) {
  Factor<T> f = factor<T>(part);
  f.weight += part.first;
  const Columns<T> to{t.scratch.data, part.size};
  product<false>(f, t.context, to, t.blocks);
  if (part.kind == Part::context) activate_all(t, part, to.data, to.data);
  ProgramMatrix products = t.args.products;
  products.data += part.once * int64_t(sizeof(T));
  store_rows(t, to, products);
}

// a unit is a tile of rows of the context
template <class T>
void context_units(const ProgramArgs& a, int64_t begin, int64_t end) {
  ProgramTile<T> t = new_tile<T>(a, nullptr);
  for (int64_t u = begin; u < end; ++u) {
    place_rows(t, u * a.tile_rows, smaller(a.tile_rows, a.context_rows - u * a.tile_rows));
    load_rows<false>(t, a.context, t.context);
    for (int64_t i = 0; i < a.instructions; ++i) {
      const ProgramInstruction& in = a.instruction[i];
      for (int64_t k = 0; k < in.part_count; ++k) {
        if (in.parts[k].joins || in.parts[k].kind == Part::context) run_context(t, in.parts[k]);
      }
    }
  }
}

template <class T>
void forward_units(const ProgramArgs& a, int64_t begin, int64_t end) {
  double logdet[kProgramMostRows];
  ProgramTile<T> t = new_tile<T>(a, nullptr);
  t.logdet = logdet;
  const int64_t tiles = ceil_div(a.unit_rows, a.tile_rows);
  for (int64_t k = begin; k < end; ++k) {
    const int64_t row = k / tiles * a.unit_rows + k % tiles * a.tile_rows;
    const int64_t last = smaller((k / tiles + 1) * a.unit_rows, a.rows);
    if (row >= last) continue;
    place_rows(t, row, smaller(a.tile_rows, last - row));
    run_forward(t);
    store_outputs(t);
    // blocks that another instruction set would have
    if (a.kept)
      fill(t.kept + a.kept_columns * t.padded(), T(0), a.kept_columns * (round_up(t.rows, kProgramRows) - t.padded()));
  }
}

// the gradients of y and logdet
template <class T>
void load_gradients(const ProgramTile<T>& t) {
  const ProgramBackward& a = *t.back;
  fill(t.grad.data, T(0), t.grad.count * t.padded());
  fill(t.grad_context.data, T(0), t.grad_context.count * t.padded());
  fill(t.grad_logdet, T(0), t.padded());
  if (a.grad_y.data) {
    const Columns<T> gy{t.scratch.data, a.output_count};
    load_rows<true>(t, a.grad_y, gy);
    for (int64_t b = 0; b < t.blocks; ++b) {
      for (int64_t i = 0; i < a.output_count; ++i) add_column(gy.at(b, i), t.grad.at(b, a.outputs[i]));
    }
  }
  const T* given = (const T*)a.grad_logdet.data + t.row * a.grad_logdet.row;
  for (int64_t r = 0; a.grad_logdet.data && r < t.rows; ++r) t.grad_logdet[r] = given[r * a.grad_logdet.row];
}

template <class T>
void backward_units(const ProgramBackward& a, int64_t begin, int64_t end) {
  double logdet[kProgramMostRows];
  alignas(64) T grad_logdet[kProgramMostRows];
  ProgramTile<T> t = new_tile<T>(a, &a);
  t.logdet = logdet;
  t.grad_logdet = grad_logdet;
  for (int64_t u = begin; u < end; ++u) {
    t.sums = a.sum ? (T*)a.group_sums + u * a.group_size : nullptr;
    for (int64_t k = 0; t.sums && k < a.sums; ++k) {
      if (!a.sum[k].written()) fill(t.sums + a.sum[k].offset, T(0), a.sum[k].size());
    }
    const int64_t last = smaller((u + 1) * a.unit_rows, a.rows);
    for (int64_t row = u * a.unit_rows; row < last; row += a.tile_rows) {
      place_rows(t, row, smaller(a.tile_rows, last - row));
      t.adds = row > u * a.unit_rows;
      run_forward(t);
      load_gradients(t);
      run_backward(t);
      if (a.grad_x.data) store_rows(t, t.grad, a.grad_x);
      if (a.grad_context.data) store_rows(t, t.grad_context, a.grad_context);
    }
  }
}

// the factors and the log-determinant of a scale
template <class T>
void prepare_scale(const ProgramInstruction& in) {
  *in.logdet = 0;
  if (!in.log_scale) return;
  const T* __restrict log_scale = (const T*)in.log_scale;
  T* __restrict factor = (T*)in.factor;
  const T sign = in.inverse ? T(-1) : T(1);
  for (int64_t i = 0; i < in.count; ++i) *in.logdet += double(sign * log_scale[i]);
#pragma omp simd
  for (int64_t i = 0; i < in.count; ++i) {
    factor[i] = exp_(sign * log_scale[i]);
  }
}

// the masked weights of a net
template <class T>
void prepare_net(const ProgramInstruction& in) {
  for (int64_t k = 0; k < in.part_count; ++k) {
    const ProgramPart& part = in.parts[k];
    if (!part.mask.data) continue;
    const T *weight = (const T*)part.weight.data, *mask = (const T*)part.mask.data;
    for (int64_t i = 0; i < part.size * part.inputs; ++i) ((T*)part.masked)[i] = weight[i] * mask[i];
  }
}

// the weights of an autoregressive inverse
template <class T>
void prepare_solve(const ProgramSolve& s) {
  for (int64_t k = 0; k < s.ordered_count; ++k) {
    const ProgramOrdered& o = s.ordered[k];
    const T *weight = (const T*)o.weight.data, *mask = (const T*)o.mask;
    T* to = (T*)o.to;
    for (int64_t i = 0; i < o.row_count; ++i) {
      const int64_t row = o.rows[i] * o.col_count;
      for (int64_t j = 0; j < o.col_count; ++j) {
        const int64_t at = row + (o.cols ? o.cols[j] : j);
        *to++ = mask ? weight[at] * mask[at] : weight[at];
      }
    }
  }
}

// what of an instruction is the same for all rows
template <class T>
void prepare_units(const ProgramArgs& a, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) {
    const ProgramInstruction& in = a.instruction[k];
    if (in.kind == Instruction::scale) prepare_scale<T>(in);
    if (in.kind == Instruction::net) prepare_net<T>(in);
    if (in.kind == Instruction::autoregressive) prepare_solve<T>(*in.solve);
  }
}

constexpr int64_t kReduced = 64;  // entries that are added together
static_assert(kReduced % kProgramLanes == 0);

// adds entries [first, first + n) of the sums over the groups, pairwise
template <class T>
void add_groups(const ProgramBackward& a, int64_t first, int64_t n, T* __restrict out) {
  const auto of_group = [&](int64_t g) { return (const T*)a.group_sums + g * a.group_size + first; };
  if (a.groups == 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = of_group(0)[i];
    return;
  }
  alignas(64) T value[kProgramGroups / 2][kReduced];
  const int64_t half = next_power_of_two(a.groups) / 2;
  for (int64_t g = 0; g < half; ++g) {
    const T* __restrict p = of_group(g);
    const T* __restrict q = g + half < a.groups ? of_group(g + half) : nullptr;
    for (int64_t i = 0; q && i < n; ++i) value[g][i] = p[i] + q[i];
    for (int64_t i = 0; !q && i < n; ++i) value[g][i] = p[i];
  }
  for (int64_t width = half / 2; width > 0; width /= 2) {
    for (int64_t g = 0; g < width; ++g) {
      for (int64_t i = 0; i < n; ++i) value[g][i] += value[g + width][i];
    }
  }
  for (int64_t i = 0; i < n; ++i) out[i] = value[0][i];
}

template <class T>
void reduce_matrix(const ProgramBackward& a, const ProgramSum& s) {
  alignas(64) T sum[kReduced];
  T* grad = (T*)s.grad;
  const T* mask = (const T*)s.mask;
  const bool moved = s.transposed || s.row_order || s.col_order;
  for (int64_t i = 0; i < s.rows; ++i) {
    const int64_t row = s.row_order ? s.row_order[i] : i;
    for (int64_t c = 0; c < s.cols; c += kReduced) {
      const int64_t n = smaller(kReduced, s.cols - c);
      add_groups(a, s.offset + i * s.width + c, n, moved ? sum : grad + i * s.cols + c);
      for (int64_t j = 0; moved && j < n; ++j) {
        const int64_t col = s.col_order ? s.col_order[c + j] : c + j;
        grad[s.transposed ? col * s.rows + row : row * s.cols + col] = sum[j];
      }
    }
  }
  for (int64_t i = 0; mask && i < s.rows * s.cols; ++i) grad[i] *= mask[i];
}

template <class T>
void reduce_vector(const ProgramBackward& a, const ProgramSum& s) {
  alignas(64) T lanes[kReduced];
  for (int64_t i = 0; i < s.rows; i += kReduced / kProgramLanes) {
    const int64_t n = smaller(kReduced / kProgramLanes, s.rows - i);
    add_groups(a, s.offset + i * kProgramLanes, n * kProgramLanes, lanes);
    for (int64_t j = 0; j < n; ++j) {
      ((T*)s.grad)[s.row_order ? s.row_order[i + j] : i + j] = fold<kProgramLanes>(lanes + j * kProgramLanes);
    }
  }
}

template <class T>
void reduce_units(const ProgramBackward& a, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) a.sum[k].matrix ? reduce_matrix<T>(a, a.sum[k]) : reduce_vector<T>(a, a.sum[k]);
}

// the gradients of rows [begin, end) of the context
template <class T>
void reduce_context_units(const ProgramBackward& a, int64_t begin, int64_t end) {
  const int64_t step = a.context_rows * a.repeats;
  for (int64_t k = begin; k < end; ++k) {
    for (int64_t c = 0; c < a.context_columns; c += kReduced) {
      const int64_t n = smaller(kReduced, a.context_columns - c);
      double sum[kReduced] = {};
      for (int64_t first = k * a.repeats; first < a.rows; first += step) {
        for (int64_t row = first; row < first + a.repeats; ++row) {
          const T* __restrict grad = (const T*)a.grad_context.data + row * a.grad_context.row + c;
#pragma omp simd
          for (int64_t j = 0; j < n; ++j) {
            sum[j] += double(grad[j]);
          }
        }
      }
      T* to = (T*)a.of_context.data + k * a.of_context.row + c;
      for (int64_t j = 0; j < n; ++j) to[j] = T(sum[j]);
    }
  }
}

}  // namespace

void flow_program_prepare(const ProgramArgs& a, int64_t begin, int64_t end) {
  a.f64 ? prepare_units<double>(a, begin, end) : prepare_units<float>(a, begin, end);
}

void flow_program_context(const ProgramArgs& a, int64_t begin, int64_t end) {
  a.f64 ? context_units<double>(a, begin, end) : context_units<float>(a, begin, end);
}

void flow_program_forward(const ProgramArgs& a, int64_t begin, int64_t end) {
  a.f64 ? forward_units<double>(a, begin, end) : forward_units<float>(a, begin, end);
}

void flow_program_backward(const ProgramBackward& a, int64_t begin, int64_t end) {
  a.f64 ? backward_units<double>(a, begin, end) : backward_units<float>(a, begin, end);
}

void flow_program_reduce(const ProgramBackward& a, int64_t begin, int64_t end) {
  a.f64 ? reduce_units<double>(a, begin, end) : reduce_units<float>(a, begin, end);
}

void flow_program_reduce_context(const ProgramBackward& a, int64_t begin, int64_t end) {
  a.f64 ? reduce_context_units<double>(a, begin, end) : reduce_context_units<float>(a, begin, end);
}

}  // namespace pyflow::PYFLOW_ISA
