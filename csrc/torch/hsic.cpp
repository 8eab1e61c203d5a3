#include "../args/hsic.h"

#include <cstring>
#include <vector>

#include "../cpu/dispatch.h"
#include "tensor.h"

namespace pyflow {
namespace {

// workspace of the batch items in one group, so that it stays in the caches from round to round
constexpr int64_t kWorkspaceBytes = 4 << 20;

Tensor buffer(const Tensor& like, int64_t count, ScalarType dtype) { return new_empty(like, &count, 1, dtype); }

// runs inline when already inside a parallel region
template <class F>
void in_parallel(int64_t units, int64_t grain, F f) {
  if (units > 0) torch::stable::parallel_for(0, units, grain, f);
}

int64_t this_thread() {
  uint32_t thread = 0;
  TORCH_ERROR_CODE_CHECK(torch_get_thread_idx(&thread));
  return thread;
}

// Arguments and buffers of one call. In a large batch each thread processes whole items, without barriers between
// rounds; else all threads share the tiles of a group of items. The order of an item's sums is the same in both.
struct Grams {
  std::vector<Tensor> z;
  Tensor scale, shift, centres, workspace, halves, scratch;
  std::vector<GramVariable> variables;
  int64_t batch, items, teams, scratch_bytes;

  Grams(GramArgs& a, const std::vector<Tensor>& z_, const Tensor& scale_, const std::vector<int64_t>& kernels,
        const std::vector<int64_t>& degrees, const std::vector<int64_t>& pairs, bool backward)
      : scale(torch::stable::contiguous(scale_)) {
    a.f64 = scale.scalar_type() == ScalarType::Double;
    const int64_t n = z_[0].size(1), element = int64_t(scale.element_size());
    a.tournament = tournament_of(n);
    a.padded = (n + kPad - 1) / kPad * kPad;
    a.variables = int64_t(z_.size());
    a.pairs = int64_t(pairs.size()) / 2;
    a.pair = pairs.data();
    for (size_t m = 0; m < z_.size(); ++m) {
      z.push_back(torch::stable::contiguous(z_[m]));
      GramVariable v{GramKernel(kernels[m]),       int(degrees[m]), z[m].size(2), a.columns, 0, a.workspace_size, -1,
                     (const char*)z[m].data_ptr(), nullptr};
      a.columns += v.dim;
      if (v.kernel != GramKernel::precomputed) {
        v.width = (v.dim + 7) / 8 * 8;
        a.workspace_size += a.padded * v.dim;
        if (backward) {
          v.rows = a.workspace_size;
          a.workspace_size += a.padded * v.width;
        }
      }
      variables.push_back(v);
    }
    a.variable = variables.data();
    batch = scale.size(0);
    const int64_t bytes = a.workspace_size * element, threads = torch::stable::get_num_threads();
    teams = batch >= 4 * threads && bytes <= kWorkspaceBytes ? threads : 1;
    items = bytes > 0 ? kWorkspaceBytes / bytes : batch;
    items = teams > 1 || items < 1 ? 1 : items < batch ? items : batch;
    const int64_t sizes[] = {batch, a.variables};
    shift = new_empty(scale, sizes, 2, ScalarType::Double);
    centres = buffer(scale, teams * items * a.columns, scale.scalar_type());
    workspace = buffer(scale, teams * items * a.workspace_size, scale.scalar_type());
    halves = buffer(scale, teams * items * a.variables * a.padded, scale.scalar_type());
    scratch_bytes = (scratch_of(a, backward) + 63) / 64 * 64;
    scratch = buffer(scale, threads * scratch_bytes / 8, ScalarType::Double);
    a.scale = (const char*)scale.data_ptr();
    a.shift = (double*)shift.data_ptr();
    a.centres = (char*)centres.data_ptr();
    a.workspace = (char*)workspace.data_ptr();
    a.halves = (char*)halves.data_ptr();
    a.parts = 1;
  }

  // grain of a round, from the element operations of one tile
  int64_t grain(const GramArgs& a) const {
    return grain_of(a.tournament.block * a.tournament.block * (a.columns + 16));
  }

