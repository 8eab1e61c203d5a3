#include "../args/flow_program.h"

#include <algorithm>
#include <charconv>
#include <deque>
#include <iterator>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "device.h"

namespace pyflow {
namespace {

using Optional = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

void require(bool fits) { STD_TORCH_CHECK(fits, "flow_program: the code does not fit its tensors"); }

// Reads the words of a code one after the other, see Program.encode in pyflow/program.py. A process may have a locale
// with another decimal point, which from_chars does not heed.
class Words {
 public:
  explicit Words(const std::string& text) : at_(text.data()), end_(at_ + text.size()) {}

  int64_t integer() { return number<int64_t>(); }
  double real() { return number<double>(); }
  bool flag() { return integer() != 0; }
  // the place of the next word among `names`
  template <size_t N>
  int word(const char* const (&names)[N]) {
    skip();
    const char* last = std::find(at_, end_, ' ');
    const std::string_view found(at_, size_t(last - at_));
    const size_t place = size_t(std::find(names, names + N, found) - names);
    require(place < N);
    at_ = last;
    return int(place);
  }
  bool end() const { return at_ == end_; }

 private:
  void skip() {
    if (at_ != end_ && *at_ == ' ') ++at_;
  }

  template <class V>
  V number() {
    skip();
    V value{};
    const std::from_chars_result read = std::from_chars(at_, end_, value);
    require(read.ec == std::errc() && (read.ptr == end_ || *read.ptr == ' '));
    at_ = read.ptr;
    return value;
  }

  const char* at_;
  const char* end_;
};

constexpr int64_t kMostLayers = 1 << 16;   // of a network
constexpr int64_t kMostColumns = 1 << 24;  // that an instruction names
constexpr int64_t kTails = 2;              // names in TAILS of pyflow/_schemas.py
constexpr int64_t kGrain = 1 << 19;        // multiply-adds that are worth a thread: a few microseconds

// a program read from its code, and held to its tensors
class Reader {
 public:
  Reader(ProgramArgs& a, const Tensor& x, const Optional& context, Tensors& weights, const std::string& code,
         bool taped)
      : a_(a), weights_(weights), words_(code), taped_(taped) {
    a.f64 = is_f64(x);
    require(x.dim() == 2 && x.scalar_type() == compute_type(a.f64));
    a.rows = x.size(0);
    a.columns = words_.integer();
    a.context_columns = words_.integer();
    require(x.size(1) == a.columns && a.context_columns == (context ? context->size(1) : 0));
    if (context) {
      require(context->dim() == 2 && context->size(0) == a.rows && context->scalar_type() == x.scalar_type());
    }
    for (Tensor& w : weights) {
      require(w.scalar_type() == x.scalar_type() && w.dim() <= 2);
      if (!w.is_contiguous()) w = torch::stable::contiguous(w);
    }
    uses_.resize(weights.size());
    lanes_.resize(weights.size());
    a.x = rows_of(x);
    if (context) a.context = rows_of(*context);
    const std::vector<int64_t>* outputs = columns();
    a.outputs = outputs->data();
    a.output_count = int64_t(outputs->size());
    widen(a.output_count);
    a.instructions = words_.integer();
    require(a.instructions >= 0);
    for (int64_t i = 0; i < a.instructions; ++i) read();
    require(params_ == 0 && words_.end());
    // the gradient of a weight is summed in one way
    for (size_t i = 0; i < weights.size(); ++i) require(lanes_[i] == 0 || lanes_[i] == uses_[i]);
    a.instruction = instructions_.data();
    place();
  }

  // room for the factors and log-determinants of the scales
  void reserve(const Tensor& like) {
    Tensor factors = new_rows(like, factors_, like.scalar_type());
    const int64_t size = a_.f64 ? 8 : 4;
    logdets_.resize(instructions_.size());
    int64_t used = 0;
    for (size_t i = 0; i < instructions_.size(); ++i) {
      ProgramInstruction& in = instructions_[i];
      in.logdet = &logdets_[i];
      if (in.kind != Instruction::scale || !in.log_scale) continue;
      in.factor = (char*)factors.data_ptr() + used * size;
      used += in.count;
    }
    factor_memory_ = factors;
    cpu::flow_program_prepare(a_, 0, a_.instructions);
  }

