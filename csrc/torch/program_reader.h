// Reads a program from its code.
#pragma once

#include <cmath>
#include <deque>
#include <initializer_list>
#include <utility>
#include <vector>

#include "../args/flow_program.h"
#include "device.h"
#include "program_solve.h"
#include "program_words.h"

namespace pyflow {
namespace {

using Optional = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

constexpr int64_t kMostColumns = 1 << 24;  // that an instruction names
constexpr int64_t kTails = 2;              // names in TAILS of pyflow/_schemas.py
constexpr int64_t kGrain = 1 << 19;        // multiply-adds that are worth a thread: a few microseconds

// a program read from its code, and held to its tensors
class Reader {
 public:
  Reader(ProgramArgs& a, const Tensor& x, const Optional& context, int64_t repeats, Tensors& weights,
         const std::string& code, bool taped, bool keeps)
      : a_(a),
        weights_(weights),
        words_(code),
        taped_(taped),
        keeps_(keeps),
        uses_(weights.size()),
        lanes_(weights.size()),
        masks_(weights.size()) {
    a.f64 = is_f64(x);
    require(x.dim() == 2 && x.scalar_type() == compute_type(a.f64));
    a.rows = x.size(0);
    a.columns = words_.integer();
    a.context_columns = words_.integer();
    require(x.size(1) == a.columns && a.columns <= kMostColumns);
    require(!context || context->dim() == 2);
    require(a.context_columns == (context ? context->size(1) : 0) && a.context_columns <= kMostColumns);
    if (context) read_context_rows(*context, repeats, x);
    for (Tensor& w : weights) {
      require(w.scalar_type() == x.scalar_type() && w.dim() <= 2);
      if (!w.is_contiguous()) w = torch::stable::contiguous(w);
    }
    a.x = rows_of(x);
    if (context) a.context = rows_of(*context);
    const std::vector<int64_t>& outputs = columns(a.columns);
    a.outputs = outputs.data();
    a.output_count = int64_t(outputs.size());
    widen(a.output_count);
    const int64_t count = words_.integer();
    for (int64_t i = 0; i < count; ++i) read();
    require(params_ == 0 && words_.end());
    // the gradient of a weight is summed in one way
    for (size_t i = 0; i < weights.size(); ++i) require(lanes_[i] == 0 || lanes_[i] == uses_[i]);
    a.instructions = int64_t(instructions_.size());
    a.instruction = instructions_.data();
    if (!taped_) place_arrays();
    a.tape = taped_ ? taken_ : arrays_ * a.width + solve_columns_;
    a.kept_columns = kept_;
    for (const Solve& s : solves_) {
      // gradients are in another order
      for (const ProgramOrdered& o : s.ordered) require(uses_[size_t(o.weight.place)] <= 1);
    }
  }

  // room for what of the program is the same for all rows, and its values
  void prepare(const Tensor& like) {
    const int64_t size = a_.f64 ? 8 : 4;
    prepared_ = new_rows(like, prepared_count_, like.scalar_type());
    char* next = (char*)prepared_.data_ptr();
    const auto take = [&](int64_t count) {
      next += count * size;
      return next - count * size;
    };
    logdets_.resize(instructions_.size());
    for (size_t i = 0; i < instructions_.size(); ++i) {
      ProgramInstruction& in = instructions_[i];
      in.logdet = &logdets_[i];
      if (in.log_scale) in.factor = take(in.count);
    }
    for (std::vector<ProgramPart>& parts : parts_) {
      for (ProgramPart& part : parts) {
        if (part.mask.data) part.masked = take(part.size * part.inputs);
      }
    }
    for (Solve& s : solves_) s.prepare(take);
    cpu::flow_program_prepare(a_, 0, a_.instructions);
  }

