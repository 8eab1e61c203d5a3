#include "../args/fsq.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <vector>

#include "device.h"

namespace pyflow {
namespace {

using Levels = std::vector<int64_t>;

// rounded to float32 after every operation, in the order of vector-quantize-pytorch
FsqChannel<float> channel_of(int64_t level, FsqVariant v) {
  const float half = float(level - 1) * (v == FsqVariant::paper ? 0.999f : 1.001f) / 2.f;
  const float offset = level % 2 == 0 ? 0.5f : 0.f;
  const double ratio = double(offset / half);
  const double shift = v == FsqVariant::bounded ? 0.
                       : v == FsqVariant::paper ? std::tan(ratio)
                       : v == FsqVariant::hard  ? ratio
                                                : std::atanh(ratio);
  return {float(shift), half, offset, float(level / 2), float(level - 1), 2.f / float(level - 1)};
}

// scale of a residual stage, L^-stage
float scale_of(int64_t level, int64_t stage) { return float(std::pow(double(level), -double(stage))); }

uint64_t product(const Levels& levels, size_t count) {
  uint64_t size = 1;
  for (size_t c = 0; c < count; ++c) size *= uint64_t(levels[c]);
  return size;
}

// whether the largest index does not fit int32
bool is_wide(const Levels& levels) { return product(levels, levels.size()) > uint64_t(1) << 31; }

ScalarType index_dtype(bool wide) { return wide ? ScalarType::Long : ScalarType::Int; }

// owns the arrays that a call's arguments point to
class Tables {
 public:
  Tables(FsqArgs& a, const Levels& levels) {
    std::vector<FsqChannel<float>> channels;
    channels.reserve(levels.size());
    for (const int64_t level : levels) channels.push_back(channel_of(level, a.variant));
    a.levels = levels.data();
    a.table.constants = fill_real(constants_, a, kFsqFields, [&](int64_t field, int64_t channel) {
      const FsqChannel<float>& c = channels[channel];
      const float fields[kFsqFields] = {c.shift, c.half, c.offset, c.width, c.top, c.step};
      return fields[field];
    });
    const auto basis = [&](int64_t, int64_t channel) { return product(levels, size_t(channel)); };
    a.table.basis = kCuda || a.wide ? fill<int64_t>(basis_, a, 1, basis) : fill<int32_t>(basis_, a, 1, basis);
  }

  Tables(FsqArgs& a, const Levels& levels, FsqStages& s) : Tables(a, levels) {
    s.scales = fill_real(scales_, a, s.stages, [&](int64_t stage, int64_t c) { return scale_of(levels[c], stage); });
  }

 private:
  // each run holds value(run, channel) for all channels, repeated up to the period
  template <class T, class F>
  static const char* fill(std::vector<char>& bytes, const FsqArgs& a, int64_t runs, F value) {
    const int64_t period = a.table.period, d = a.channels;
    bytes.resize(size_t(runs * period) * sizeof(T));
    T* entry = (T*)bytes.data();
    for (int64_t run = 0; run < runs; ++run, entry += period) {
      for (int64_t c = 0; c < d; ++c) entry[c] = T(value(run, c));
      for (int64_t i = d; i < period; ++i) entry[i] = entry[i - d];
    }
    return bytes.data();
  }

  template <class F>
  static const char* fill_real(std::vector<char>& bytes, const FsqArgs& a, int64_t runs, F value) {
    return a.f64 && !kCuda ? fill<double>(bytes, a, runs, value) : fill<float>(bytes, a, runs, value);
  }

