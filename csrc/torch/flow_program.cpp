#include "../args/flow_program.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "memory.h"
#include "program_reader.h"

namespace pyflow {
namespace {

constexpr int64_t kMostProducts = int64_t(1) << 26;  // numbers

// rows of a tile: at least eight tiles to share among threads, as long as they are not too small
int64_t rows_of_tile(int64_t rows) {
  const int64_t share = round_up(ceil_div(rows, 8), kProgramRows);
  return std::min(std::max(share, kProgramRows), kProgramForwardRows);
}

// runs the kernel over all units; every thread has memory of its own
template <class Args>
void run_tiles(void (*kernel)(const Args&, int64_t, int64_t), const Args& a, int64_t units, int64_t grain) {
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    const int64_t bytes = program_memory(a) * (a.f64 ? 8 : 4);
    const Memory memory(bytes);
    Args mine = a;
    mine.memory = memory.data;
    kernel(mine, begin, end);
  });
}

// Whether the products of a row of the context cost more than reading them for every row of x that shares it. A number
// costs as much as some multiply-adds: equal lanes are filled, runs of other rows transposed.
bool shares_products(const ProgramArgs& a, int64_t products) {
  if (a.context_rows * products > kMostProducts) return false;
  const int64_t reading = a.repeats >= 16 ? 4 : a.repeats >= 8 ? 12 : 28;
  return products > 0 && (a.rows - a.context_rows) * a.context_columns >= a.rows * reading;
}

// the sum of the gradients of the weight at a place: a matrix as (rows, cols), or transposed where that wastes less
// padding
ProgramSum sum_of(const Tensor& w, const Reader& reader, size_t place) {
  ProgramSum s{};
  s.uses = reader.uses()[place];
  s.mask = reader.masks()[place];
  s.matrix = w.dim() == 2 && !reader.in_lanes(place);
  s.rows = s.matrix ? w.size(0) : w.numel();
  s.cols = s.matrix ? w.size(1) : 1;
  s.transposed = s.matrix && round_up(s.cols, kProgramPad) * s.rows > round_up(s.rows, kProgramPad) * s.cols;
  if (const ProgramOrdered* o = reader.ordered(int64_t(place))) {
    s.partial = true;
    s.row_order = o->rows;
    s.col_order = o->cols;
  }
  if (s.transposed) {
    std::swap(s.rows, s.cols);
    std::swap(s.row_order, s.col_order);
  }
  s.width = s.matrix ? round_up(s.cols, kProgramPad) : kProgramLanes;
  if (s.uses == 0) s.rows = 0;  // not used, or a constant
  return s;
}

// elements of the sums of a group
int64_t size_of_group(const Tensors& weights, const Reader& reader) {
  int64_t size = 0;
  for (size_t i = 0; i < weights.size(); ++i) size += sum_of(weights[i], reader, i).size();
  return size;
}

// Rows of a group whose sums have `size` elements. Groups are of equal size; the memory of their sums is limited; and
// large sums are not for few rows, since they would cost more than the products. But four threads have work.
int64_t rows_of_group(int64_t rows, int64_t size) {
  int64_t groups = kProgramGroups;
  while (groups > 4 && groups * size > (int64_t(1) << 24)) groups /= 2;
  const auto share = [&](int64_t parts) { return round_up(ceil_div(rows, parts), kProgramRows); };
  const int64_t few = kProgramMostRows / 2;
  const int64_t least = size > (1 << 16) ? std::min(std::max(share(4), few), kProgramMostRows) : few;
  return std::max(share(groups), least);
}

// sets the units of the backward and their tiles
void set_units(ProgramArgs& a, int64_t group_size) {
  a.unit_rows = rows_of_group(a.rows, group_size);
  a.tile_rows = round_up(ceil_div(a.unit_rows, ceil_div(a.unit_rows, kProgramMostRows)), kProgramRows);
}

// what is kept is (rows, columns), with rows for whole blocks
int64_t kept_rows(int64_t rows) { return round_up(rows, kProgramRows); }