  const std::vector<int64_t>& uses() const { return uses_; }
  bool in_lanes(size_t place) const { return lanes_[place] > 0; }

  // smallest number of tiles per thread
  int64_t grain() const { return ceil_div(kGrain, a_.tile_rows * (work_ + 8 * a_.columns * a_.instructions + 1)); }

  static ProgramMatrix rows_of(const Tensor& t) {
    return {(char*)t.data_ptr(), t.stride(0), t.dim() > 1 ? t.stride(1) : 0};
  }

 private:
  const std::vector<int64_t>* columns() { return integers(a_.columns); }

  // a tuple of integers from 0 to limit - 1
  const std::vector<int64_t>* integers(int64_t limit) {
    columns_.emplace_back();
    std::vector<int64_t>& list = columns_.back();
    for (int64_t runs = words_.integer(); runs > 0; --runs) {
      const int64_t first = words_.integer(), step = words_.integer(), count = words_.integer();
      require(count <= kMostColumns - int64_t(list.size()));
      for (int64_t i = 0; i < count; ++i) {
        const int64_t column = first + step * i;
        require(column >= 0 && column < limit);
        list.push_back(column);
      }
    }
    return &list;
  }

  const Tensor& weight(int64_t place) {
    require(place >= 0 && place < int64_t(weights_.size()));
    return weights_[place];
  }

  const char* memory(int64_t place) {
    ++uses_[place];
    return (const char*)weights_[place].data_ptr();
  }

  // the memory of weight `place`, a vector (size,); null for -1
  const char* vector(int64_t place, int64_t size) {
    if (place == -1) return nullptr;
    require(weight(place).dim() == 1 && weight(place).size(0) == size);
    return memory(place);
  }

  // the memory of a matrix of the size of d
  const char* matrix(const ProgramDense& d) {
    const Tensor& w = weight(d.weight_place);
    require(w.dim() == 2 && w.size(0) == d.size && w.size(1) == d.inputs);
    work_ += d.size * d.inputs;
    return memory(d.weight_place);
  }

  const char* number(int64_t place) {
    if (place == -1) return nullptr;
    require(weight(place).dim() == 0);
    return memory(place);
  }

  void widen(int64_t columns) { a_.width = std::max(a_.width, columns); }

  void read() {
    ProgramInstruction in{};
    in.kind = Instruction(words_.word(kInstructionNames));
    const std::vector<int64_t>* named = columns();
    in.columns = named->data();
    in.count = int64_t(named->size());
    widen(in.count);
    switch (in.kind) {
      case Instruction::scale: read_scale(in); break;
      case Instruction::linear: read_linear(in); break;
      case Instruction::mlp: read_mlp(in); break;
      case Instruction::additive: read_additive(in); break;
      case Instruction::affine: read_affine(in); break;
      case Instruction::spline: read_spline(in); break;
      case Instruction::prior: in.prior = Prior(number_below(std::size(kPriorNames))); break;
    }
    instructions_.push_back(in);
  }

  std::vector<double> reals() {
    const int64_t count = words_.integer();
    require(count >= 0 && count <= kMostColumns);
    std::vector<double> list;
    for (int64_t i = 0; i < count; ++i) list.push_back(words_.real());
    return list;
  }

  int number_below(size_t count) {
    const int64_t number = words_.integer();
    require(number >= 0 && number < int64_t(count));
    return int(number);
  }

  void read_scale(ProgramInstruction& in) {
    in.shift_place = words_.integer();
    in.log_scale_place = words_.integer();
    in.shift = vector(in.shift_place, in.count);
    in.log_scale = vector(in.log_scale_place, in.count);
    in.shift_first = words_.flag();
    in.inverse = words_.flag();
    if (in.log_scale) factors_ += in.count;
  }

