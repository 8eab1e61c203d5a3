#include "../args/spectral.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "device.h"

namespace pyflow {
namespace {

using Tensors = std::vector<Tensor>;

// GPU kernels take contiguous tensors
void make_contiguous(Tensor& t) {
  if (kCuda && !t.is_contiguous()) t = torch::stable::contiguous(t);
}

// a vector or a number
View along(Tensor& t) {
  make_contiguous(t);
  View v;
  v.data = (char*)t.data_ptr();
  v.dtype = dtype_of(t);
  v.stride[0] = t.dim() > 0 ? t.stride(0) : 0;
  return v;
}

// all layers of a call: their split into units, and the memory that kernels keep between passes
class Layers {
 public:
  explicit Layers(size_t count, int64_t n_iter = 0) : layers_(count), n_iter_(n_iter) {}

  // the next layer, of the weight w, the result out and, in the backward, grad; a vector is one row
  SpectralLayer& add(Tensor& w, const Tensor& out, Tensor* grad = nullptr) {
    SpectralLayer& l = layers_[added_++];
    make_contiguous(w);
    Layout layout(w, w.dim() > 1 ? w.dim() - 1 : 1, true);
    layout.add(l.w, w);
    if (grad) {
      make_contiguous(*grad);
      layout.add(l.grad, *grad);
    }
    layout.add(l.out, written(out));
    l.f64 = is_f64(w);
    l.space = layout.merge();
    const int64_t rows = kSpectralUnit / (l.space.cols > 0 ? l.space.cols : 1) / 4 * 4;
    l.unit_rows = kCuda ? kSpectralBlock : rows < 4 ? 4 : rows;
    l.units = ceil_div(l.space.rows, l.unit_rows);
    l.first_unit = units_;
    units_ += l.units;
    return l;
  }

  // one allocation for the memory of all layers
  void reserve(const Tensor& like, bool backward) {
    uintptr_t next = 0;
    const auto take = [&](int64_t bytes) {
      char* at = (char*)next;
      next += uintptr_t(bytes + 63) / 64 * 64;
      return at;
    };
    const auto assign = [&] {
      for (SpectralLayer& l : layers_) {
        const int64_t size = l.f64 ? 8 : 4, cols = l.space.cols;
        if constexpr (kCuda) {
          l.scratch = take(size * (backward ? gpu_scratch_backward(l) : gpu_scratch_forward(l)));
        } else {
          l.partial = (double*)take(8 * (backward ? l.units : l.units * cols));
          if (backward) continue;
          l.y = (double*)take(8 * l.space.rows);
          l.sum = take(size * l.units * cols);
          l.right = take(size * cols);
        }
      }
    };
    assign();  // counts the bytes
    const int64_t bytes = int64_t(next);
    memory_ = new_empty(like, &bytes, 1, ScalarType::Byte);
    next = uintptr_t(memory_.data_ptr());
    assign();
  }

  // CPU: use streaming stores if all results together do not fit the caches
  void stream(const Tensors& results) {
    int64_t bytes = 0;
    for (size_t i = 0; i < layers_.size(); ++i) bytes += results[i].numel() * int64_t(results[i].element_size());
    for (SpectralLayer& l : layers_) l.out.stream = bytes >= kStreamBytes;
  }

  // CPU: calls pass(args, first unit, end unit) for groups of layers whose weights stay in the cache between passes. If
  // the layers split evenly, each thread takes its own share layer by layer, without barriers; else all threads work on
  // one group of neighbouring layers after another.
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

  // GPU
  void run_all(void (*run)(const SpectralArgs&, cuda::Stream)) {
    const SpectralArgs a{layers_.data(), int64_t(layers_.size()), n_iter_, false};
    launch(memory_, [&](cuda::Stream stream) { run(a, stream); });
    for (auto& [to, from] : copies_) torch::stable::copy_(to, from);
  }

 private:
  // the memory that kernels write in place of a result
  Tensor written(const Tensor& out) {
    if (!kCuda || out.is_contiguous()) return out;
    const auto sizes = out.sizes();
    copies_.emplace_back(out, new_empty(out, sizes.data(), out.dim(), out.scalar_type()));
    return copies_.back().second;
  }

