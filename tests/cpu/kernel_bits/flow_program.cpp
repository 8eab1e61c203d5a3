#include "../../../csrc/args/flow_program.h"

#include <deque>

#include "common.h"

namespace pyflow {
namespace {

constexpr int kBins = 3;
constexpr int64_t kColumns = 7, kContext = 2, kHidden = 21;

// a program of every instruction, and the memory of its weights
class Flow {
 public:
  Flow(int map, int options) {
    const bool inverse = options & 1, shift_first = options & 2;
    scale({6, 0, 2}, inverse, shift_first);
    mlp({1, 3, 1}, true, {kHidden, kHidden, 6}, Activation(map % 8));
    ProgramInstruction& affine = add(Instruction::affine, {0, 5, 2}, inverse, shift_first);
    affine.map = ScaleMap(map);
    affine.map_arg = affine.map == ScaleMap::sigmoid_eps || affine.map == ScaleMap::softplus_eps ? 0.01 : 2.0;
    affine.packing = Packing(map % 3);
    linear({4, 1, 0, 6, 3});
    mlp({0, 2}, false, {3}, Activation::identity);
    add(Instruction::additive, {5, 1, 4}, inverse, false);
    mlp({3, 6}, false, {2 * spline_params(kBins, tails_of(map))}, Activation::identity);
    spline({4, 0}, map, inverse, false);
    spline({2, 1, 6, 3}, map + 1, inverse, true);
    add(Instruction::prior, {0, 1, 2, 3, 4, 5, 6}, false, false).prior = Prior(map % 2);
  }

  // y, logdet, and all gradients
  void run(int64_t rows, const char* name) {
    auto x = values(rows * kColumns, 2), context = values(rows * kContext, 2);
    auto gy = values(rows * 3, 1), gl = values(rows, 1);
    std::vector<float> y(rows * 3), logdet(rows), gx(x.size()), gcontext(context.size()), factors(3);
    std::vector<double> logdets(instructions_.size());
    place();
    for (size_t i = 0; i < instructions_.size(); ++i) instructions_[i].logdet = &logdets[i];
    instructions_[0].factor = (char*)factors.data();
    const int64_t outputs[] = {5, 0, 5};
    ProgramBackward b{};
    b.instruction = instructions_.data();
    b.instructions = int64_t(instructions_.size());
    b.rows = rows;
    b.columns = kColumns;
    b.context_columns = kContext;
    b.x = matrix(x, kColumns);
    b.context = matrix(context, kContext);
    b.unit_rows = b.tile_rows = kProgramMostRows;
    b.tape = tape_;
    b.width = kHidden;
    b.outputs = outputs;
    b.output_count = 3;
    b.y = matrix(y, 3);
    b.logdet = (char*)logdet.data();
    const int64_t units = ceil_div(rows, b.unit_rows);
    std::vector<float> memory(program_memory(b, true) + 16);
    b.memory = (char*)((uintptr_t(memory.data()) + 63) / 64 * 64);
    cpu::flow_program_prepare(b, 0, b.instructions);
    cpu::flow_program_forward(b, 0, units);
    b.grad_y = matrix(gy, 3);
    b.grad_logdet = matrix(gl, 1);
    b.grad_x = matrix(gx, kColumns);
    b.grad_context = matrix(gcontext, kContext);
    std::vector<ProgramSum> sums = summed(b.group_size);
    std::vector<float> group_sums(units * b.group_size);
    b.sum = sums.data();
    b.sums = int64_t(sums.size());
    b.groups = units;
    b.group_sums = (char*)group_sums.data();
    cpu::flow_program_backward(b, 0, units);
    cpu::flow_program_reduce(b, 0, b.sums);
    for (const auto* v : {&y, &logdet, &gx, &gcontext}) print(name, *v);
    for (const Weight& w : weights_) print(name, w.grad);
  }

 private:
  struct Weight {
    int64_t rows, cols;  // cols 0: a vector
    std::vector<float> data, grad;
  };

  static ProgramMatrix matrix(std::vector<float>& v, int64_t cols) { return {(char*)v.data(), cols, 1}; }

  int64_t weight(int64_t rows, int64_t cols = 0) {
    weights_.push_back({rows, cols, {}, {}});
    Weight& w = weights_.back();
    w.data.resize(rows * (cols > 0 ? cols : 1));
    w.grad.resize(w.data.size());
    for (float& v : w.data) v = 0.5f * uniform();
    return int64_t(weights_.size()) - 1;
  }

  const char* data(int64_t place) { return (const char*)weights_[place].data.data(); }

  ProgramInstruction& add(Instruction kind, std::vector<int64_t> columns, bool inverse, bool shift_first) {
    columns_.push_back(std::move(columns));
    ProgramInstruction in{};
    in.kind = kind;
    in.columns = columns_.back().data();
    in.count = int64_t(columns_.back().size());
    in.inverse = inverse;
    in.shift_first = shift_first;
    instructions_.push_back(in);
    return instructions_.back();
  }