  void read_linear(ProgramInstruction& in) {
    dense_.emplace_back(1);
    ProgramDense& d = dense_.back()[0];
    d.weight_place = words_.integer();
    d.bias_place = words_.integer();
    d.inputs = d.size = in.count;
    d.weight = matrix(d);
    d.bias = vector(d.bias_place, in.count);
    in.dense = &d;
    in.layers = 1;
    in.logdet_place = words_.integer();
    in.given_logdet = number(in.logdet_place);
  }

  void read_mlp(ProgramInstruction& in) {
    in.context = words_.flag();
    in.layers = words_.integer();
    require(in.layers > 0 && in.layers <= kMostLayers);
    dense_.emplace_back(in.layers);
    in.dense = dense_.back().data();
    int64_t inputs = in.count + (in.context ? a_.context_columns : 0);
    int64_t most = inputs;
    for (ProgramDense& d : dense_.back()) {
      d.weight_place = words_.integer();
      d.bias_place = words_.integer();
      d.inputs = inputs;
      d.size = inputs = words_.integer();
      require(d.size > 0);
      d.weight = matrix(d);
      d.bias = vector(d.bias_place, d.size);
      d.activation = Activation(number_below(std::size(kActivationNames)));
      d.arg = words_.real();
      most = std::max(most, d.size);
    }
    widen(most);
    // every conditioner serves one transform
    require(params_ == 0);
    params_ = inputs;
  }

  void take_params(int64_t count) {
    require(params_ == count);
    params_ = 0;
  }

  void read_additive(ProgramInstruction& in) {
    take_params(in.count);
    in.inverse = words_.flag();
  }

  void read_affine(ProgramInstruction& in) {
    take_params(2 * in.count);
    const int map = number_below(std::size(kScaleMapNames));
    in.packing = Packing(number_below(std::size(kPackingNames)));
    in.map_arg = words_.real();
    in.map = resolve(map, in.map_arg);
    in.shift_first = words_.flag();
    in.inverse = words_.flag();
  }

  void read_spline(ProgramInstruction& in) {
    SplineForm& form = in.spline;
    const int64_t bins = words_.integer(), slopes = words_.integer();
    require(in.count > 0 && bins >= 2 && bins <= kMostBins && slopes >= bins - 1 && slopes <= bins + 1);
    const std::vector<int64_t>& tails = *integers(kTails);
    const int64_t given = int64_t(tails.size());
    require(given <= 1 || given == in.count);
    require(given > 0 || slopes == bins + 1);
    form.bins = int(bins);
    form.tails = given == 0           ? SplineTails::none
                 : slopes == bins - 1 ? SplineTails::linear
                 : slopes == bins     ? SplineTails::circular
                                      : SplineTails::mixed;
    form.variant = SplineVariant(number_below(std::size(kSplineVariantNames)));
    const std::vector<double> bounds = reals();
    require(bounds.size() == 1 || bounds.size() == size_t(in.count));
    const double param_scale = words_.real(), min_bin = words_.real(), min_slope = words_.real();
    form.constants = spline_constants(form.variant, form.bins, param_scale, min_bin, min_slope);
    read_numbers(in, 2 * bins + slopes);
    form.inverse = words_.flag();
    ends_.emplace_back();
    for (int64_t i = 0; i < in.count; ++i) {
      const double bound = bounds[bounds.size() == 1 ? 0 : size_t(i)];
      const bool linear = given > 0 && tails[given == 1 ? 0 : size_t(i)] == 0;
      ends_.back().push_back(given > 0 ? ProgramSplineEnds{-bound, bound, linear} : ProgramSplineEnds{0, 1, false});
    }
    in.ends = ends_.back().data();
  }

  // the numbers of the columns of a spline
  void read_numbers(ProgramInstruction& in, int64_t count) {
    const int64_t place = in.numbers.place = words_.integer();
    if (place == -1) return take_params(in.count * count);
    require(weight(place).dim() == 2 && weight(place).size(0) == in.count && weight(place).size(1) == count);
    in.numbers.data = memory(place);
    ++lanes_[place];
  }