  // calls work(args, team) for every group of items; `team` selects the buffers
  template <class A, class F>
  void each_group(const A& args, F work) {
    const auto groups = [&](int64_t begin, int64_t end, int64_t team) {
      A a = args;
      const int64_t bytes = team * items * int64_t(scale.element_size());
      a.centres += bytes * a.columns;
      a.workspace += bytes * a.workspace_size;
      a.halves += bytes * a.variables * a.padded;
      for (a.item = begin; a.item < end; a.item += items) {
        a.items = end - a.item < items ? end - a.item : items;
        work(a, team);
      }
    };
    if (teams == 1) return groups(0, batch, 0);
    in_parallel(batch, 1, [&](int64_t begin, int64_t end) { groups(begin, end, this_thread()); });
  }

  void pack(const GramArgs& a) const {
    const CpuTable& cpu = *cpu_table();
    in_parallel(a.items * a.variables, grain_of(a.tournament.n * a.columns / (a.variables + 1)),
                [&](int64_t begin, int64_t end) { cpu.gram_stats(a, begin, end); });
    in_parallel(strips(a), strip_grain(a), [&](int64_t begin, int64_t end) { cpu.gram_pack(a, begin, end); });
  }
  int64_t strips(const GramArgs& a) const { return a.items * a.variables * (a.padded / kPad); }
  int64_t strip_grain(const GramArgs& a) const { return grain_of(kPad * a.columns / (a.variables + 1)); }