  void scale(std::vector<int64_t> columns, bool inverse, bool shift_first) {
    ProgramInstruction& in = add(Instruction::scale, std::move(columns), inverse, shift_first);
    in.shift = data(in.shift_place = weight(in.count));
    in.log_scale = data(in.log_scale_place = weight(in.count));
  }

  static SplineTails tails_of(int map) { return SplineTails(1 + map % 3); }

  // its numbers are those of a weight or of the conditioner before it
  void spline(std::vector<int64_t> columns, int map, bool inverse, bool own) {
    ProgramInstruction& in = add(Instruction::spline, std::move(columns), inverse, false);
    const SplineVariant variant = map % 2 ? SplineVariant::zuko : SplineVariant::nflows;
    in.spline = {variant, tails_of(map), kBins, inverse, spline_constants(variant, kBins, 0.5, 1e-2, 1e-2)};
    ends_.emplace_back();
    const bool mixed = in.spline.tails == SplineTails::mixed, all = in.spline.tails == SplineTails::linear;
    for (int i = 0; i < in.count; ++i) ends_.back().push_back({-2.0 - i, 2.0 + i, all || (mixed && i % 2 == 0)});
    in.ends = ends_.back().data();
    if (!own) return;
    in.numbers.place = weight(in.count * spline_params(kBins, in.spline.tails));
    in.numbers.data = data(in.numbers.place);
  }

  ProgramDense dense(int64_t inputs, int64_t size, Activation activation) {
    ProgramDense d{};
    d.inputs = inputs;
    d.size = size;
    d.weight = data(d.weight_place = weight(size, inputs));
    d.bias = data(d.bias_place = weight(size));
    d.activation = activation;
    d.arg = 0.25;
    return d;
  }

  void linear(std::vector<int64_t> columns) {
    ProgramInstruction& in = add(Instruction::linear, std::move(columns), false, false);
    dense_.push_back({dense(in.count, in.count, Activation::identity)});
    in.given_logdet = data(in.logdet_place = weight(1));
    in.dense = dense_.back().data();
    in.layers = 1;
  }

  void mlp(std::vector<int64_t> columns, bool context, const std::vector<int64_t>& sizes, Activation activation) {
    ProgramInstruction& in = add(Instruction::net, std::move(columns), false, false);
    int64_t inputs = in.count + (context ? kContext : 0);
    std::vector<ProgramDense> layers;
    for (const int64_t size : sizes) {
      layers.push_back(dense(inputs, size, layers.size() + 1 < sizes.size() ? activation : Activation::identity));
      inputs = size;
    }
    dense_.push_back(std::move(layers));
    in.dense = dense_.back().data();
    in.layers = int64_t(sizes.size());
    in.context = context;
  }

  // columns of the tape for every value
  void place() {
    tape_ = 0;
    const auto take = [&](int64_t count) {
      tape_ += count;
      return tape_ - count;
    };
    size_t network = 0;
    int64_t params = 0;
    for (ProgramInstruction& in : instructions_) {
      in.params = params;
      if (!in.dense) {
        in.saved = take(in.count);
        continue;
      }
      std::vector<ProgramDense>& layers = dense_[network++];
      int64_t at = in.saved = take(layers[0].inputs);
      for (ProgramDense& d : layers) {
        d.in = at;
        d.before = d.out = take(d.size);
        if (needs_before(d.activation)) d.out = take(d.size);
        at = d.out;
      }
      if (in.kind == Instruction::net) params = at;
    }
  }

  std::vector<ProgramSum> summed(int64_t& size) {
    std::vector<ProgramSum> sums;
    size = 0;
    for (Weight& w : weights_) {
      ProgramSum s{};
      s.matrix = w.cols > 0;
      s.rows = w.rows;
      s.cols = s.matrix ? w.cols : 1;
      // some of both
      s.transposed = s.matrix && sums.size() % 4 == 0;
      if (s.transposed) std::swap(s.rows, s.cols);
      s.width = s.matrix ? round_up(s.cols, kProgramPad) : kProgramLanes;
      s.offset = size;
      s.grad = (char*)w.grad.data();
      size += s.rows * s.width;
      sums.push_back(s);
    }
    return sums;
  }

  // deques do not move their elements
  std::deque<Weight> weights_;
  std::deque<std::vector<int64_t>> columns_;
  std::deque<std::vector<ProgramDense>> dense_;
  std::deque<std::vector<ProgramSplineEnds>> ends_;
  std::vector<ProgramInstruction> instructions_;
  int64_t tape_ = 0;
};

}  // namespace

PYFLOW_BITS(flow_program) {
  for (int map = 0; map <= int(ScaleMap::softplus_eps); ++map) {
    for (int options = 0; options < 4; ++options) {
      for (const int64_t rows : {1, 150}) {
        char name[64];
        std::snprintf(name, sizeof name, "flow_program[map=%d,options=%d,%d]", map, options, int(rows));
        Flow(map, options).run(rows, name);
      }
    }
  }
}

}  // namespace pyflow