  std::vector<char> constants_, basis_, scales_;
};

// CPU: if all `views` are contiguous with channels innermost, and indices advance by `index_step` per position, the
// space becomes a single row
void flatten(FsqArgs& a, std::initializer_list<View*> views, int64_t index_step) {
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

// whether a tile of a CPU kernel holds one channel of its positions or all of them
enum class Channels { apart, together, together_if_flat };

// Merges the layout and splits the positions into tiles. `views`: every tensor but the indices, which advance by
// `index_step` per position if they are contiguous.
void plan(FsqArgs& a, Layout& layout, Channels channels, std::initializer_list<View*> views, int64_t index_step = 1) {
  a.space = layout.merge();
  a.channels = a.table.period = a.space.rows;
  a.positions = a.space.cols;
  if constexpr (kCuda) {
    STD_TORCH_CHECK(a.channels <= kFsqChannels, "pyflow: a GPU kernel takes at most ", kFsqChannels, " levels");
    const int64_t* stride = (*views.begin())->stride;
    a.flat = a.channels > 1 && stride[0] < stride[a.space.row_dims + a.space.col_dims - 1];
    a.tile = kTile / a.channels / kEach * kEach;
  } else {
    if (channels != Channels::apart) flatten(a, views, index_step);
    const bool together = channels == Channels::together || a.flat;
    // a multiple of 16 positions where the channels allow, so that vectors are full
    const int64_t most = kChunk / a.channels;
    a.tile = !together ? kChunk : most < 16 ? most : most / 16 * 16;
    if (together) a.table.period *= std::clamp<int64_t>(a.positions, 1, a.tile);
  }
  a.plan.units = ceil_div(a.positions, a.tile);
  a.plan.grain = grain_of(a.tile * a.channels);
}

// channels that one kernel takes
struct Part {
  const Levels& levels;
  int64_t position_dims, first, count;
  // these channels of t
  decltype(auto) of(Tensor& t) const {
    if constexpr (kCuda) {
      return torch::stable::narrow(t, 0, first, count);
    } else {
      return (t);
    }
  }
};

// Calls f with the parts of a call. Without indices, channels are independent, and on a GPU channels of equal levels
// become positions of a single channel, others come in groups.
template <class F>
void for_each_part(const Levels& levels, int64_t dims, bool return_indices, F f) {
  const int64_t d = int64_t(levels.size());
  if (!kCuda || return_indices) return f(Part{levels, dims - 1, 0, d});
  if (std::count(levels.begin(), levels.end(), levels[0]) == d) return f(Part{{levels[0]}, dims, 0, d});
  for (int64_t c = 0; c < d; c += kFsqChannels) {
    const int64_t count = std::min<int64_t>(kFsqChannels, d - c);
    f(Part{{levels.begin() + c, levels.begin() + c + count}, dims - 1, c, count});
  }
}

// a layout with z, channels first; sets what the operators that read z share
template <class Args>
Layout layout_of(Args& a, const Tensor& z, int64_t position_dims, int64_t variant) {
  Layout layout(z, position_dims);
  layout.add(a.z, z);
  a.f64 = is_f64(z);
  a.variant = FsqVariant(variant);
  return layout;
}

std::tuple<Tensor, Tensor> fsq(Tensor z, Levels levels, int64_t variant, bool return_indices) {
  const bool wide = return_indices && is_wide(levels);
  Tensor codes = new_like(z);
  Tensor indices = return_indices ? new_empty(z, z.sizes().data() + 1, z.dim() - 1, index_dtype(wide))
                                  : new_none(z, ScalarType::Int);
  for_each_part(levels, z.dim(), return_indices, [&](const Part& part) {
    FsqForward a{};
    Layout layout = layout_of(a, part.of(z), part.position_dims, variant);
    layout.add_output(a.codes, part.of(codes));
    if (return_indices) layout.add_event(a.indices, indices);
    a.wide = wide;
    plan(a, layout, Channels::together_if_flat, {&a.z, &a.codes});
    const Tables tables(a, part.levels);
    if (a.positions > 0) PYFLOW_RUN(fsq_forward, a, z);
  });
  return {codes, indices};
}

Tensor fsq_backward(Tensor grad, Tensor z, Levels levels, int64_t variant) {
  Tensor gz = new_like(z);
  for_each_part(levels, z.dim(), false, [&](const Part& part) {
    FsqBackward a{};
    Layout layout = layout_of(a, part.of(z), part.position_dims, variant);
    layout.add(a.grad, part.of(grad));
    layout.add_output(a.gz, part.of(gz));
    plan(a, layout, Channels::together_if_flat, {&a.z, &a.grad, &a.gz});
    const Tables tables(a, part.levels);
    if (a.positions > 0) PYFLOW_RUN(fsq_backward, a, z);
  });
  return gz;
}

Tensor fsq_decode(Tensor indices, Levels levels, int64_t variant, int64_t dim, ScalarType dtype) {
  FsqDecode a{};
  const int64_t d = int64_t(levels.size());
  std::vector<int64_t> sizes(indices.sizes().begin(), indices.sizes().end());
  sizes.insert(sizes.begin() + dim, d);
  Tensor codes = new_empty(indices, sizes.data(), int64_t(sizes.size()), dtype);
  Layout layout(d, indices);
  layout.add_moved(a.codes, codes, dim);
  layout.add_event(a.indices, indices);
  a.codes.stream = streams(codes);
  a.f64 = is_f64(codes);
  a.wide = indices.scalar_type() == ScalarType::Long;
  a.variant = FsqVariant(variant);
  a.size = product(levels, levels.size());
  plan(a, layout, Channels::apart, {&a.codes});
  const Tables tables(a, levels);
  if (a.positions > 0) PYFLOW_RUN(fsq_decode, a, codes);
  return codes;
}

// whether the indices fit int64
bool is_numbered(const Levels& levels) {
  uint64_t room = uint64_t(1) << 63;
  for (const int64_t level : levels) room /= uint64_t(level);
  return room > 0;
}

void set_stages(FsqStages& a, const Levels& levels, int64_t stages, const std::optional<Tensor>& active) {
  STD_TORCH_CHECK(!kCuda || is_numbered(levels), "residual_fsq: more levels and stages than a GPU kernel takes");
  a.stages = a.active = stages;
  if (!active) return;
  const int64_t* data = (const int64_t*)active->data_ptr();
  if constexpr (kCuda) {
    a.device_active = data;
  } else {
    a.active = *data;
  }
}

std::tuple<Tensor, Tensor> residual_fsq(Tensor x, Levels levels, int64_t variant, int64_t stages,
                                        std::optional<Tensor> active) {
  ResidualFsqForward a{};
  Layout layout = layout_of(a, x, x.dim() - 1, variant);
  Tensor out = new_like(x);
  a.wide = active || is_wide(levels);
  std::vector<int64_t> sizes(x.sizes().begin() + 1, x.sizes().end());
  sizes.push_back(stages);
  Tensor indices = new_empty(x, sizes.data(), int64_t(sizes.size()), index_dtype(a.wide));
  layout.add_output(a.codes, out);
  layout.add_event(a.indices, indices);
  set_stages(a, levels, stages, active);
  plan(a, layout, Channels::together, {&a.z, &a.codes}, stages);
  const Tables tables(a, levels, a);
  if (a.positions > 0) PYFLOW_RUN(residual_fsq_forward, a, x);
  return {out, indices};
}

Tensor residual_fsq_backward(Tensor grad, Tensor x, Levels levels, int64_t variant, int64_t stages,
                             std::optional<Tensor> active) {
  ResidualFsqBackward a{};
  Layout layout = layout_of(a, x, x.dim() - 1, variant);
  Tensor gx = new_like(x);
  layout.add(a.grad, grad);
  layout.add_output(a.gz, gx);
  set_stages(a, levels, stages, active);
  plan(a, layout, Channels::together, {&a.z, &a.grad, &a.gz});
  const Tables tables(a, levels, a);
  if (a.positions > 0) PYFLOW_RUN(residual_fsq_backward, a, x);
  return gx;
}

}  // namespace

PYFLOW_OPERATORS(m) {
  m.impl("fsq", TORCH_BOX(&fsq));
  m.impl("fsq_backward", TORCH_BOX(&fsq_backward));
  m.impl("fsq_decode", TORCH_BOX(&fsq_decode));
  m.impl("residual_fsq", TORCH_BOX(&residual_fsq));
  m.impl("residual_fsq_backward", TORCH_BOX(&residual_fsq_backward));
}

}  // namespace pyflow