  // runs the kernel on every tile, round by round, with scratch per thread; with several teams a team is one thread
  template <class A>
  void rounds(A& a, int64_t team, void (*kernel)(const A&, int64_t, int64_t)) {
    for (a.round = 0; a.round < a.tournament.seats; ++a.round) {
      in_parallel(a.items * tiles_of(a.tournament, a.round), grain(a), [&](int64_t begin, int64_t end) {
        A own = a;
        own.scratch = (char*)scratch.data_ptr() + (teams > 1 ? team : this_thread()) * scratch_bytes;
        kernel(own, begin, end);
      });
    }
  }
};

void fill_zero(void* data, int64_t count) { std::memset(data, 0, size_t(count) * sizeof(double)); }

std::tuple<Tensor, Tensor, Tensor> hsic_sums(std::vector<Tensor> z, Tensor scale, std::vector<int64_t> kernels,
                                             std::vector<int64_t> degrees, std::vector<int64_t> pairs, bool,
                                             int64_t part, int64_t parts) {
  GramSums args{};
  Grams grams(args, z, scale, kernels, degrees, pairs, false);
  args.part = part;
  args.parts = parts;
  const int64_t sizes[] = {grams.batch, args.variables, args.tournament.n}, cross_sizes[] = {grams.batch, args.pairs};
  Tensor rows = new_empty(scale, sizes, 3, ScalarType::Double);
  Tensor cross = new_empty(scale, cross_sizes, 2, ScalarType::Double);
  fill_zero(rows.data_ptr(), rows.numel());
  const int64_t tiles = first_tile(args.tournament, args.tournament.seats), group = grams.items * tiles * args.pairs;
  Tensor partial = buffer(scale, grams.teams * group, ScalarType::Double);
  args.rows = (double*)rows.data_ptr();
  grams.each_group(args, [&](GramSums& a, int64_t team) {
    a.cross = (double*)partial.data_ptr() + team * group;
    fill_zero(a.cross, group);
    grams.pack(a);
    grams.rounds(a, team, cpu_table()->gram_sums);
    for (int64_t i = 0; i < a.items; ++i) {
      for (int64_t k = 0; k < a.pairs; ++k) {
        double total = 0;
        for (int64_t t = 0; t < tiles; ++t) total += a.cross[(i * tiles + t) * a.pairs + k];
        ((double*)cross.data_ptr())[(a.item + i) * a.pairs + k] = total;
      }
    }
  });
  return {rows, cross, grams.shift};
}

std::vector<Tensor> hsic_sums_backward(Tensor grad_rows, Tensor grad_cross, std::vector<Tensor> z, Tensor scale,
                                       std::vector<int64_t> kernels, std::vector<int64_t> degrees,
                                       std::vector<int64_t> pairs, bool) {
  GramBackward args{};
  Grams grams(args, z, scale, kernels, degrees, pairs, true);
  const Tensor rows = torch::stable::contiguous(grad_rows), cross = torch::stable::contiguous(grad_cross);
  const int64_t sums_size = grams.items * args.variables * args.padded, size = grams.items * args.workspace_size;
  std::vector<Tensor> grads;
  for (size_t m = 0; m < z.size(); ++m) {
    grads.push_back(new_like(grams.z[m]));
    grams.variables[m].grad = (char*)grads[m].data_ptr();
  }
  Tensor sums = buffer(scale, grams.teams * sums_size, ScalarType::Double);
  Tensor workspace = buffer(scale, grams.teams * size, scale.scalar_type());
  args.grad_rows = (const double*)rows.data_ptr();
  args.grad_cross = (const double*)cross.data_ptr();
  const CpuTable& cpu = *cpu_table();
  grams.each_group(args, [&](GramBackward& a, int64_t team) {
    a.weight_sums = (double*)sums.data_ptr() + team * sums_size;
    a.grad_workspace = (char*)workspace.data_ptr() + team * size * int64_t(scale.element_size());
    grams.pack(a);
    in_parallel(grams.strips(a), grams.strip_grain(a),
                [&](int64_t begin, int64_t end) { cpu.gram_clear(a, begin, end); });
    grams.rounds(a, team, cpu.gram_backward);
    in_parallel(a.items * a.tournament.n, grain_of(a.columns),
                [&](int64_t begin, int64_t end) { cpu.gram_finish(a, begin, end); });
  });
  return grads;
}

Tensor hsic_permuted(Tensor gram_x, Tensor gram_y, Tensor permutations) {
  const Tensor x = torch::stable::contiguous(gram_x), y = torch::stable::contiguous(gram_y);
  const Tensor p = torch::stable::contiguous(permutations);
  Tensor out = buffer(x, p.size(0), ScalarType::Double);
  const PermutedArgs a{x.size(0),
                       (const char*)x.data_ptr(),
                       (const char*)y.data_ptr(),
                       (const int32_t*)p.data_ptr(),
                       (double*)out.data_ptr(),
                       x.scalar_type() == ScalarType::Double};
  const auto kernel = cpu_table()->gram_permuted;
  in_parallel(p.size(0), grain_of(a.n * a.n), [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return out;
}

void center_into(const Tensor& gram, Tensor& out) {
  if (gram.numel() == 0) return;
  CenterArgs a{};
  a.f64 = gram.scalar_type() == ScalarType::Double;
  Layout layout(gram, 1, true);
  layout.add(a.gram, gram);
  layout.add(a.out, out);
  a.space = layout.merge();
  a.n = a.space.cols;
  a.blocks = (a.n + kCenterRows - 1) / kCenterRows;
  a.out.stream = streams(out);
  const int64_t matrices = a.space.rows / a.n;
  Tensor rows = buffer(gram, matrices * a.n, ScalarType::Double), means = buffer(gram, matrices, ScalarType::Double);
  Tensor columns = buffer(gram, matrices * a.blocks * a.n, ScalarType::Double);
  a.row_means = (double*)rows.data_ptr();
  a.columns = (double*)columns.data_ptr();
  a.means = (double*)means.data_ptr();
  const CpuTable& cpu = *cpu_table();
  // a group of matrices fits the caches, so that the second pass reads from them
  const int64_t group = 1 + kWorkspaceBytes / (a.n * a.n * int64_t(gram.element_size()));
  for (int64_t first = 0; first < matrices; first += group) {
    const int64_t last = first + group < matrices ? first + group : matrices;
    const int64_t grain = grain_of(kCenterRows * a.n);
    torch::stable::parallel_for(first * a.blocks, last * a.blocks, grain,
                                [&](int64_t begin, int64_t end) { cpu.center_sums(a, begin, end); });
    torch::stable::parallel_for(first, last, grain_of(a.blocks * a.n),
                                [&](int64_t begin, int64_t end) { cpu.center_means(a, begin, end); });
    torch::stable::parallel_for(first * a.blocks, last * a.blocks, grain,
                                [&](int64_t begin, int64_t end) { cpu.center_apply(a, begin, end); });
  }
}

Tensor center_gram(Tensor gram) {
  const auto sizes = gram.sizes();
  Tensor out = new_empty(gram, sizes.data(), gram.dim(), gram.scalar_type());
  center_into(gram, out);
  return out;
}

void center_gram_(Tensor gram) { center_into(gram, gram); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyflow, CPU, m) {
  m.impl("hsic_sums", TORCH_BOX(&hsic_sums));
  m.impl("hsic_sums_backward", TORCH_BOX(&hsic_sums_backward));
  m.impl("hsic_permuted", TORCH_BOX(&hsic_permuted));
  m.impl("center_gram", TORCH_BOX(&center_gram));
  m.impl("center_gram_", TORCH_BOX(&center_gram_));
}

}  // namespace pyflow