  int64_t bytes_of(size_t i) const { return layers_[i].space.rows * layers_[i].space.cols * (layers_[i].f64 ? 8 : 4); }

  template <class Pass>
  void pass_over(const Pass& pass, size_t begin, size_t end) {
    const SpectralLayer& last = layers_[end - 1];
    pass(SpectralArgs{&layers_[begin], int64_t(end - begin), n_iter_, false}, layers_[begin].first_unit,
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
  std::vector<std::pair<Tensor, Tensor>> copies_;  // to a result, from contiguous memory
  int64_t n_iter_, units_ = 0;
  size_t added_ = 0;
  Tensor memory_;
};

using Kernel = void (*)(const SpectralArgs&, int64_t, int64_t);

void run(Kernel kernel, const SpectralArgs& a, int64_t first, int64_t last) {
  torch::stable::parallel_for(first, last, 1, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

Tensors spectral_normalize(Tensors weights, Tensors u, Tensors v, int64_t n_iter) {
  const size_t n = weights.size();
  Layers layers(n, n_iter);
  Tensors out(4 * n);
  for (size_t i = 0; i < n; ++i) {
    Tensor& w = weights[i];
    out[i] = new_like(w);
    out[n + i] = new_rows(u[i], u[i].numel(), u[i].scalar_type());
    out[2 * n + i] = new_rows(v[i], v[i].numel(), v[i].scalar_type());
    SpectralLayer& l = layers.add(w, out[i]);
    out[3 * n + i] = new_empty(w, nullptr, 0, compute_type(l.f64));
    l.sigma = along(out[3 * n + i]);
    if (w.dim() == 1) continue;
    l.u = along(u[i]);
    l.v = along(v[i]);
    l.u_out = along(out[n + i]);
    l.v_out = along(out[2 * n + i]);
    if (!kCuda || n_iter > 0) continue;
    // GPU kernels write u and v at the end of a round only
    torch::stable::copy_(out[n + i], u[i]);
    torch::stable::copy_(out[2 * n + i], v[i]);
  }
  layers.reserve(weights[0], false);
  if constexpr (kCuda) {
    layers.run_all(cuda::spectral_normalize);
  } else {
    layers.stream(out);
    layers.for_each_group([&](SpectralArgs a, int64_t first, int64_t last) {
      run(cpu::spectral_start, a, 0, a.count);
      for (int64_t round = 0; !a.last; ++round) {
        a.last = round + 1 >= a.n_iter;
        run(cpu::spectral_product, a, first, last);
        run(cpu::spectral_iterate, a, 0, a.count);
      }
      run(cpu::spectral_scale, a, first, last);
    });
  }
  return out;
}

Tensors spectral_normalize_backward(Tensors grads, Tensors grad_sigmas, Tensors weights, Tensors u, Tensors v,
                                    Tensors sigmas) {
  const size_t n = weights.size();
  Layers layers(n);
  Tensors out(n);
  for (size_t i = 0; i < n; ++i) {
    Tensor& w = weights[i];
    out[i] = new_like(w);
    SpectralLayer& l = layers.add(w, out[i], &grads[i]);
    l.sigma = along(sigmas[i]);
    l.grad_sigma = along(grad_sigmas[i]);
    if (w.dim() == 1) continue;
    l.u = along(u[i]);
    l.v = along(v[i]);
  }
  layers.reserve(weights[0], true);
  if constexpr (kCuda) {
    layers.run_all(cuda::spectral_normalize_backward);
  } else {
    layers.stream(out);
    layers.for_each_group([&](const SpectralArgs& a, int64_t first, int64_t last) {
      run(cpu::spectral_dot, a, first, last);
      run(cpu::spectral_gradient, a, first, last);
    });
  }
  return out;
}

}  // namespace

PYFLOW_OPERATORS(m) {
  m.impl("spectral_normalize", TORCH_BOX(&spectral_normalize));
  m.impl("spectral_normalize_backward", TORCH_BOX(&spectral_normalize_backward));
}

}  // namespace pyflow