  // With a tape every value has columns of its own. Without, the values of a network take turns in two arrays, and a
  // linear map copies its columns to a third.
  void place() {
    int64_t next = 0, params = 0;
    const auto take = [&](int64_t count) {
      next += count;
      return next - count;
    };
    size_t network = 0;
    for (ProgramInstruction& in : instructions_) {
      if (in.kind == Instruction::mlp || in.kind == Instruction::linear) {
        std::vector<ProgramDense>& layers = dense_[network++];
        in.saved = taped_ ? take(layers[0].inputs) : in.kind == Instruction::linear ? 2 * a_.width : 0;
        int64_t at = in.saved;
        for (ProgramDense& d : layers) {
          d.in = at;
          if (in.kind == Instruction::linear) break;
          d.before = d.out = taped_ ? take(d.size) : a_.width - at;
          if (taped_ && needs_before(d.activation)) d.out = take(d.size);
          at = d.out;
        }
        if (in.kind == Instruction::mlp) params = at;
      } else {
        in.params = params;
        if (taped_ && in.kind != Instruction::additive) in.saved = take(in.count);
      }
    }
    a_.tape = taped_ ? next : 3 * a_.width;
  }

  ProgramArgs& a_;
  Tensors& weights_;
  Words words_;
  bool taped_;
  std::vector<ProgramInstruction> instructions_;
  // a deque does not move its elements
  std::deque<std::vector<int64_t>> columns_;
  std::deque<std::vector<ProgramDense>> dense_;  // of networks and linear maps, in order
  int64_t params_ = 0;                           // numbers that the last conditioner returns, until they are taken
  int64_t factors_ = 0;
  std::vector<int64_t> uses_;   // of every weight
  std::vector<int64_t> lanes_;  // uses that add its gradient in lanes, though it is a matrix
  std::deque<std::vector<ProgramSplineEnds>> ends_;
  int64_t work_ = 0;  // multiply-adds of a row
  std::vector<double> logdets_;
  Tensor factor_memory_;
};

// rows of a tile: at least eight tiles to share among threads, as long as they are not too small
int64_t rows_of_tile(int64_t rows) {
  const int64_t share = round_up(ceil_div(rows, 8), kProgramRows);
  return std::min(std::max(share, kProgramRows), kProgramForwardRows);
}

// runs the kernel over all units; every thread has memory of its own
template <class Args>
void run_tiles(void (*kernel)(const Args&, int64_t, int64_t), const Args& a, int64_t units, int64_t grain,
               bool backward) {
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    const int64_t bytes = program_memory(a, backward) * (a.f64 ? 8 : 4);
    const std::unique_ptr<char[]> memory(new char[size_t(bytes) + 64]);
    Args mine = a;
    mine.memory = (char*)((uintptr_t(memory.get()) + 63) / 64 * 64);
    kernel(mine, begin, end);
  });
}

std::tuple<Tensor, Tensor> flow_program(Tensor x, Optional context, Tensors weights, std::string code) {
  ProgramArgs a{};
  Reader reader(a, x, context, weights, code, false);
  const int64_t sizes[] = {a.rows, a.output_count};
  Tensor y = new_empty(x, sizes, 2, x.scalar_type()), logdet = new_rows(x, a.rows, x.scalar_type());
  if (a.rows == 0) return {y, logdet};
  a.y = Reader::rows_of(y);
  a.logdet = (char*)logdet.data_ptr();
  a.unit_rows = a.tile_rows = rows_of_tile(a.rows);
  reader.reserve(x);
  run_tiles(cpu::flow_program_forward, a, ceil_div(a.rows, a.tile_rows), reader.grain(), false);
  return {y, logdet};
}

