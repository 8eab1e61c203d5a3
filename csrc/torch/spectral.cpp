#include "../args/spectral.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "../cpu/dispatch.h"
#include "tensor.h"

namespace pyflow {
namespace {

using Tensors = std::vector<Tensor>;

View along(const Tensor& t) {
  View v;
  v.data = (char*)t.data_ptr();
  v.dtype = dtype_of(t);
  v.stride[0] = t.dim() > 0 ? t.stride(0) : 0;
  return v;
}

// all layers of a call: their split into units, and the buffers that kernels keep between passes
class Layers {
 public:
  explicit Layers(const Tensors& weights) : layers_(weights.size()) {}

  SpectralLayer& operator[](size_t i) { return layers_[i]; }

  // every view of the weight's size is in `layout`; a vector is one row
  void place(SpectralLayer& l, Layout& layout, const Tensor& w) {
    l.f64 = w.scalar_type() == ScalarType::Double;
    l.space = layout.merge();
    const int64_t rows = kSpectralUnit / (l.space.cols > 0 ? l.space.cols : 1) / 4 * 4;
    l.unit_rows = rows < 4 ? 4 : rows;
    l.units = (l.space.rows + l.unit_rows - 1) / l.unit_rows;
    l.first_unit = units_;
    units_ += l.units;
  }

  // one allocation for the buffers of all layers
  void reserve(const Tensor& like, bool backward) {
    int64_t bytes = 0;
    const auto take = [&](int64_t n) {
      const int64_t at = bytes;
      bytes += (n + 63) / 64 * 64;
      return at;
    };
    std::vector<int64_t> at;
    for (const SpectralLayer& l : layers_) {
      const int64_t size = l.f64 ? 8 : 4, cols = l.space.cols;
      at.push_back(take(8 * (backward ? l.units : l.units * cols)));
      at.push_back(take(backward ? 0 : 8 * l.space.rows));
      at.push_back(take(backward ? 0 : size * l.units * cols));
      at.push_back(take(backward ? 0 : size * cols));
    }
    memory_ = new_empty(like, &bytes, 1, ScalarType::Byte);
    char* base = (char*)memory_.data_ptr();
    for (size_t i = 0; i < layers_.size(); ++i) {
      layers_[i].partial = (double*)(base + at[4 * i]);
      layers_[i].y = (double*)(base + at[4 * i + 1]);
      layers_[i].sum = base + at[4 * i + 2];
      layers_[i].right = base + at[4 * i + 3];
    }
  }

  // Calls pass(args, first unit, end unit) for groups of layers whose weights stay in the cache between passes. If the
  // layers split evenly, each thread takes its own share layer by layer, without barriers; else all threads work on one
  // group of neighbouring layers after another.
  template <class Pass>
  void for_each_group(const Pass& pass) {
    const std::vector<std::vector<size_t>> shares = shared_out(torch::stable::get_num_threads());
    if (!shares.empty()) {
      torch::stable::parallel_for(0, int64_t(shares.size()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t thread = begin; thread < end; ++thread) {
          for (const size_t i : shares[thread]) pass_over(pass, i, i + 1);
        }
      });
      return;
    }
    for (size_t i = 0, end; i < layers_.size(); i = end) {
      int64_t bytes = 0;
      for (end = i; end < layers_.size() && (end == i || bytes < kSpectralGroup); ++end) bytes += bytes_of(end);
      pass_over(pass, i, end);
    }
  }

  // use streaming stores if all outputs together do not fit the caches
  void stream(const Tensors& outputs) {
    int64_t bytes = 0;
    for (size_t i = 0; i < layers_.size(); ++i) bytes += outputs[i].numel() * int64_t(outputs[i].element_size());
    for (SpectralLayer& l : layers_) l.out.stream = bytes >= kStreamBytes;
  }

 private:
  int64_t bytes_of(size_t i) const { return layers_[i].space.rows * layers_[i].space.cols * (layers_[i].f64 ? 8 : 4); }

  template <class Pass>
  void pass_over(const Pass& pass, size_t begin, size_t end) {
    const SpectralLayer& last = layers_[end - 1];
    pass(SpectralArgs{&layers_[begin], int64_t(end - begin), false, false}, layers_[begin].first_unit,
         last.first_unit + last.units);
  }

