// The inverse of "net, then transform" with a masked net: generation by generation the numbers of its columns, the
// columns, and the units that see no later ones. The rows of a block run through all of it before the next block, so
// that what a block keeps of units in a row is contiguous.
#pragma once

#include "affine.h"
#include "net.h"
#include "rule.h"
#include "spline.h"

namespace pyflow::PYFLOW_ISA {

template <>
struct Rule<Instruction::autoregressive> {
  // a block of a tile as a tile of its own; places are those of its values
  template <class T>
  struct Block {
    ProgramTile<T> tile;
    T* grads;  // of the values
    T* value(int64_t place) const { return tile.tape + place * kWidth<T>; }
    T* grad(int64_t place) const { return grads + place * kWidth<T>; }
  };

  template <class T>
  static Block<T> block(const ProgramTile<T>& t, const ProgramSolve& s, int64_t b) {
    ProgramTile<T> one = t;
    const int64_t at = b * s.size * kWidth<T>;
    one.row += b * kWidth<T>;
    one.rows = rows_of(t, b);
    one.blocks = 1;
    // the gradients of weights are those of all blocks together
    one.sums = nullptr;
    for (Columns<T>* each : {&one.state, &one.context, &one.grad, &one.grad_context}) each->data = each->at(b, 0);
    one.tape = t.taped_at(s.tape, 0).data + at;
    one.logdet += b * kWidth<T>;
    if (t.back) one.grad_logdet += b * kWidth<T>;
    return {one, t.back ? t.grad_solve + at : nullptr};
  }

  static int64_t first(const int64_t* ends, int64_t level) { return level > 0 ? ends[level - 1] : 0; }

  // the numbers of a part of this level
  template <class T>
  static ProgramPart at_level(const ProgramPart& part, int64_t level) {
    const int64_t from = first(part.ends, level);
    ProgramPart some = part;
    some.size = part.ends[level] - from;
    for (int64_t* place : {&some.out, &some.before, &some.given}) *place += from;
    if (part.kind != Part::dense) some.in += from;
    if (part.kind == Part::periodic) {
      const int64_t column = first(part.column_ends, level);
      some.columns += column;
      some.count = part.column_ends[level] - column;
      for (ProgramWeight* w : {&some.factor, &some.sine, &some.cosine, &some.shift}) skip<T>(*w, column);
    } else {
      const bool matrix = part.kind == Part::dense || part.kind == Part::context;
      some.once += from;
      skip<T>(some.weight, matrix ? from * part.inputs : from);
      for (ProgramWeight* w : {&some.bias, &some.factor, &some.shift}) skip<T>(*w, from);
    }
    return some;
  }

  template <class T>
  static void skip(ProgramWeight& w, int64_t count) {
    if (w.data) w.data += count * int64_t(sizeof(T));
  }

  template <class T>
  static void run_part(const Block<T>& block, const ProgramPart& part, int64_t level) {
    const ProgramPart some = at_level<T>(part, level);
    const ProgramTile<T>& t = block.tile;
    if (some.size == 0) return;
    if (part.kind == Part::dense) {
      // the context's are the first of its inputs
      const int64_t given = is_given(t, part) ? t.context.count : 0;
      const Columns<T> from{block.value(part.in + given), part.input_ends[level] - given};
      Factor<T> f = factor<T>(some);
      f.weight += given;
      f.adds = given > 0;
      return run_dense(t, some, f, from, Columns<T>{block.value(some.out), some.size});
    }
    as_constant(part.kind, [&](auto kind) { PartRule<kind.value>::forward(t, some); });
  }

  // the inputs of a level, from the state and the context
  template <class T>
  static void load(const Block<T>& block, const ProgramInstruction& in, int64_t level) {
    const ProgramTile<T>& t = block.tile;
    const ProgramPart& part = in.parts[0];
    const int64_t given = level == 0 && is_given(t, part) ? t.context.count : 0;
    for (int64_t i = given + first(part.input_ends, level); i < part.input_ends[level]; ++i) {
      const int64_t c = in.solve->sources[i], more = c - t.state.count;
      copy_column(more < 0 ? t.state.at(0, c) : t.context.at(0, more), block.value(part.in + i));
    }
  }

