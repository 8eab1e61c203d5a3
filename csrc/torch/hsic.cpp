#include "../args/hsic.h"

#include <algorithm>
#include <vector>

#include "device.h"

namespace pyflow {
namespace {

// runs the kernel on [0, units); inline when already inside a parallel region
template <class Args>
void run_if_any(void (*kernel)(const Args&, int64_t, int64_t), const Args& a, int64_t units, int64_t grain) {
  if (units > 0) run_units(kernel, a, 0, units, grain);
}

int64_t this_thread() {
  uint32_t thread = 0;
  TORCH_ERROR_CODE_CHECK(torch_get_thread_idx(&thread));
  return thread;
}

// the variables of a call, contiguous, with the offsets of their packed rows in an item's workspace
struct Variables {
  std::vector<Tensor> z;
  Tensor scale;
  std::vector<GramVariable> list;

  Variables(GramArgs& a, const std::vector<Tensor>& given, const Tensor& scale_, const std::vector<int64_t>& kernels,
            const std::vector<int64_t>& degrees, const std::vector<int64_t>& pairs, bool backward)
      : scale(torch::stable::contiguous(scale_)) {
    const int64_t n = given[0].size(1);
    a.f64 = is_f64(scale);
    a.tournament = tournament_of(n);
    a.padded = round_up(n, kPad);
    a.variables = int64_t(given.size());
    a.pairs = int64_t(pairs.size()) / 2;
    a.pair = pairs.data();
    for (size_t m = 0; m < given.size(); ++m) {
      z.push_back(torch::stable::contiguous(given[m]));
      GramVariable v{};
      v.kernel = GramKernel(kernels[m]);
      v.degree = int(degrees[m]);
      v.dim = z[m].size(2);
      v.first = a.columns;
      v.strips = a.workspace_size;
      v.rows = -1;
      v.z = (const char*)z[m].data_ptr();
      a.columns += v.dim;
      if (v.kernel != GramKernel::precomputed) {
        v.width = round_up(v.dim, 8);
        a.workspace_size += a.padded * v.dim;
        if (backward) {
          v.rows = a.workspace_size;
          a.workspace_size += a.padded * v.width;
        }
      }
      list.push_back(v);
    }
    a.variable = list.data();
    a.scale = (const char*)scale.data_ptr();
    a.parts = 1;
  }
};

// buffers that the groups of a call reuse: one set per team
struct Workspace {
  Tensor shift, centres, packed, halves, scratch;
  int64_t scratch_bytes;

  Workspace(GramArgs& a, const Tensor& scale, const GramSchedule& s, bool backward)
      : scratch_bytes(round_up(scratch_of(a, backward), 64)) {
    const int64_t sizes[] = {s.batch, a.variables}, items = s.teams * s.items;
    const ScalarType dtype = scale.scalar_type();
    shift = new_empty(scale, sizes, 2, ScalarType::Double);
    centres = new_rows(scale, items * a.columns, dtype);
    packed = new_rows(scale, items * a.workspace_size, dtype);
    halves = new_rows(scale, items * a.variables * a.padded, dtype);
    scratch = new_rows(scale, torch::stable::get_num_threads() * scratch_bytes / 8, ScalarType::Double);
    a.shift = (double*)shift.data_ptr();
    a.centres = (char*)centres.data_ptr();
    a.workspace = (char*)packed.data_ptr();
    a.halves = (char*)halves.data_ptr();
  }

  // moves the pointers to the team's buffers
  static void select(GramArgs& a, const GramSchedule& s, int64_t team) {
    const int64_t bytes = team * s.items * (a.f64 ? 8 : 4);
    a.centres += bytes * a.columns;
    a.workspace += bytes * a.workspace_size;
    a.halves += bytes * a.variables * a.padded;
  }