  const std::vector<int64_t>& uses() const { return uses_; }
  // whether the gradient of a weight is summed in lanes, though it is a matrix
  bool in_lanes(size_t place) const { return lanes_[place] > 0; }
  const std::vector<const char*>& masks() const { return masks_; }  // of weights
  // what gives the gradients of a weight another order; null for most
  const ProgramOrdered* ordered(int64_t place) const {
    for (const Solve& s : solves_) {
      for (const ProgramOrdered& o : s.ordered) {
        if (o.weight.place == place) return &o;
      }
    }
    return nullptr;
  }
  // numbers that the nets make of a row of the context alone
  int64_t products() const { return products_; }
  // most columns of a block of an autoregressive inverse
  int64_t solve_columns() const { return solve_columns_; }
  // arrays of gradients: those of a part, what a context needs, and one for every residual around
  int64_t gradient_arrays() const { return 3 + depth_; }

  // smallest number of tiles per thread
  int64_t grain() const { return ceil_div(kGrain, a_.tile_rows * (work_ + 8 * a_.columns * a_.instructions + 1)); }

  static ProgramMatrix rows_of(const Tensor& t) {
    return {(char*)t.data_ptr(), t.stride(0), t.dim() > 1 ? t.stride(1) : 0};
  }

 private:
  void read_context_rows(const Tensor& context, int64_t repeats, const Tensor& x) {
    const int64_t rows = context.size(0);
    require(context.scalar_type() == x.scalar_type() && repeats > 0);
    a_.context_rows = rows;
    a_.repeats = repeats;
    if (a_.rows == 0) return;
    require(rows > 0 && repeats <= a_.rows / rows && a_.rows % (rows * repeats) == 0);
    // an expanded row has one gradient per row of x
    if (!taped_ && context.stride(0) == 0) a_.context_rows = 1;
    if (a_.context_rows == 1) a_.repeats = a_.rows;
  }

  // columns that an instruction or a part names, of `most`
  const std::vector<int64_t>& columns(int64_t most) {
    columns_.emplace_back();
    std::vector<int64_t>& list = columns_.back();
    for (int64_t runs = words_.integer(); runs > 0; --runs) {
      const int64_t first = words_.integer(), step = words_.integer(), count = words_.integer();
      require(count <= kMostColumns - int64_t(list.size()));
      for (const int64_t number : {first, step}) require(number >= -kMostColumns && number <= kMostColumns);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t column = first + step * i;
        require(column >= 0 && column < most);
        list.push_back(column);
      }
    }
    widen(int64_t(list.size()));
    return list;
  }

  ProgramWeight weight(int64_t rows, int64_t cols = -1) { return weight_at(words_.integer(), rows, cols); }

  // the weight at a place: a vector (rows,), a matrix (rows, cols), or a number (rows -1); absent for -1. A constant
  // has no gradient.
  ProgramWeight weight_at(int64_t place, int64_t rows, int64_t cols = -1, bool constant = false) {
    if (place == -1) return {nullptr, -1};
    require(place >= 0 && place < int64_t(weights_.size()));
    const Tensor& w = weights_[place];
    require(w.dim() == (rows >= 0) + (cols >= 0));
    require((rows < 0 || w.size(0) == rows) && (cols < 0 || w.size(1) == cols));
    if (!constant) ++uses_[place];
    return {(const char*)w.data_ptr(), place};
  }

  void widen(int64_t columns) { a_.width = std::max(a_.width, columns); }

  // With a tape every value has columns of its own. Without, values take turns in arrays: one that is not kept.
  int64_t take(int64_t count) {
    widen(count);
    if (taped_) {
      taken_ += count;
      return taken_ - count;
    }
    int64_t array = 0;
    while (std::find(in_use_.begin(), in_use_.end(), array) != in_use_.end()) ++array;
    arrays_ = std::max(arrays_, array + 1);
    return array;
  }

  // place of a value that an elementwise map makes of the one at `from`, the last that is kept
  int64_t take_over(int64_t from, int64_t count) {
    const bool once = std::count(in_use_.begin(), in_use_.end(), from) == 1;
    return !taped_ && once && !is_kept(from) ? from : take(count);
  }

  // place of values that the forward leaves to the backward
  int64_t keep(int64_t count) {
    widen(count);
    kept_ += count;
    return kept_place(kept_ - count);
  }