  template <class T>
  static void forward(const ProgramTile<T>& t, const ProgramInstruction& in) {
    const ProgramSolve& s = *in.solve;
    for (int64_t b = 0; b < t.blocks; ++b) {
      const Block<T> one = block(t, s, b);
      for (int64_t level = 0; level < s.generations; ++level) {
        load(one, in, level);
        for (int64_t k = 0; k < in.part_count; ++k) run_part(one, in.parts[k], level);
        const ProgramInstruction& transform = s.transforms[level];
        const bool affine = transform.kind == Instruction::affine;
        affine ? Rule<Instruction::affine>::forward(one.tile, transform)
               : Rule<Instruction::spline>::forward(one.tile, transform);
      }
    }
  }

  // the gradients of the inputs of a level, to those of the state and the context
  template <class T>
  static void unload(const Block<T>& block, const ProgramInstruction& in, int64_t level) {
    const ProgramTile<T>& t = block.tile;
    const ProgramPart& part = in.parts[0];
    for (int64_t i = first(part.input_ends, level); i < part.input_ends[level]; ++i) {
      const int64_t c = in.solve->sources[i], more = c - t.grad.count;
      add_column(block.grad(part.in + i), more < 0 ? t.grad.at(0, c) : t.grad_context.at(0, more));
    }
  }

  // the gradients of a layer's numbers of a level before the activation, and of all that it reads of this level
  template <class T>
  static void pull_dense(const Block<T>& block, const ProgramPart& part, const ProgramPart& some, int64_t level,
                         int64_t generations) {
    pull_activation(block.tile, some, block.value(some.before), block.value(some.out), block.grad(some.out));
    const int64_t row = first(part.ends, level), col = first(part.input_ends, level);
    // those that read it have this level or more
    const Columns<T> g{block.grad(some.out), part.ends[generations - 1] - row};
    const Factor<T> f{matrix<T>(part) + row * part.inputs + col, 1, part.inputs, nullptr};
    product<false>(f, g, Columns<T>{block.grad(part.in + col), part.input_ends[level] - col}, 1);
  }

  template <class T>
  static void pull_elementwise(const Block<T>& block, const ProgramPart& some) {
    for (int64_t i = 0; i < some.size; ++i) {
      const T factor = entry(some.factor, i, T(1));
      const T* __restrict g = block.grad(some.out + i);
      T* __restrict gx = block.grad(some.in + i);
      for (int r = 0; r < kWidth<T>; ++r) gx[r] = g[r] * factor;
    }
  }

  template <class T>
  static void pull_context(const Block<T>& block, const ProgramPart& some) {
    const int64_t count = some.size * kWidth<T>;
    const T* given = block.value(some.given);
    T *g = block.grad(some.out), *gx = block.grad(some.in), *of_given = block.grad(some.given);
    copy(g, gx, count);
    if (some.gate) {
      PartRule<Part::context>::pull_gate(block.value(some.in), given, count, gx, of_given);
    } else {
      copy(g, of_given, count);
    }
    pull_activation(block.tile, some, block.value(some.before), given, of_given);
  }

  // from the gradients of what the parts return of a level to those of what they read
  template <class T>
  static void pull_level(const Block<T>& block, const ProgramPart* parts, int64_t count, int64_t level,
                         int64_t generations) {
    for (int64_t k = count - 1; k >= 0; k -= 1 + parts[k].inner) {
      const ProgramPart& part = parts[k];
      const ProgramPart some = at_level<T>(part, level);
      T *g = block.grad(some.out), *gx = block.grad(some.in);
      const int64_t n = some.size * kWidth<T>;
      switch (part.kind) {
        case Part::dense: pull_dense(block, part, some, level, generations); break;
        case Part::elementwise: pull_elementwise(block, some); break;
        case Part::context: pull_context(block, some); break;
        case Part::periodic:
          copy(g, gx, n);
          for (int64_t i = 0; i < some.count; ++i) {
            const int64_t c = some.columns[i];
            PartRule<Part::periodic>::pull_column(block.tile, some, 0, i, block.value(some.in + c), gx + c * kWidth<T>);
          }
          break;
        case Part::residual:
          copy(g, block.grad(some.before), n);
          pull_level(block, &part - part.inner, part.inner, level, generations);
          for (int64_t i = 0; i < n; i += kWidth<T>) add_column(g + i, gx + i);
          break;
        default: copy(g, gx, n); pull_activation(block.tile, some, block.value(some.in), block.value(some.out), gx);
      }
    }
  }