  char* scratch_of_thread(int64_t thread) const { return (char*)scratch.data_ptr() + thread * scratch_bytes; }
};

// calls work(args, team) for every group of items
template <class Args, class F>
void for_each_item_group(const Args& args, const GramSchedule& s, F work) {
  const auto groups = [&](int64_t begin, int64_t end, int64_t team) {
    Args a = args;
    Workspace::select(a, s, team);
    for (a.item = begin; a.item < end; a.item += s.items) {
      a.items = end - a.item < s.items ? end - a.item : s.items;
      work(a, team);
    }
  };
  if (s.teams == 1) return groups(0, s.batch, 0);
  torch::stable::parallel_for(0, s.batch, 1, [&](int64_t begin, int64_t end) { groups(begin, end, this_thread()); });
}

// strips of all items and variables
int64_t strips(const GramArgs& a) { return a.items * a.variables * (a.padded / kPad); }
int64_t strip_grain(const GramArgs& a) { return grain_of(kPad * a.columns / (a.variables + 1)); }

void pack(const GramArgs& a) {
  run_if_any(cpu::gram_stats, a, a.items * a.variables, grain_of(a.tournament.n * a.columns / (a.variables + 1)));
  run_if_any(cpu::gram_pack, a, strips(a), strip_grain(a));
}

// runs the kernel on every tile of a group, round by round, with scratch per thread; with several teams a team is one
// thread
template <class Args>
void run_rounds(Args& a, const GramSchedule& s, const Workspace& workspace, int64_t team,
                void (*kernel)(const Args&, int64_t, int64_t)) {
  const int64_t grain = grain_of(a.tournament.block * a.tournament.block * (a.columns + 16));
  for (a.round = 0; a.round < a.tournament.seats; ++a.round) {
    const int64_t tiles = a.items * tiles_of(a.tournament, a.round);
    if (tiles == 0) continue;
    torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
      Args own = a;
      own.scratch = workspace.scratch_of_thread(s.teams > 1 ? team : this_thread());
      kernel(own, begin, end);
    });
  }
}

GramSchedule schedule_of(const GramArgs& a, const Tensor& scale) {
  return gram_schedule(scale.size(0), a.workspace_size * (a.f64 ? 8 : 4), torch::stable::get_num_threads());
}

// memset may not take the null pointer of an empty tensor
void fill_zero(void* data, int64_t count) { std::fill_n((double*)data, count, 0.0); }

std::tuple<Tensor, Tensor, Tensor> hsic_sums(std::vector<Tensor> z, Tensor scale, std::vector<int64_t> kernels,
                                             std::vector<int64_t> degrees, std::vector<int64_t> pairs, bool,
                                             int64_t part, int64_t parts) {
  GramSums args{};
  const Variables variables(args, z, scale, kernels, degrees, pairs, false);
  const GramSchedule schedule = schedule_of(args, scale);
  const Workspace workspace(args, scale, schedule, false);
  args.part = part;
  args.parts = parts;
  const int64_t sizes[] = {schedule.batch, args.variables, args.tournament.n},
                cross_sizes[] = {schedule.batch, args.pairs};
  Tensor rows = new_empty(scale, sizes, 3, ScalarType::Double);
  Tensor cross = new_empty(scale, cross_sizes, 2, ScalarType::Double);
  fill_zero(rows.data_ptr(), rows.numel());
  const int64_t tiles = first_tile(args.tournament, args.tournament.seats), group = schedule.items * tiles * args.pairs;
  Tensor partial = new_rows(scale, schedule.teams * group, ScalarType::Double);
  args.rows = (double*)rows.data_ptr();
  for_each_item_group(args, schedule, [&](GramSums& a, int64_t team) {
    a.cross = (double*)partial.data_ptr() + team * group;
    fill_zero(a.cross, group);
    pack(a);
    run_rounds(a, schedule, workspace, team, cpu::gram_sums);
    for (int64_t i = 0; i < a.items; ++i) {
      for (int64_t k = 0; k < a.pairs; ++k) {
        double total = 0;
        for (int64_t t = 0; t < tiles; ++t) total += a.cross[(i * tiles + t) * a.pairs + k];
        ((double*)cross.data_ptr())[(a.item + i) * a.pairs + k] = total;
      }
    }
  });
  return {rows, cross, workspace.shift};
}

