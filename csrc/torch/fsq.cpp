#include "fsq.h"

#include <algorithm>
#include <initializer_list>

#include "../args/fsq.h"
#include "../cpu/dispatch.h"

namespace pyflow {
namespace {

// owns the memory that the pointers of FsqArgs point to
struct Table {
  std::vector<char> constants, basis, scales;
};

// each run holds value(run, channel) for all channels, repeated up to the period
template <class T, class F>
const char* fill_runs(std::vector<char>& bytes, const FsqArgs& a, int64_t runs, F value) {
  const int64_t period = a.table.period, d = a.channels;
  bytes.resize(size_t(runs * period) * sizeof(T));
  T* entry = (T*)bytes.data();
  for (int64_t run = 0; run < runs; ++run, entry += period) {
    for (int64_t c = 0; c < d; ++c) entry[c] = T(value(run, c));
    for (int64_t i = d; i < period; ++i) entry[i] = entry[i - d];
  }
  return bytes.data();
}

void fill_table(FsqArgs& a, Table& table, const Levels& levels) {
  std::vector<FsqChannel<float>> channels;
  for (const int64_t level : levels) channels.push_back(channel_of(level, FsqVariant(a.variant)));
  const auto constant = [&](int64_t run, int64_t channel) {
    const FsqChannel<float>& c = channels[channel];
    const float fields[] = {c.shift, c.half, c.offset, c.width, c.top, c.step};
    return fields[run];
  };
  const auto basis = [&](int64_t, int64_t channel) { return product(levels, size_t(channel)); };
  a.table.constants =
      a.f64 ? fill_runs<double>(table.constants, a, 6, constant) : fill_runs<float>(table.constants, a, 6, constant);
  a.table.basis = a.wide ? fill_runs<int64_t>(table.basis, a, 1, basis) : fill_runs<int32_t>(table.basis, a, 1, basis);
}

// L^-stage, rounded to float32
const char* fill_scales(const FsqArgs& a, Table& table, const Levels& levels, int64_t stages) {
  const auto scale = [&](int64_t stage, int64_t c) { return scale_of(levels[c], stage); };
  return a.f64 ? fill_runs<double>(table.scales, a, stages, scale) : fill_runs<float>(table.scales, a, stages, scale);
}

// Merges the layout. If all `views` are contiguous with channels innermost, and indices advance by `index_step` per
// position, the space becomes a single flat row.
void plan(FsqArgs& a, Layout& layout, std::initializer_list<View*> views, int64_t index_step) {
  a.space = layout.merge();
  a.channels = a.space.rows;
  a.positions = a.space.cols;
  a.flat = a.space.col_dims == 1 && a.channels <= kChunk / 4;
  for (const View* v : views) {
    a.flat = a.flat && (a.channels == 1 || v->stride[0] == 1) && (a.positions == 1 || v->stride[1] == a.channels);
  }
  a.flat = a.flat && (!a.indices.data || a.positions == 1 || a.indices.stride[1] == index_step);
  if (!a.flat) return;
  const int64_t values = a.channels * a.positions;
  a.space = Space{1, 1, {1, values}, 1, values};
  for (View* v : views) {
    v->stride[0] = values;
    v->stride[1] = 1;
  }
  a.indices.stride[1] = index_step;
}

void set_tile(FsqArgs& a, Table& table, const Levels& levels, bool side_by_side) {
  // a multiple of 16 positions where the channels allow, so that vectors are full
  const int64_t together = kChunk / a.channels;
  a.tile = !side_by_side ? kChunk : together < 16 ? together : together / 16 * 16;
  a.table.period = side_by_side ? std::clamp<int64_t>(a.positions, 1, a.tile) * a.channels : a.channels;
  fill_table(a, table, levels);
}

template <class Kernel, class Args>
void run(Kernel kernel, const Args& a) {
  if (a.positions == 0) return;
  torch::stable::parallel_for(0, (a.positions + a.tile - 1) / a.tile, grain_of(a.tile * a.channels),
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

std::tuple<Tensor, Tensor> fsq(Tensor z, Levels levels, int64_t variant, bool return_indices) {
  FsqForward a{};
  Table table;
  Layout layout(z, z.dim() - 1);
  const int64_t none = 0;
  Tensor codes = new_like(z);
  a.wide = return_indices && is_wide(levels);
  Tensor indices = return_indices ? new_empty(z, z.sizes().data() + 1, z.dim() - 1, index_dtype(a.wide))
                                  : new_empty(z, &none, 1, ScalarType::Int);
  layout.add(a.z, z);
  layout.add(a.codes, codes);
  a.codes.stream = streams(codes);
  if (return_indices) layout.add_event(a.indices, indices);
  a.f64 = z.scalar_type() == ScalarType::Double;
  a.variant = int(variant);
  plan(a, layout, {&a.z, &a.codes}, 1);
  set_tile(a, table, levels, a.flat);
  run(cpu_table()->fsq_forward, a);
  return {codes, indices};
}

Tensor fsq_backward(Tensor grad, Tensor z, Levels levels, int64_t variant) {
  FsqBackward a{};
  Table table;
  Layout layout(z, z.dim() - 1);
  Tensor gz = new_like(z);
  layout.add(a.z, z);
  layout.add(a.grad, grad);
  layout.add(a.gz, gz);
  a.gz.stream = streams(gz);
  a.f64 = z.scalar_type() == ScalarType::Double;
  a.variant = int(variant);
  plan(a, layout, {&a.z, &a.grad, &a.gz}, 0);
  set_tile(a, table, levels, a.flat);
  run(cpu_table()->fsq_backward, a);
  return gz;
}

Tensor fsq_decode(Tensor indices, Levels levels, int64_t variant, int64_t dim, ScalarType dtype) {
  FsqDecode a{};
  Table table;
  std::vector<int64_t> sizes(indices.sizes().begin(), indices.sizes().end());
  sizes.insert(sizes.begin() + dim, int64_t(levels.size()));
  Tensor codes = new_empty(indices, sizes.data(), int64_t(sizes.size()), dtype);
  Layout layout(int64_t(levels.size()), indices);
  layout.add_moved(a.codes, codes, dim);
  layout.add_event(a.indices, indices);
  a.codes.stream = streams(codes);
  a.f64 = dtype == ScalarType::Double;
  a.wide = indices.scalar_type() == ScalarType::Long;
  a.variant = int(variant);
  a.levels = levels.data();
  a.size = product(levels, levels.size());
  plan(a, layout, {}, 0);
  a.flat = false;
  set_tile(a, table, levels, false);
  run(cpu_table()->fsq_decode, a);
  return codes;
}

int64_t active_stages(const std::optional<Tensor>& active, int64_t stages) {
  return active ? *(const int64_t*)active->data_ptr() : stages;
}

std::tuple<Tensor, Tensor> residual_fsq(Tensor x, Levels levels, int64_t variant, int64_t stages,
                                        std::optional<Tensor> active) {
  ResidualFsqForward a{};
  Table table;
  Layout layout(x, x.dim() - 1);
  Tensor out = new_like(x);
  a.wide = active || is_wide(levels);
  std::vector<int64_t> sizes(x.sizes().begin() + 1, x.sizes().end());
  sizes.push_back(stages);
  Tensor indices = new_empty(x, sizes.data(), int64_t(sizes.size()), index_dtype(a.wide));
  layout.add(a.z, x);
  layout.add(a.codes, out);
  a.codes.stream = streams(out);
  layout.add_event(a.indices, indices);
  a.f64 = x.scalar_type() == ScalarType::Double;
  a.variant = int(variant);
  a.stages = stages;
  a.active = active_stages(active, stages);
  plan(a, layout, {&a.z, &a.codes}, stages);
  set_tile(a, table, levels, true);
  a.scales = fill_scales(a, table, levels, stages);
  run(cpu_table()->residual_fsq_forward, a);
  return {out, indices};
}

Tensor residual_fsq_backward(Tensor grad, Tensor x, Levels levels, int64_t variant, int64_t stages,
                             std::optional<Tensor> active) {
  ResidualFsqBackward a{};
  Table table;
  Layout layout(x, x.dim() - 1);
  Tensor gx = new_like(x);
  layout.add(a.z, x);
  layout.add(a.grad, grad);
  layout.add(a.gz, gx);
  a.gz.stream = streams(gx);
  a.f64 = x.scalar_type() == ScalarType::Double;
  a.variant = int(variant);
  a.stages = stages;
  a.active = active_stages(active, stages);
  plan(a, layout, {&a.z, &a.grad, &a.gz}, 0);
  set_tile(a, table, levels, true);
  a.scales = fill_scales(a, table, levels, stages);
  run(cpu_table()->residual_fsq_backward, a);
  return gx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyflow, CPU, m) {
  m.impl("fsq", TORCH_BOX(&fsq));
  m.impl("fsq_backward", TORCH_BOX(&fsq_backward));
  m.impl("fsq_decode", TORCH_BOX(&fsq_decode));
  m.impl("residual_fsq", TORCH_BOX(&residual_fsq));
  m.impl("residual_fsq_backward", TORCH_BOX(&residual_fsq_backward));
}

}  // namespace pyflow