// sums of the gradients of the weights: a matrix as (rows, cols), or transposed where that wastes less padding
std::vector<ProgramSum> sums_of(const Tensors& weights, const Tensors& grads, const Reader& reader, int64_t& size) {
  std::vector<ProgramSum> sums;
  size = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    ProgramSum s{};
    s.grad = (char*)grads[i].data_ptr();
    s.uses = reader.uses()[i];
    s.matrix = w.dim() == 2 && !reader.in_lanes(i);
    s.rows = s.matrix ? w.size(0) : w.numel();
    s.cols = s.matrix ? w.size(1) : 1;
    s.transposed = s.matrix && round_up(s.cols, kProgramPad) * s.rows > round_up(s.rows, kProgramPad) * s.cols;
    if (s.transposed) std::swap(s.rows, s.cols);
    s.width = s.matrix ? round_up(s.cols, kProgramPad) : kProgramLanes;
    s.offset = size;
    size += s.rows * s.width;
    sums.push_back(s);
  }
  return sums;
}

// Rows of a group whose sums have `size` elements. Groups are of equal size; the memory of their sums is limited; and
// large sums are not for few rows, since they would cost more than the products. But four threads have work.
int64_t rows_of_group(int64_t rows, int64_t size) {
  int64_t groups = kProgramGroups;
  while (groups > 4 && groups * size > (int64_t(1) << 24)) groups /= 2;
  const auto share = [&](int64_t parts) { return round_up(ceil_div(rows, parts), kProgramRows); };
  const int64_t few = kProgramMostRows / 2;
  const int64_t least = size > (1 << 16) ? std::min(std::max(share(4), few), kProgramMostRows) : few;
  return std::max(share(groups), least);
}

Tensors flow_program_backward(Optional grad_y, Optional grad_logdet, Tensor x, Optional context, Tensors weights,
                              std::string code, bool need_x, bool need_context, bool need_weights) {
  ProgramBackward a{};
  Reader reader(a, x, context, weights, code, true);
  const auto result = [&](const Tensor& like, bool needed) {
    const auto sizes = like.sizes();
    return needed ? new_empty(like, sizes.data(), like.dim(), x.scalar_type()) : new_none(x, x.scalar_type());
  };
  Tensors grads{result(x, need_x), context ? result(*context, need_context) : new_none(x, x.scalar_type())};
  Tensors of_weights;
  for (const Tensor& w : weights) of_weights.push_back(result(w, need_weights));
  grads.insert(grads.end(), of_weights.begin(), of_weights.end());
  if (a.rows == 0) {
    for (Tensor& grad : grads) torch::stable::zero_(grad);
    return grads;
  }
  if (grad_y) {
    require(grad_y->dim() == 2 && grad_y->size(0) == a.rows && grad_y->size(1) == a.output_count);
    a.grad_y = Reader::rows_of(*grad_y);
  }
  if (grad_logdet) {
    require(grad_logdet->dim() == 1 && grad_logdet->size(0) == a.rows);
    a.grad_logdet = Reader::rows_of(*grad_logdet);
  }
  if (need_x) a.grad_x = Reader::rows_of(grads[0]);
  if (need_context && context) a.grad_context = Reader::rows_of(grads[1]);
  std::vector<ProgramSum> sums;
  if (need_weights) sums = sums_of(weights, of_weights, reader, a.group_size);
  a.unit_rows = rows_of_group(a.rows, a.group_size);
  const int64_t units = ceil_div(a.rows, a.unit_rows);
  a.tile_rows = round_up(ceil_div(a.unit_rows, ceil_div(a.unit_rows, kProgramMostRows)), kProgramRows);
  reader.reserve(x);
  Tensor memory;
  if (!sums.empty()) {
    a.sum = sums.data();
    a.sums = int64_t(sums.size());
    a.groups = units;
    memory = new_rows(x, units * a.group_size, x.scalar_type());
    a.group_sums = (char*)memory.data_ptr();
  }
  run_tiles(cpu::flow_program_backward, a, units, reader.grain(), true);
  run_units(cpu::flow_program_reduce, a, 0, a.sums, 1);
  return grads;
}

}  // namespace

PYFLOW_OPERATORS(m) {
  m.impl("flow_program", TORCH_BOX(&flow_program));
  m.impl("flow_program_backward", TORCH_BOX(&flow_program_backward));
}

}  // namespace pyflow
