#include "../../../csrc/args/flow_program.h"

#include <algorithm>
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
    wrap({3, 5});
    net({1, 3, 1}, true, {kHidden, kHidden, 6}, Activation(map % 9));
    set_affine(add(Instruction::affine, {0, 5, 2}, inverse, shift_first), map);
    linear({4, 1, 0, 6, 3});
    every_part({0, 2}, Activation((map + 4) % 9), options & 1);
    add(Instruction::additive, {5, 1, 4}, inverse, false);
    net({4, 0}, false, {kHidden, 2}, Activation::tanh);
    add(Instruction::multiplicative, {2, 5}, inverse, false);
    net({3, 6}, false, {2 * spline_params(kBins, tails_of(map))}, Activation::identity);
    spline({4, 0}, map, inverse, false);
    spline({2, 1, 6, 3}, map + 1, inverse, true);
    autoregressive(map, inverse, shift_first, Activation((map + 2) % 9), options & 2);
    add(Instruction::prior, {0, 1, 2, 3, 4, 5, 6}, false, false).prior = Prior(map % 2);
    box({2, 6}, inverse);
  }

  // y, logdet, and all gradients; rows that share a context share its products
  void run(int64_t rows, int64_t repeats, const char* name) {
    const int64_t contexts = rows / repeats;
    auto x = values(rows * kColumns, 2), context = values(rows * kContext, 2);
    auto gy = values(rows * 3, 1), gl = values(rows, 1);
    // the same values for any number of repeats, of which no sum overflows
    context.resize(contexts * kContext);
    std::vector<float> y(rows * 3), logdet(rows), gx(x.size()), gcontext(rows * kContext), factors(3);
    std::vector<float> of_context(context.size()), products(contexts * products_);
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
    b.context_rows = contexts;
    b.repeats = repeats;
    b.x = matrix(x, kColumns);
    b.context = matrix(context, kContext);
    b.unit_rows = b.tile_rows = kProgramMostRows;
    b.arrays = 4;
    b.solve_columns = solve_.size;
    b.tape = tape_;
    b.width = kHidden;
    b.outputs = outputs;
    b.output_count = 3;
    b.y = matrix(y, 3);
    b.logdet = (char*)logdet.data();
    const int64_t units = ceil_div(rows, b.unit_rows);
    std::vector<float> memory(program_memory(b) + 16);
    b.memory = (char*)((uintptr_t(memory.data()) + 63) / 64 * 64);
    cpu::flow_program_prepare(b, 0, b.instructions);
    if (repeats > 1) {
      b.products = matrix(products, products_);
      cpu::flow_program_context(b, 0, ceil_div(contexts, b.tile_rows));
    }
    cpu::flow_program_forward(b, 0, units);
    b.products = {};
    b.grad_y = matrix(gy, 3);
    b.grad_logdet = matrix(gl, 1);
    b.grad_x = matrix(gx, kColumns);
    b.grad_context = matrix(gcontext, kContext);
    b.of_context = matrix(of_context, kContext);
    std::vector<ProgramSum> sums = summed(b.group_size);
    std::vector<float> group_sums(units * b.group_size);
    b.sum = sums.data();
    b.sums = int64_t(sums.size());
    b.groups = units;
    b.group_sums = (char*)group_sums.data();
    cpu::flow_program_backward(b, 0, units);
    cpu::flow_program_reduce(b, 0, b.sums);
    cpu::flow_program_reduce_context(b, 0, contexts);
    for (const auto* v : {&y, &logdet, &gx, &of_context}) print(name, *v);
    for (const Weight& w : weights_) print(name, w.grad);
  }

 private:
  struct Weight {
    int64_t rows, cols;  // cols 0: a vector
    std::vector<float> data, grad;
    const int64_t *row_order = nullptr, *col_order = nullptr;
    std::vector<float> ordered;
  };

  static ProgramMatrix matrix(std::vector<float>& v, int64_t cols) { return {(char*)v.data(), cols, 1}; }

  int64_t weight(int64_t rows, int64_t cols = 0) {
    weights_.push_back({rows, cols, {}, {}, nullptr, nullptr, {}});
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

  void wrap(std::vector<int64_t> columns) {
    static const double bounds[] = {0.5, 1.25}, shifts[] = {0.75, -0.125};
    ProgramInstruction& in = add(Instruction::wrap, std::move(columns), false, false);
    in.bounds = bounds;
    in.shifts = shifts;
  }

  // with most of the rows inside
  void box(std::vector<int64_t> columns, bool closed) {
    static const double lows[] = {-8, -9}, highs[] = {8, 9};
    ProgramInstruction& in = add(Instruction::uniform, std::move(columns), false, false);
    in.lows = lows;
    in.highs = highs;
    in.closed = closed;
    in.log_density = -5.5;
  }

  ProgramWeight vector(int64_t size) {
    const int64_t place = weight(size);
    return {data(place), place};
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
    in.turned = own;
    if (!own) return;
    in.numbers.place = weight(in.count * spline_params(kBins, in.spline.tails));
    in.numbers.data = data(in.numbers.place);
  }

  ProgramPart part(Part kind, int64_t size, Activation activation = Activation::identity) {
    ProgramPart p{};
    p.kind = kind;
    p.inputs = p.size = size;
    p.activation = activation;
    p.arg = 0.25;
    return p;
  }

  ProgramPart dense(Part kind, int64_t inputs, int64_t size, Activation activation) {
    ProgramPart p = part(kind, size, activation);
    p.inputs = inputs;
    const int64_t place = weight(size, inputs);
    p.weight = {data(place), place};
    p.bias = vector(size);
    if (kind == Part::context) p.once = product(size);
    return p;
  }

  // place of numbers that are made of the context alone
  int64_t product(int64_t size) {
    products_ += size;
    return products_ - size;
  }

  ProgramInstruction& linear_or_net(Instruction kind, std::vector<int64_t> columns, std::vector<ProgramPart> parts) {
    ProgramInstruction& in = add(kind, std::move(columns), false, false);
    parts_.push_back(std::move(parts));
    in.parts = parts_.back().data();
    in.part_count = int64_t(parts_.back().size());
    in.inputs = parts_.back()[0].inputs;
    return in;
  }

  void linear(std::vector<int64_t> columns) {
    const int64_t n = int64_t(columns.size());
    ProgramInstruction& in =
        linear_or_net(Instruction::linear, std::move(columns), {dense(Part::dense, n, n, Activation::identity)});
    in.given_logdet = data(in.logdet_place = weight(1));
  }

  void net(std::vector<int64_t> columns, bool context, const std::vector<int64_t>& sizes, Activation activation) {
    int64_t inputs = int64_t(columns.size()) + (context ? kContext : 0);
    std::vector<ProgramPart> parts;
    for (const int64_t size : sizes) {
      const bool last = parts.size() + 1 == sizes.size();
      parts.push_back(dense(Part::dense, inputs, size, last ? Activation::identity : activation));
      inputs = size;
    }
    parts[0].joins = context;
    parts[0].first = context ? int64_t(columns.size()) : 0;
    if (context) parts[0].once = product(parts[0].size);
    linear_or_net(Instruction::net, std::move(columns), std::move(parts)).context = context;
  }

  // a net of every part, with three results
  void every_part(std::vector<int64_t> columns, Activation activation, bool gate) {
    const int64_t n = int64_t(columns.size()), h = kHidden;
    columns_.push_back({1});
    ProgramPart periodic = part(Part::periodic, n), masked = dense(Part::dense, h, h, activation);
    periodic.columns = columns_.back().data();
    periodic.count = 1;
    periodic.factor = vector(1);
    periodic.sine = vector(1);
    periodic.cosine = vector(1);
    periodic.shift = vector(1);
    masked.mask = {data(weight(h, h)), -1};
    masked_.resize(h * h);
    masked.masked = (char*)masked_.data();
    ProgramPart context = dense(Part::context, kContext, h, activation), norm = part(Part::norm, h);
    context.gate = gate;
    norm.weight = vector(h);
    norm.bias = vector(h);
    norm.eps = 1e-3;
    norm.unbiased = gate;
    ProgramPart elementwise = part(Part::elementwise, h), residual = part(Part::residual, h);
    elementwise.factor = vector(h);
    elementwise.shift = vector(h);
    residual.inner = 3;
    linear_or_net(Instruction::net, std::move(columns),
                  {periodic, dense(Part::dense, n, h, Activation::identity), part(Part::activation, h, activation),
                   masked, context, residual, norm, elementwise, dense(Part::dense, h, 3, Activation::identity)});
  }

  static void set_affine(ProgramInstruction& affine, int map) {
    affine.map = ScaleMap(map);
    affine.map_arg = affine.map == ScaleMap::sigmoid_eps || affine.map == ScaleMap::softplus_eps ? 0.01 : 2.0;
    const int64_t second = map % 2 ? affine.count : 1;  // blocks or pairs
    affine.shift_from = map % 4 < 2 ? 0 : second;
    affine.scale_from = map % 4 < 2 ? second : 0;
    affine.params_step = map % 2 ? 1 : 2;
  }

  // two generations of one column each, 1 and 3, whose numbers see column 4, and then column 1 too
  void autoregressive(int map, bool inverse, bool shift_first, Activation activation, bool gate) {
    static const int64_t sources[] = {4, 1, 3}, inputs[] = {1, 2, 3}, units[] = {9, kHidden, kHidden};
    static const int64_t numbers[] = {2, 4, 4};
    static int64_t mixed[kHidden];
    for (int64_t i = 0; i < kHidden; ++i) mixed[i] = (7 * i + 3) % kHidden;
    const int64_t h = kHidden;
    ProgramPart residual = part(Part::residual, h);
    residual.inner = 1;
    ProgramInstruction& in =
        linear_or_net(Instruction::autoregressive, {4, 1, 3},
                      {dense(Part::dense, 3, h, Activation::identity), dense(Part::context, kContext, h, activation),
                       dense(Part::dense, h, h, activation), residual, dense(Part::dense, h, 4, Activation::identity)});
    std::vector<ProgramPart>& parts = parts_.back();
    parts[1].gate = gate;
    for (ProgramPart& p : parts) {
      p.input_ends = units;
      p.ends = units;
    }
    parts[0].input_ends = inputs;
    parts[4].ends = numbers;
    for (ProgramPart& p : parts) {
      order(p.weight, p.ends == units ? mixed : nullptr,
            p.input_ends == units && p.kind == Part::dense ? mixed : nullptr);
      order(p.bias, p.ends == units ? mixed : nullptr, nullptr);
    }
    for (int64_t g = 0; g < 2; ++g) {
      columns_.push_back({1 + 2 * g});
      ProgramInstruction transform{};
      transform.kind = Instruction::affine;
      transform.columns = columns_.back().data();
      transform.count = 1;
      transform.inverse = inverse;
      transform.shift_first = shift_first;
      set_affine(transform, map);
      transforms_.push_back(transform);
    }
    solve_.generations = 2;
    solve_.sources = sources;
    solve_.transforms = transforms_.data();
    solve_.ordered = ordered_.data();
    solve_.ordered_count = int64_t(ordered_.size());
    in.solve = &solve_;
  }

  // lets a part read a weight in another order
  void order(ProgramWeight& w, const int64_t* rows, const int64_t* cols) {
    static const int64_t same[] = {0, 1, 2, 3};
    if (!w.data) return;
    Weight& weight = weights_[w.place];
    weight.row_order = rows ? rows : same;
    weight.col_order = cols;
    weight.ordered.resize(weight.data.size());
    const ProgramWeight given = w;
    w.data = (const char*)weight.ordered.data();
    ordered_.push_back({given, nullptr, weight.row_order, cols, weight.rows, weight.cols > 0 ? weight.cols : 1,
                        (char*)weight.ordered.data()});
  }

  // columns of the tape for every value
  void place() {
    tape_ = 0;
    const auto take = [&](int64_t count) {
      tape_ += count;
      return tape_ - count;
    };
    int64_t params = 0;
    for (ProgramInstruction& in : instructions_) {
      in.params = params;
      const bool solves = in.kind == Instruction::autoregressive;
      if (in.kind != Instruction::net && !solves) in.saved = take(in.count);
      if (in.kind != Instruction::net && !solves) continue;
      const int64_t first = tape_;
      if (solves) tape_ = 0;
      std::vector<ProgramPart>& parts =
          *std::find_if(parts_.begin(), parts_.end(), [&](const auto& list) { return list.data() == in.parts; });
      int64_t at = take(parts[0].inputs);
      for (ProgramPart& p : parts) {
        p.in = at;
        p.given = take(p.size);
        at = p.out = take(p.size);
        p.before = needs_before(p.activation) ? take(p.size) : p.kind == Part::context ? p.given : p.out;
      }
      for (size_t i = 0; i < parts.size(); ++i) {
        if (parts[i].kind != Part::residual) continue;
        parts[i].before = parts[i].in;
        parts[i].in = parts[i - parts[i].inner].in;
      }
      if (!solves) {
        params = at;
        continue;
      }
      for (size_t g = 0; g < 2; ++g) {
        transforms_[g].params = at + 2 * int64_t(g);
        transforms_[g].saved = take(1);
      }
      solve_.tape = first;
      solve_.size = tape_;
      tape_ += first;
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
      s.partial = w.row_order != nullptr;
      s.row_order = w.row_order;
      s.col_order = w.col_order;
      if (s.transposed) std::swap(s.rows, s.cols);
      if (s.transposed) std::swap(s.row_order, s.col_order);
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
  std::deque<std::vector<ProgramPart>> parts_;
  std::deque<std::vector<ProgramSplineEnds>> ends_;
  std::vector<ProgramInstruction> instructions_;
  std::vector<float> masked_;
  ProgramSolve solve_{};
  std::vector<ProgramInstruction> transforms_;
  std::vector<ProgramOrdered> ordered_;
  int64_t tape_ = 0, products_ = 0;
};

}  // namespace

PYFLOW_BITS(flow_program) {
  for (int map = 0; map <= int(ScaleMap::softplus_eps); ++map) {
    for (int options = 0; options < 4; ++options) {
      for (const int64_t repeats : {1, 50}) {
        const int64_t rows = repeats > 1 ? 3 * repeats : 1;
        char name[64];
        std::snprintf(name, sizeof name, "flow_program[map=%d,options=%d,%d]", map, options, int(rows));
        Flow(map, options).run(rows, repeats, name);
      }
    }
  }
}

}  // namespace pyflow