// whether a gradient leaves the range in which float32 can hold its products with kernel values and their slopes
bool beyond_float(const Tensor& contiguous) {
  const double* v = (const double*)contiguous.data_ptr();
  bool beyond = false;
  for (int64_t i = 0; i < contiguous.numel(); ++i) beyond |= __builtin_fabs(v[i]) > 0x1p100;
  return beyond;
}

std::vector<Tensor> hsic_sums_backward(Tensor grad_rows, Tensor grad_cross, std::vector<Tensor> z, Tensor scale,
                                       std::vector<int64_t> kernels, std::vector<int64_t> degrees,
                                       std::vector<int64_t> pairs, bool) {
  const Tensor rows = torch::stable::contiguous(grad_rows), cross = torch::stable::contiguous(grad_cross);
  if (!is_f64(scale) && (beyond_float(rows) || beyond_float(cross))) {
    // ratios of sums over rows that are all far apart: kernel values of 1e-20, gradients of their sums of 1e60
    const auto cast = [](std::vector<Tensor> list, ScalarType dtype) {
      for (Tensor& t : list) t = torch::stable::to(t, dtype);
      return list;
    };
    const Tensor scale64 = torch::stable::to(scale, ScalarType::Double);
    return cast(hsic_sums_backward(rows, cross, cast(z, ScalarType::Double), scale64, kernels, degrees, pairs, false),
                scale.scalar_type());
  }
  GramBackward args{};
  Variables variables(args, z, scale, kernels, degrees, pairs, true);
  const GramSchedule schedule = schedule_of(args, scale);
  const Workspace workspace(args, scale, schedule, true);
  const int64_t sums_size = schedule.items * args.variables * args.padded, size = schedule.items * args.workspace_size;
  std::vector<Tensor> grads;
  for (size_t m = 0; m < z.size(); ++m) {
    grads.push_back(new_like(variables.z[m]));
    variables.list[m].grad = (char*)grads[m].data_ptr();
  }
  Tensor sums = new_rows(scale, schedule.teams * sums_size, ScalarType::Double);
  Tensor grad_workspace = new_rows(scale, schedule.teams * size, scale.scalar_type());
  args.grad_rows = (const double*)rows.data_ptr();
  args.grad_cross = (const double*)cross.data_ptr();
  for_each_item_group(args, schedule, [&](GramBackward& a, int64_t team) {
    a.weight_sums = (double*)sums.data_ptr() + team * sums_size;
    a.grad_workspace = (char*)grad_workspace.data_ptr() + team * size * int64_t(scale.element_size());
    pack(a);
    run_if_any(cpu::gram_clear, a, strips(a), strip_grain(a));
    run_rounds(a, schedule, workspace, team, cpu::gram_backward);
    run_if_any(cpu::gram_finish, a, a.items * a.tournament.n, grain_of(a.columns));
  });
  return grads;
}

// the tensors that arguments of hsic_terms point to, contiguous
struct TermTensors {
  Tensor rows, shift;

  TermTensors(TermsArgs& a, const Tensor& rows_, const Tensor& shift_, const Tensor& diagonals,
              const std::vector<int64_t>& pairs, bool unbiased)
      : rows(torch::stable::contiguous(rows_)), shift(torch::stable::contiguous(shift_)) {
    a.variables = rows.size(1);
    a.n = rows.size(2);
    a.pairs = int64_t(pairs.size()) / 2;
    a.pair = pairs.data();
    a.unbiased = unbiased;
    a.rows = (const double*)rows.data_ptr();
    a.shift = (const double*)shift.data_ptr();
    a.diagonals = (const double*)diagonals.data_ptr();
    for (int64_t k = 0; k < 3; ++k) a.stride[k] = diagonals.stride(k);
  }
};