  void place_arrays() {
    for (ProgramInstruction& in : instructions_) {
      in.saved *= a_.width;
      if (!is_kept(in.params)) in.params *= a_.width;
    }
    for (std::vector<ProgramPart>& parts : parts_) {
      for (ProgramPart& part : parts) {
        for (int64_t* place : {&part.in, &part.out, &part.before, &part.given}) {
          if (!is_kept(*place)) *place *= a_.width;
        }
      }
    }
    for (Solve& s : solves_) s.solve.tape = arrays_ * a_.width;
  }

  void read() {
    ProgramInstruction in{};
    in.kind = Instruction(words_.word(kInstructionNames));
    const std::vector<int64_t>& named = columns(a_.columns);
    in.columns = named.data();
    in.count = int64_t(named.size());
    switch (in.kind) {
      case Instruction::scale: read_scale(in); break;
      case Instruction::linear: read_linear(in); break;
      case Instruction::wrap: read_wrap(in); break;
      case Instruction::net: read_net(in); break;
      case Instruction::additive: read_additive(in); break;
      case Instruction::multiplicative: read_additive(in); break;
      case Instruction::affine: read_affine(in); break;
      case Instruction::spline: read_spline(in); break;
      case Instruction::autoregressive: read_autoregressive(in); break;
      case Instruction::prior: in.prior = Prior(words_.below(std::size(kPriorNames))); break;
      case Instruction::uniform: read_uniform(in); break;
    }
    const auto among = [&](std::initializer_list<Instruction> kinds) {
      return std::find(kinds.begin(), kinds.end(), in.kind) != kinds.end();
    };
    const bool saves = !among({Instruction::net, Instruction::additive, Instruction::wrap, Instruction::autoregressive,
                               Instruction::uniform});
    if (taped_ && saves) in.saved = take(in.count);
    if (keeps_ && among({Instruction::affine, Instruction::multiplicative, Instruction::spline})) {
      in.after = keep(in.count);
    }
    instructions_.push_back(in);
  }

  void read_scale(ProgramInstruction& in) {
    const ProgramWeight shift = weight(in.count), log_scale = weight(in.count);
    in.shift = shift.data;
    in.shift_place = shift.place;
    in.log_scale = log_scale.data;
    in.log_scale_place = log_scale.place;
    in.shift_first = words_.flag();
    in.inverse = words_.flag();
    if (in.log_scale) prepared_count_ += in.count;
  }

  void read_linear(ProgramInstruction& in) {
    parts_.emplace_back(1);
    ProgramPart& part = parts_.back()[0];
    part.inputs = part.size = in.count;
    part.weight = weight(in.count, in.count);
    require(part.weight.place >= 0);
    part.bias = weight(in.count);
    const ProgramWeight logdet = weight(-1);
    in.given_logdet = logdet.data;
    in.logdet_place = logdet.place;
    in.parts = &part;
    work_ += in.count * in.count;
    if (!taped_) in.saved = take(in.count);
  }

  void read_wrap(ProgramInstruction& in) {
    std::vector<double>&bounds = constants_.emplace_back(), &shifts = constants_.emplace_back();
    bounds = constants_of(in.count);
    shifts = constants_of(in.count);
    if (words_.flag()) {
      for (double& shift : shifts) shift = -shift;
    }
    in.bounds = bounds.data();
    in.shifts = shifts.data();
  }

  void read_uniform(ProgramInstruction& in) {
    std::vector<double>&lows = constants_.emplace_back(), &highs = constants_.emplace_back();
    lows = constants_of(in.count);
    highs = constants_of(in.count);
    in.closed = words_.flag();
    for (size_t i = 0; i < lows.size(); ++i) {
      require(lows[i] < highs[i]);
      in.log_density -= std::log(highs[i] - lows[i]);
    }
    in.lows = lows.data();
    in.highs = highs.data();
  }

