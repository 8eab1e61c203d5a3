// Orders what an autoregressive inverse computes by levels.
#pragma once

#include <algorithm>
#include <deque>
#include <utility>
#include <vector>

#include "../args/flow_program.h"
#include "program_words.h"

namespace pyflow {
namespace {

using Integers = std::vector<int64_t>;

// An autoregressive inverse. Its deques do not move their elements.
class Solve {
 public:
  std::vector<ProgramPart> parts;
  ProgramSolve solve{};
  std::vector<ProgramOrdered> ordered;

  // `size`: columns of a block; `transform`: of all its columns, `saved` the place where a tape keeps them; `levels`:
  // of every layer but the last
  void order(const ProgramArgs& a, const ProgramInstruction& in, int64_t size, const ProgramInstruction& transform,
             const Integers& generations, std::deque<Integers> levels) {
    require(int64_t(generations.size()) == transform.count);
    solve.size = size;
    for (const int64_t generation : generations) {
      require(generation >= 1 && generation <= transform.count);
      solve.generations = std::max(solve.generations, generation);
    }
    require(solve.generations > 0);
    Integers of_column(size_t(a.columns), 0), of_numbers;
    for (int64_t i = 0; i < transform.count; ++i) of_column[size_t(transform.columns[i])] = generations[size_t(i)];
    // affine ones may have the numbers of a kind next to each other
    const bool spline = transform.kind == Instruction::spline;
    const bool columns = spline || transform.params_step == 2;
    each_ = spline ? spline_params(transform.spline.bins, transform.spline.tails) : 2;
    for (int64_t j = 0; j < each_ * transform.count; ++j) {
      const int64_t i = columns ? j / each_ : j % transform.count;
      of_numbers.push_back(generations[size_t(i)] - 1);
    }
    levels.push_back(of_numbers);
    values_.resize(size_t(size));
    set_sources(a, in, of_column);
    for (ProgramPart& part : parts) order_part(part, levels);
    require(levels.empty() && value(parts.back().out).levels == of_numbers);
    set_transforms(transform, generations);
    solve.ordered = ordered.data();
    solve.ordered_count = int64_t(ordered.size());
  }

  // `take` returns memory for a number of elements
  template <class F>
  void prepare(F take) {
    for (size_t i = 0; i < ordered.size(); ++i) {
      ProgramOrdered& o = ordered[i];
      o.to = take(o.row_count * o.col_count);
      targets_[i]->data = o.to;
    }
  }

 private:
  // numbers of a net in the order of their levels
  struct Value {
    Integers levels, order, ends;
  };

  Value& add(Integers levels) {
    Value& v = values_of_.emplace_back();
    v.order.resize(levels.size());
    v.ends.resize(size_t(solve.generations) + 1);
    for (const int64_t level : levels) {
      require(level >= 0 && level <= solve.generations);
      ++v.ends[size_t(level)];
    }
    for (size_t g = 1; g < v.ends.size(); ++g) v.ends[g] += v.ends[g - 1];
    Integers next(v.ends.size());
    std::copy(v.ends.begin(), v.ends.end() - 1, next.begin() + 1);
    for (size_t i = 0; i < levels.size(); ++i) v.order[size_t(next[size_t(levels[i])]++)] = int64_t(i);
    v.levels = std::move(levels);
    return v;
  }

  const Value& value(int64_t place) {
    require(values_[size_t(place)]);
    return *values_[size_t(place)];
  }

  void set_sources(const ProgramArgs& a, const ProgramInstruction& in, const Integers& of_column) {
    Integers levels;
    for (int64_t i = 0; i < in.count; ++i) levels.push_back(of_column[size_t(in.columns[i])]);
    levels.resize(size_t(in.inputs), 0);
    Value& inputs = add(std::move(levels));
    // those of the context, of level 0, come first
    std::stable_partition(inputs.order.begin(), inputs.order.begin() + inputs.ends[0],
                          [&](int64_t i) { return i >= in.count; });
    values_[size_t(parts[0].in)] = &inputs;
    for (const int64_t i : inputs.order) sources_.push_back(i < in.count ? in.columns[i] : a.columns + i - in.count);
    solve.sources = sources_.data();
  }