  // the gradients of the weights of a part, from all blocks
  template <class T>
  static void add_weights(const ProgramTile<T>& t, const ProgramSolve& s, const ProgramPart& part) {
    const int64_t last = s.generations - 1, rows = part.ends[last];
    const auto values = [&](int64_t place, int64_t count) {
      return Columns<T>{t.taped_at(s.tape, 0).data + place * kWidth<T>, count, s.size};
    };
    const auto grads = [&](int64_t place) { return Columns<T>{t.grad_solve + place * kWidth<T>, rows, s.size}; };
    if (part.kind == Part::dense)
      add_weight_gradients(t, part, values(part.in, part.input_ends[last]), grads(part.out));
    if (part.kind == Part::context) {
      add_weight_gradients(t, part, t.context, grads(part.given));
      // the first array may have gradients for a conditioner before
      const Columns<T> of_context = t.array(1, part.inputs);
      product<false>(transposed_factor<T>(part), grads(part.given), of_context, t.blocks);
      for (int64_t i = 0; i < part.inputs * t.padded(); i += kWidth<T>)
        add_column(of_context.data + i, t.grad_context.data + i);
    }
    if (part.kind == Part::elementwise) add_vectors(t, part, values(part.in, rows), grads(part.out));
    for (int64_t level = 0; part.kind == Part::periodic && level <= last; ++level) {
      const int64_t from = first(part.ends, level);
      add_waves(t, part, level, values(part.in + from, 0), grads(part.out + from));
    }
  }

  template <class T>
  static void add_vectors(const ProgramTile<T>& t, const ProgramPart& part, const Columns<T>& x, const Columns<T>& g) {
    add_lanes(t, part.shift, g);
    if (!t.sums || !part.factor.data) return;
    alignas(64) T product[kWidth<T>];
    for (int64_t b = 0; b < t.blocks; ++b) {
      for (int64_t i = 0; i < g.count; ++i) {
        for (int r = 0; r < kWidth<T>; ++r) product[r] = x.at(b, i)[r] * g.at(b, i)[r];
        add_lanes(b, product, lanes_of(t, part.factor.place, i));
      }
    }
  }

  template <class T>
  static void add_waves(const ProgramTile<T>& t, const ProgramPart& part, int64_t level, const Columns<T>& x,
                        const Columns<T>& g) {
    alignas(64) T grad[kWidth<T>];
    for (int64_t b = 0; t.sums && b < t.blocks; ++b) {
      for (int64_t i = first(part.column_ends, level); i < part.column_ends[level]; ++i) {
        copy_column(g.at(b, part.columns[i]), grad);
        PartRule<Part::periodic>::pull_column(t, part, b, i, x.at(b, part.columns[i]), grad);
      }
    }
  }

  template <class T>
  static void backward(const ProgramTile<T>& t, const ProgramInstruction& in) {
    const ProgramSolve& s = *in.solve;
    const ProgramPart& last = in.parts[in.part_count - 1];
    for (int64_t b = 0; b < t.blocks; ++b) {
      Block<T> one = block(t, s, b);
      for (int64_t level = s.generations - 1; level >= 0; --level) {
        if (level + 1 < s.generations) unload(one, in, level + 1);
        one.tile.arrays = one.grad(last.out + first(last.ends, level));
        const ProgramInstruction& transform = s.transforms[level];
        const bool affine = transform.kind == Instruction::affine;
        affine ? Rule<Instruction::affine>::backward(one.tile, transform)
               : Rule<Instruction::spline>::backward(one.tile, transform);
        pull_level(one, in.parts, in.part_count, level, s.generations);
      }
      unload(one, in, 0);
    }
    for (int64_t k = 0; k < in.part_count; ++k) add_weights(t, s, in.parts[k]);
  }
};

}  // namespace pyflow::PYFLOW_ISA