  // numbers of every column, of one for all or one for each
  std::vector<double> constants_of(int64_t count) {
    std::vector<double> list = reals();
    require(list.size() == 1 || list.size() == size_t(count));
    if (list.size() == 1) list.resize(size_t(count), list[0]);
    return list;
  }

  void read_net(ProgramInstruction& in) {
    // every conditioner serves one transform
    require(params_ == 0);
    in.context = words_.flag();
    in.inputs = in.count + (in.context ? a_.context_columns : 0);
    int64_t size = in.inputs, at = take(size);
    std::vector<ProgramPart>& parts = parts_.emplace_back();
    in_use_ = {at};
    joins_ = in.context;
    first_ = in.count;
    read_parts(parts, at, size);
    in.parts = parts.data();
    in.part_count = int64_t(parts.size());
    require(size > 0);
    params_ = size;
    params_at_ = at;
  }

  // appends parts that read `size` numbers at a place; then these are what the last one returns, which is the last kept
  void read_parts(std::vector<ProgramPart>& parts, int64_t& at, int64_t& size) {
    const int64_t count = words_.integer();
    require(count > 0);
    for (int64_t i = 0; i < count; ++i) {
      ProgramPart part{};
      part.kind = Part(words_.word(kPartNames));
      part.in = at;
      part.inputs = part.size = size;
      part.joins = std::exchange(joins_, false) && part.kind == Part::dense;
      part.first = part.joins ? first_ : 0;
      read_part(parts, part);
      parts.push_back(part);
      at = in_use_.back() = part.out;
      size = part.size;
    }
  }

  void read_part(std::vector<ProgramPart>& parts, ProgramPart& part) {
    switch (part.kind) {
      case Part::dense: return read_dense(part, part.out);
      case Part::activation: read_activation(part); break;
      case Part::residual: return read_residual(parts, part);
      case Part::context: return read_context(part);
      case Part::norm:
        part.weight = weight(part.size);
        part.bias = weight(part.size);
        part.eps = words_.real();
        part.unbiased = words_.flag();
        break;
      case Part::elementwise:
        part.factor = weight(part.size);
        part.shift = weight(part.size);
        break;
      case Part::periodic: read_periodic(part); break;
    }
    part.out = take_over(part.in, part.size);
  }

  void read_activation(ProgramPart& part) {
    part.activation = Activation(words_.below(std::size(kActivationNames)));
    part.arg = words_.real();
  }

  // h = act(W h + b) at `out`
  void read_dense(ProgramPart& part, int64_t& out) {
    const int64_t weight_place = words_.integer(), bias_place = words_.integer();
    part.size = words_.integer();
    require(part.size > 0 && part.size <= kMostColumns);
    part.weight = weight_at(weight_place, part.size, part.inputs);
    require(part.weight.place >= 0);
    part.bias = weight_at(bias_place, part.size);
    read_activation(part);
    part.mask = weight_at(words_.integer(), part.size, part.inputs, true);
    if (part.mask.data) {
      masks_[weight_place] = part.mask.data;
      prepared_count_ += part.size * part.inputs;
    }
    work_ += part.size * part.inputs;
    if (part.joins || part.kind == Part::context) {
      part.once = products_;
      products_ += part.size;
    }
    const bool kept = keeps_ && part.kind == Part::dense && part.inputs >= kProgramKeptInputs;
    part.before = out = kept ? keep(part.size) : take(part.size);
    if ((taped_ || kept) && needs_before(part.activation)) out = take(part.size);
  }

  void read_residual(std::vector<ProgramPart>& parts, ProgramPart& part) {
    const size_t before = parts.size();
    int64_t at = part.in, size = part.size;
    in_use_.push_back(at);
    depth_ = std::max(depth_, int64_t(in_use_.size()) - 1);
    require(gradient_arrays() <= kProgramMostArrays);
    read_parts(parts, at, size);
    in_use_.pop_back();
    require(size == part.size);
    part.inner = int64_t(parts.size() - before);
    part.before = at;
    part.out = taped_ || is_kept(at) ? take(size) : at;
  }