  // layers per thread: the largest first, each to the thread with the fewest bytes; empty if the largest share exceeds
  // the mean by more than an eighth
  std::vector<std::vector<size_t>> shared_out(int64_t threads) const {
    std::vector<size_t> order(layers_.size());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return bytes_of(a) > bytes_of(b); });
    std::vector<std::vector<size_t>> shares(threads);
    std::vector<int64_t> bytes(threads);
    int64_t total = 0;
    for (const size_t i : order) {
      const size_t least = std::min_element(bytes.begin(), bytes.end()) - bytes.begin();
      shares[least].push_back(i);
      bytes[least] += bytes_of(i);
      total += bytes_of(i);
    }
    const int64_t most = *std::max_element(bytes.begin(), bytes.end());
    return threads > 1 && most * threads <= total + total / 8 ? shares : std::vector<std::vector<size_t>>();
  }

  std::vector<SpectralLayer> layers_;
  int64_t units_ = 0;
  Tensor memory_;
};

using Kernel = void (*)(const SpectralArgs&, int64_t, int64_t);

void run(Kernel kernel, const SpectralArgs& a, int64_t first, int64_t last) {
  torch::stable::parallel_for(first, last, 1, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

Layout layout_of(const Tensor& w) { return Layout(w, w.dim() > 1 ? w.dim() - 1 : 1, true); }

Tensors spectral_normalize(Tensors weights, Tensors u, Tensors v, int64_t n_iter) {
  const size_t n = weights.size();
  const CpuTable& cpu = *cpu_table();
  Layers layers(weights);
  Tensors out(4 * n);
  for (size_t i = 0; i < n; ++i) {
    SpectralLayer& l = layers[i];
    const Tensor& w = weights[i];
    out[i] = new_like(w);
    const int64_t rows = u[i].numel(), cols = v[i].numel();
    out[n + i] = new_empty(u[i], &rows, 1, u[i].scalar_type());
    out[2 * n + i] = new_empty(v[i], &cols, 1, v[i].scalar_type());
    Layout layout = layout_of(w);
    layout.add(l.w, w);
    layout.add(l.out, out[i]);
    layers.place(l, layout, w);
    out[3 * n + i] = new_empty(w, nullptr, 0, l.f64 ? ScalarType::Double : ScalarType::Float);
    l.sigma = along(out[3 * n + i]);
    if (w.dim() == 1) continue;
    l.u = along(u[i]);
    l.v = along(v[i]);
    l.u_out = along(out[n + i]);
    l.v_out = along(out[2 * n + i]);
  }
  layers.reserve(weights[0], false);
  layers.stream(out);
  layers.for_each_group([&](SpectralArgs a, int64_t first, int64_t last) {
    a.iterates = n_iter > 0;
    run(cpu.spectral_start, a, 0, a.count);
    for (int64_t round = 0; !a.last; ++round) {
      a.last = round + 1 >= n_iter;
      run(cpu.spectral_product, a, first, last);
      run(cpu.spectral_iterate, a, 0, a.count);
    }
    run(cpu.spectral_scale, a, first, last);
  });
  return out;
}

Tensors spectral_normalize_backward(Tensors grads, Tensors grad_sigmas, Tensors weights, Tensors u, Tensors v,
                                    Tensors sigmas) {
  const size_t n = weights.size();
  const CpuTable& cpu = *cpu_table();
  Layers layers(weights);
  Tensors out(n);
  for (size_t i = 0; i < n; ++i) {
    SpectralLayer& l = layers[i];
    const Tensor& w = weights[i];
    out[i] = new_like(w);
    Layout layout = layout_of(w);
    layout.add(l.w, w);
    layout.add(l.grad, grads[i]);
    layout.add(l.out, out[i]);
    layers.place(l, layout, w);
    l.sigma = along(sigmas[i]);
    l.grad_sigma = along(grad_sigmas[i]);
    if (w.dim() == 1) continue;
    l.u = along(u[i]);
    l.v = along(v[i]);
  }
  layers.reserve(weights[0], true);
  layers.stream(out);
  layers.for_each_group([&](const SpectralArgs& a, int64_t first, int64_t last) {
    run(cpu.spectral_dot, a, first, last);
    run(cpu.spectral_gradient, a, first, last);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyflow, CPU, m) {
  m.impl("spectral_normalize", TORCH_BOX(&spectral_normalize));
  m.impl("spectral_normalize_backward", TORCH_BOX(&spectral_normalize_backward));
}

}  // namespace pyflow