  void order_part(ProgramPart& part, std::deque<Integers>& levels) {
    const Value *from = &value(part.in), *to = from;
    switch (part.kind) {
      case Part::dense:
        require(!levels.empty() && int64_t(levels.front().size()) == part.size);
        to = &add(std::move(levels.front()));
        levels.pop_front();
        order_weight(part.weight, *to, part.mask.data, &from->order, part.inputs);
        order_weight(part.bias, *to);
        values_[size_t(part.before)] = to;
        break;
      case Part::context:
        order_weight(part.weight, *to, part.mask.data, nullptr, part.inputs);
        order_weight(part.bias, *to);
        break;
      case Part::residual: require(value(part.before).levels == from->levels); break;
      case Part::elementwise:
        order_weight(part.factor, *to);
        order_weight(part.shift, *to);
        break;
      case Part::periodic: order_columns(part, *to); break;
      default: require(part.kind == Part::activation);
    }
    part.mask.data = nullptr;
    values_[size_t(part.out)] = to;
    part.input_ends = from->ends.data();
    part.ends = to->ends.data();
  }

  void order_columns(ProgramPart& part, const Value& all) {
    Integers levels, places(all.order.size());
    for (size_t i = 0; i < places.size(); ++i) places[size_t(all.order[i])] = int64_t(i);
    for (int64_t i = 0; i < part.count; ++i) levels.push_back(all.levels[size_t(part.columns[i])]);
    const Value& named = add(std::move(levels));
    Integers& columns = columns_.emplace_back();
    for (const int64_t i : named.order) {
      const int64_t level = named.levels[size_t(i)];
      columns.push_back(places[size_t(part.columns[i])] - (level > 0 ? all.ends[size_t(level - 1)] : 0));
    }
    part.columns = columns.data();
    part.column_ends = named.ends.data();
    for (ProgramWeight* w : {&part.factor, &part.sine, &part.cosine, &part.shift}) order_weight(*w, named);
  }

  void order_weight(ProgramWeight& weight, const Value& rows, const char* mask = nullptr,
                    const Integers* cols = nullptr, int64_t col_count = 1) {
    if (!weight.data) return;
    ordered.push_back({weight, mask, rows.order.data(), cols ? cols->data() : nullptr, int64_t(rows.order.size()),
                       col_count, nullptr});
    targets_.push_back(&weight);
  }

  void set_transforms(const ProgramInstruction& transform, const Integers& generations) {
    const bool spline = transform.kind == Instruction::spline;
    int64_t saved = transform.saved, params = parts.back().out;
    for (int64_t g = 1; g <= solve.generations; ++g) {
      Integers& some = columns_.emplace_back();
      std::vector<ProgramSplineEnds>& ends = spline_ends_.emplace_back();
      for (int64_t i = 0; i < transform.count; ++i) {
        if (generations[size_t(i)] != g) continue;
        some.push_back(transform.columns[i]);
        if (transform.ends) ends.push_back(transform.ends[i]);
      }
      ProgramInstruction in = transform;
      in.columns = some.data();
      in.ends = ends.data();
      in.count = int64_t(some.size());
      in.saved = saved;
      in.params = params;
      // a block of shifts and one of scales
      if (!spline && in.params_step == 1) (in.shift_from > 0 ? in.shift_from : in.scale_from) = in.count;
      saved += in.count;
      params += each_ * in.count;
      transforms_.push_back(in);
    }
    solve.transforms = transforms_.data();
  }

  std::vector<const Value*> values_;  // by their place
  std::deque<Value> values_of_;
  Integers sources_;
  std::deque<Integers> columns_;
  std::deque<std::vector<ProgramSplineEnds>> spline_ends_;
  int64_t each_ = 0;  // numbers of a column
  std::vector<ProgramInstruction> transforms_;
  std::vector<ProgramWeight*> targets_;
};

}  // namespace
}  // namespace pyflow