  void read_context(ProgramPart& part) {
    const int64_t size = part.size;
    part.inputs = a_.context_columns;
    widen(part.inputs);
    read_dense(part, part.given);
    require(part.size == size);
    part.gate = words_.flag();
    const bool needed = part.gate || part.activation != Activation::identity;
    part.out = taped_ && needed ? take(size) : part.given;
  }

  void read_periodic(ProgramPart& part) {
    const std::vector<int64_t>& named = columns(part.size);
    part.columns = named.data();
    part.count = int64_t(named.size());
    part.factor = weight_at(words_.integer(), part.count, -1, true);
    part.sine = weight(part.count);
    part.cosine = weight(part.count);
    part.shift = weight(part.count);
    require(part.factor.place >= 0 && part.sine.place >= 0 && part.cosine.place >= 0);
  }

  void take_params(ProgramInstruction& in, int64_t count) {
    require(params_ == count);
    params_ = 0;
    in.params = params_at_;
  }

  void read_additive(ProgramInstruction& in) {
    take_params(in, in.count);
    in.inverse = words_.flag();
  }

  void read_affine(ProgramInstruction& in) {
    take_params(in, 2 * in.count);
    const int map = words_.below(std::size(kScaleMapNames));
    // behind the packings of couplings: pairs with the scale first
    const int packing = words_.below(std::size(kPackingNames) + 1), last = int(std::size(kPackingNames));
    const bool pairs = packing == int(Packing::interleaved) || packing == last;
    const bool shift_first = packing == int(Packing::interleaved) || packing == int(Packing::shift_scale);
    const int64_t second = pairs ? 1 : in.count;
    in.shift_from = shift_first ? 0 : second;
    in.scale_from = shift_first ? second : 0;
    in.params_step = pairs ? 2 : 1;
    in.map_arg = words_.real();
    in.map = resolve(map, in.map_arg);
    in.shift_first = words_.flag();
    in.inverse = words_.flag();
  }

  void read_spline(ProgramInstruction& in) {
    SplineForm& form = in.spline;
    const int64_t bins = words_.integer(), slopes = words_.integer();
    require(in.count > 0 && bins >= 2 && bins <= kMostBins && slopes >= bins - 1 && slopes <= bins + 1);
    const std::vector<int64_t>& tails = columns(kTails);
    const int64_t given = int64_t(tails.size());
    require(given <= 1 || given == in.count);
    require(given > 0 || slopes == bins + 1);
    form.bins = int(bins);
    form.tails = given == 0           ? SplineTails::none
                 : slopes == bins - 1 ? SplineTails::linear
                 : slopes == bins     ? SplineTails::circular
                                      : SplineTails::mixed;
    form.variant = SplineVariant(words_.below(std::size(kSplineVariantNames)));
    const std::vector<double> bounds = constants_of(in.count);
    const double param_scale = words_.real(), min_bin = words_.real(), min_slope = words_.real();
    form.constants = spline_constants(form.variant, form.bins, param_scale, min_bin, min_slope);
    read_numbers(in, 2 * bins + slopes);
    form.inverse = words_.flag();
    in.zero_outside = words_.flag();
    in.turned = words_.flag();
    require(given > 0 || !(in.zero_outside || in.turned));
    std::vector<ProgramSplineEnds>& ends = ends_.emplace_back();
    for (int64_t i = 0; i < in.count; ++i) {
      const double bound = bounds[size_t(i)];
      const bool linear = given > 0 && tails[given == 1 ? 0 : size_t(i)] == 0;
      ends.push_back(given > 0 ? ProgramSplineEnds{-bound, bound, linear} : ProgramSplineEnds{0, 1, false});
    }
    in.ends = ends.data();
  }

  std::vector<double> reals() {
    const int64_t count = words_.integer();
    require(count >= 0 && count <= kMostColumns);
    std::vector<double> list;
    for (int64_t i = 0; i < count; ++i) list.push_back(words_.real());
    return list;
  }