std::tuple<Tensor, Tensor, Tensor> flow_program(Tensor x, Optional context, int64_t repeats, Tensors weights,
                                                std::string code, int64_t keep) {
  ProgramArgs a{};
  Reader reader(a, x, context, repeats, weights, code, false, keep > 0);
  require(keep == a.kept_columns);
  const int64_t sizes[] = {a.rows, a.output_count};
  Tensor y = new_empty(x, sizes, 2, x.scalar_type()), logdet = new_rows(x, a.rows, x.scalar_type());
  Tensor kept = keep ? new_reused(x, kept_rows(a.rows), keep, a.f64) : new_none(x, x.scalar_type());
  if (a.rows == 0) return {y, logdet, kept};
  a.y = Reader::rows_of(y);
  a.logdet = (char*)logdet.data_ptr();
  if (keep) {
    set_units(a, size_of_group(weights, reader));
    a.kept = (char*)kept.data_ptr();
  } else {
    a.unit_rows = a.tile_rows = rows_of_tile(a.rows);
  }
  reader.prepare(x);
  Tensor products;
  if (!keep && shares_products(a, reader.products())) {
    products = new_rows(x, a.context_rows * reader.products(), x.scalar_type());
    a.products = {(char*)products.data_ptr(), reader.products(), 1};
    run_tiles(cpu::flow_program_context, a, ceil_div(a.context_rows, a.tile_rows), 1);
  }
  const int64_t tiles = ceil_div(a.rows, a.unit_rows) * ceil_div(a.unit_rows, a.tile_rows);
  run_tiles(cpu::flow_program_forward, a, tiles, reader.grain());
  return {y, logdet, kept};
}

Tensors flow_program_backward(Optional grad_y, Optional grad_logdet, Tensor x, Optional context, int64_t repeats,
                              Tensors weights, std::string code, Optional kept, bool need_x, bool need_context,
                              bool need_weights) {
  ProgramBackward a{};
  const bool given = kept && kept->numel() > 0;
  Reader reader(a, x, context, repeats, weights, code, true, given);
  const auto result = [&](const Tensor& like, bool needed) {
    const auto sizes = like.sizes();
    return needed ? new_empty(like, sizes.data(), like.dim(), x.scalar_type()) : new_none(x, x.scalar_type());
  };
  Tensors grads{result(x, need_x), context ? result(*context, need_context) : new_none(x, x.scalar_type())};
  Tensors of_weights;
  for (const Tensor& w : weights) of_weights.push_back(result(w, need_weights));
  grads.insert(grads.end(), of_weights.begin(), of_weights.end());
  if (a.rows == 0) {
    for (Tensor& grad : grads) torch::stable::zero_(grad);
    return grads;
  }
  if (grad_y) {
    require(grad_y->dim() == 2 && grad_y->size(0) == a.rows && grad_y->size(1) == a.output_count);
    a.grad_y = Reader::rows_of(*grad_y);
  }
  if (grad_logdet) {
    require(grad_logdet->dim() == 1 && grad_logdet->size(0) == a.rows);
    a.grad_logdet = Reader::rows_of(*grad_logdet);
  }
  if (need_x) a.grad_x = Reader::rows_of(grads[0]);
  Tensor of_rows;
  if (need_context && context) {
    a.grad_context = a.of_context = Reader::rows_of(grads[1]);
    if (a.context_rows < a.rows) {
      of_rows = new_rows(x, a.rows * a.context_columns, x.scalar_type());
      a.grad_context = {(char*)of_rows.data_ptr(), a.context_columns, 1};
    }
  }
  std::vector<ProgramSum> sums;
  for (size_t i = 0; i < weights.size(); ++i) {
    ProgramSum& s = sums.emplace_back(sum_of(weights[i], reader, i));
    s.offset = a.group_size;
    a.group_size += s.size();
  }
  set_units(a, a.group_size);
  const int64_t units = ceil_div(a.rows, a.unit_rows);
  if (given) {
    require(kept->is_contiguous() && kept->dim() == 2 && kept->scalar_type() == x.scalar_type());
    require(kept->size(0) == kept_rows(a.rows) && kept->size(1) == a.kept_columns);
    a.kept = (char*)kept->data_ptr();
  }
  a.arrays = reader.gradient_arrays();
  a.solve_columns = reader.solve_columns();
  reader.prepare(x);
  std::optional<Memory> memory;
  if (need_weights && !sums.empty()) {
    for (size_t i = 0; i < sums.size(); ++i) {
      sums[i].grad = (char*)of_weights[i].data_ptr();
      if (sums[i].uses == 0) torch::stable::zero_(of_weights[i]);
    }
    a.sum = sums.data();
    a.sums = int64_t(sums.size());
    a.groups = units;
    memory.emplace(units * a.group_size * int64_t(x.element_size()));
    a.group_sums = memory->data;
  }
  run_tiles(cpu::flow_program_backward, a, units, reader.grain());
  run_units(cpu::flow_program_reduce, a, 0, a.sums, 1);
  if (a.grad_context.data != a.of_context.data) {
    const int64_t size = a.rows / a.context_rows * a.context_columns;
    run_units(cpu::flow_program_reduce_context, a, 0, a.context_rows, ceil_div(kGrain, 8 * size));
  }
  return grads;
}

}  // namespace

PYFLOW_OPERATORS(m) {
  m.impl("flow_program", TORCH_BOX(&flow_program));
  m.impl("flow_program_backward", TORCH_BOX(&flow_program_backward));
}

}  // namespace pyflow