std::tuple<Tensor, Tensor, Tensor> hsic_terms(Tensor rows, Tensor cross, Tensor shift, Tensor diagonals,
                                              std::vector<int64_t> pairs, bool unbiased) {
  Terms a{};
  const TermTensors tensors(a, rows, shift, diagonals, pairs, unbiased);
  const Tensor products = torch::stable::contiguous(cross);
  const int64_t batch = rows.size(0), sizes[] = {batch, a.pairs}, totals_sizes[] = {batch, a.variables};
  Tensor more = new_empty(rows, sizes, 2, ScalarType::Double), less = new_empty(rows, sizes, 2, ScalarType::Double);
  Tensor totals = new_empty(rows, totals_sizes, 2, ScalarType::Double);
  a.cross = (const double*)products.data_ptr();
  a.more = (double*)more.data_ptr();
  a.less = (double*)less.data_ptr();
  a.totals = (double*)totals.data_ptr();
  run_if_any(cpu::hsic_terms, a, batch, grain_of(a.n * (a.variables + a.pairs)));
  return {more, less, totals};
}

std::tuple<Tensor, Tensor, Tensor> hsic_terms_backward(std::optional<Tensor> grad_more, std::optional<Tensor> grad_less,
                                                       Tensor rows, Tensor shift, Tensor diagonals, Tensor totals,
                                                       std::vector<int64_t> pairs, bool unbiased) {
  TermsBackward a{};
  const TermTensors tensors(a, rows, shift, diagonals, pairs, unbiased);
  const int64_t batch = rows.size(0), sizes[] = {batch, a.pairs}, rows_sizes[] = {batch, a.variables, a.n};
  Tensor grad_rows = new_empty(rows, rows_sizes, 3, ScalarType::Double);
  Tensor grad_diagonals = new_empty(rows, rows_sizes, 3, ScalarType::Double);
  Tensor grad_cross = new_empty(rows, sizes, 2, ScalarType::Double);
  if (grad_more) {
    torch::stable::copy_(grad_cross, *grad_more);
    a.grad_more = (const double*)grad_cross.data_ptr();
  } else {
    fill_zero(grad_cross.data_ptr(), grad_cross.numel());
  }
  std::optional<Tensor> of_less;
  if (grad_less) {
    of_less = torch::stable::contiguous(*grad_less);
    a.grad_less = (const double*)of_less->data_ptr();
  }
  const Tensor all = torch::stable::contiguous(totals);
  a.totals = (const double*)all.data_ptr();
  a.grad_rows = (double*)grad_rows.data_ptr();
  a.grad_diagonals = (double*)grad_diagonals.data_ptr();
  run_if_any(cpu::hsic_terms_backward, a, batch * a.variables, grain_of(a.n * a.pairs));
  return {grad_rows, grad_cross, grad_diagonals};
}

Tensor hsic_permuted(Tensor gram_x, Tensor gram_y, Tensor permutations) {
  const Tensor x = torch::stable::contiguous(gram_x), y = torch::stable::contiguous(gram_y);
  const Tensor p = torch::stable::contiguous(permutations);
  Tensor out = new_rows(x, p.size(0), ScalarType::Double);
  const PermutedArgs a{x.size(0),
                       (const char*)x.data_ptr(),
                       (const char*)y.data_ptr(),
                       (const int32_t*)p.data_ptr(),
                       (double*)out.data_ptr(),
                       is_f64(x)};
  run_if_any(cpu::gram_permuted, a, p.size(0), grain_of(a.n * a.n));
  return out;
}

}  // namespace

PYFLOW_OPERATORS(m) {
  m.impl("hsic_sums", TORCH_BOX(&hsic_sums));
  m.impl("hsic_sums_backward", TORCH_BOX(&hsic_sums_backward));
  m.impl("hsic_terms", TORCH_BOX(&hsic_terms));
  m.impl("hsic_terms_backward", TORCH_BOX(&hsic_terms_backward));
  m.impl("hsic_permuted", TORCH_BOX(&hsic_permuted));
}

}  // namespace pyflow
