#include "../../../csrc/args/spectral.h"

#include "common.h"

namespace pyflow {
namespace {

// a matrix of several units and a vector: two rounds of power iteration, W / sigma, and the gradient
void spectral(int64_t rows, int64_t cols) {
  struct Layer {
    std::vector<float> w, u, v, grad, out, u_out, v_out, gw, sigma, grad_sigma, sum, right;
    std::vector<double> y, partial;
  };
  std::vector<Layer> memory(2);
  std::vector<SpectralLayer> layers;
  int64_t units = 0;
  for (Layer& m : memory) {
    const bool vector = &m == &memory[1];
    SpectralLayer l{};
    l.space = space(vector ? 1 : rows, cols);
    l.unit_rows = 12;
    l.units = (l.space.rows + l.unit_rows - 1) / l.unit_rows;
    l.first_unit = units;
    units += l.units;
    const int64_t n = l.space.rows * cols;
    for (auto* x : {&m.w, &m.grad}) {
      x->resize(n);
      for (float& value : *x) value = uniform();
    }
    for (auto* x : {&m.u, &m.v}) x->assign(x == &m.u ? l.space.rows : cols, 0.125f);
    m.out.resize(n);
    m.gw.resize(n);
    m.u_out = m.u;
    m.v_out = m.v;
    m.sigma.resize(1);
    m.grad_sigma.assign(1, 0.5f);
    m.sum.resize(l.units * cols);
    m.right.resize(cols);
    m.y.resize(l.space.rows);
    m.partial.resize(l.units * cols);
    l.w = view(m.w, DType::f32, cols);
    l.grad = view(m.grad, DType::f32, cols);
    l.out = view(m.out, DType::f32, cols);
    l.sigma = view(m.sigma, DType::f32, 1);
    l.grad_sigma = view(m.grad_sigma, DType::f32, 1);
    if (!vector) {
      l.u = view(m.u, DType::f32, 1);
      l.v = view(m.v, DType::f32, 1);
      l.u_out = view(m.u_out, DType::f32, 1);
      l.v_out = view(m.v_out, DType::f32, 1);
    }
    l.y = m.y.data();
    l.partial = m.partial.data();
    l.sum = (char*)m.sum.data();
    l.right = (char*)m.right.data();
    layers.push_back(l);
  }
  SpectralArgs a{layers.data(), 2, true, false};
  cpu::spectral_start(a, 0, 2);
  for (int round = 0; round < 2; ++round) {
    a.last = round == 1;
    cpu::spectral_product(a, 0, units);
    cpu::spectral_iterate(a, 0, 2);
  }
  cpu::spectral_scale(a, 0, units);
  for (size_t i = 0; i < 2; ++i) {
    layers[i].out = view(memory[i].gw, DType::f32, cols);
    if (layers[i].v.data) layers[i].u = layers[i].u_out, layers[i].v = layers[i].v_out;
  }
  cpu::spectral_dot(a, 0, units);
  cpu::spectral_gradient(a, 0, units);
  for (Layer& m : memory) {
    for (auto* x : {&m.out, &m.u_out, &m.v_out, &m.sigma, &m.gw}) print("spectral", *x);
  }
}

}  // namespace

PYFLOW_BITS(spectral) {
  for (int64_t cols : {31, 1037}) spectral(70, cols);
}

}  // namespace pyflow