  // the numbers of the columns of a spline
  void read_numbers(ProgramInstruction& in, int64_t count) {
    in.numbers = weight(in.count, count);
    if (in.numbers.data) {
      ++lanes_[in.numbers.place];
    } else {
      take_params(in, in.count * count);
    }
  }

  void read_autoregressive(ProgramInstruction& in) {
    Solve& s = solves_.emplace_back();
    // its values have columns of their own, and what is kept outside of it stays
    const bool taped = std::exchange(taped_, true), keeps = std::exchange(keeps_, false);
    const int64_t taken = std::exchange(taken_, 0), prepared = prepared_count_;
    const int64_t params = std::exchange(params_, 0), params_at = params_at_;
    const std::vector<int64_t> in_use = in_use_;
    in.context = words_.flag();
    in.inputs = in.count + (in.context ? a_.context_columns : 0);
    int64_t size = in.inputs, at = take(size);
    in_use_ = {at};
    joins_ = in.context;
    first_ = 0;  // in the order of levels
    read_parts(s.parts, at, size);
    params_ = size;
    ProgramInstruction transform = read_solved();
    const std::vector<int64_t>& generations = columns(transform.count + 1);
    std::deque<std::vector<int64_t>> levels;
    for (int64_t count = words_.integer(); count > 0; --count) levels.push_back(columns(transform.count + 1));
    s.order(a_, in, taken_, transform, generations, std::move(levels));
    in.parts = s.parts.data();
    in.part_count = int64_t(s.parts.size());
    in.solve = &s.solve;
    solve_columns_ = std::max(solve_columns_, taken_);
    s.solve.tape = taken;
    taped_ = taped;
    keeps_ = keeps;
    taken_ = taken + (taped ? s.solve.size : 0);
    prepared_count_ = prepared;
    for (const ProgramOrdered& o : s.ordered) prepared_count_ += o.row_count * o.col_count;
    params_ = params;
    params_at_ = params_at;
    in_use_ = in_use;
  }

  // the transform of an autoregressive inverse
  ProgramInstruction read_solved() {
    ProgramInstruction in{};
    in.kind = Instruction(words_.word(kInstructionNames));
    const std::vector<int64_t>& named = columns(a_.columns);
    in.columns = named.data();
    in.count = int64_t(named.size());
    require(in.kind == Instruction::affine || in.kind == Instruction::spline);
    in.kind == Instruction::affine ? read_affine(in) : read_spline(in);
    require(!in.numbers.data);
    in.saved = take(in.count);
    return in;
  }

  ProgramArgs& a_;
  Tensors& weights_;
  Words words_;
  bool taped_;
  bool keeps_;  // whether values are left to the backward
  std::vector<ProgramInstruction> instructions_;
  // deques do not move their elements
  std::deque<std::vector<int64_t>> columns_;
  std::deque<std::vector<ProgramPart>> parts_;  // of nets and linear maps
  int64_t params_ = 0, params_at_ = 0;          // numbers that the last conditioner returns, until they are taken
  int64_t taken_ = 0, arrays_ = 0;              // columns of the tape, or arrays
  int64_t kept_ = 0;                            // columns that are left to the backward
  std::vector<int64_t> in_use_;                 // arrays that are in use
  bool joins_ = false;                          // whether the next part reads the context among its inputs
  int64_t first_ = 0;                           // from here on
  int64_t products_ = 0;                        // numbers of a row of the context
  int64_t depth_ = 0;                           // most residuals around a part
  std::deque<Solve> solves_;
  int64_t solve_columns_ = 0;
  int64_t prepared_count_ = 0;
  std::vector<int64_t> uses_;   // of every weight
  std::vector<int64_t> lanes_;  // those whose gradients are summed in lanes
  std::deque<std::vector<ProgramSplineEnds>> ends_;
  std::deque<std::vector<double>> constants_;
  std::vector<const char*> masks_;
  int64_t work_ = 0;  // multiply-adds of a row
  std::vector<double> logdets_;
  Tensor prepared_;
};

}  // namespace
}  // namespace pyflow
