// Arguments of the kernels that run a program of a flow.
#pragma once

#include "../cpu/dispatch.h"
#include "../ops/coupling.h"
#include "../ops/flow_head.h"
#include "../ops/flow_program.h"
#include "../tiles/plan.h"
#include "spline.h"

namespace pyflow {

// Rows are processed in tiles. A unit of the forward is a tile; a unit of the backward is a group of neighbouring tiles
// whose gradients of weights are summed one after the other. Tiles depend on the batch alone, groups on the sizes of
// the weights too. A forward that keeps values has the tiles of the backward.
constexpr int64_t kProgramRows = 32;  // tiles are multiples of this, as are the rows that an instruction set handles
constexpr int64_t kProgramForwardRows = 64;  // of a tile of the forward, at most
constexpr int64_t kProgramMostRows = 128;    // of a tile
constexpr int64_t kProgramGroups = 16;       // most groups of a batch
constexpr int64_t kProgramLanes = 16;        // sums over rows are kept in lanes until the end
constexpr int64_t kProgramMostArrays = 16;   // of gradients inside a net
constexpr int64_t kProgramPad = 16;          // rows of summed matrices are padded to a multiple of this

// a layer with so many inputs is kept: computing a number again costs more than writing and reading it
constexpr int64_t kProgramKeptInputs = 48;
// places of kept columns
constexpr int64_t kept_place(int64_t column) { return ~column; }
constexpr bool is_kept(int64_t place) { return place < 0; }

struct ProgramMatrix {
  char* data;        // of the compute type; null: absent
  int64_t row, col;  // strides in elements
};

// a tensor of the compute type, contiguous, and its place among the weights
struct ProgramWeight {
  const char* data;  // null: absent, at place -1
  int64_t place;
};

// A part of a net; a linear map is one too. Places are columns of the tape, where a tile keeps the values of an
// instruction, or of what the forward leaves to the backward.
struct ProgramPart {
  Part kind;
  int64_t inputs, size;  // numbers before and after; of a context: of the context, and of what it adds
  int64_t in, out;       // their places
  int64_t inner;         // parts inside of a residual, which are before it
  // dense, context: act(W h + b); activation
  ProgramWeight weight, bias, mask;  // (size, inputs), (size,), (size, inputs)
  char* masked;                      // weight * mask, set by `prepare`
  Activation activation;
  double arg;
  // dense that `joins`: the context's columns are among its inputs, from `first` on, and their terms are added first
  bool joins;
  int64_t first;
  // context, dense that joins: place of what the context gives, of a dense before the activation, in its products
  int64_t once;
  // place of the numbers before the activation, or of those after it if they are not needed; of a residual: of what its
  // parts return
  int64_t before;
  int64_t given;  // context: place of those after it
  bool gate;
  // norm: also weight and bias, (size,)
  double eps;
  bool unbiased;
  // elementwise, (size,); periodic, (count,)
  ProgramWeight factor, shift, sine, cosine;
  const int64_t* columns;
  int64_t count;
  // in an autoregressive inverse: how many of its inputs, of what it returns and of `columns` have a level up to the
  // index; `columns` count from the first of their level
  const int64_t *input_ends, *ends, *column_ends;
};

// the domain of a column's spline, and whether its tails are linear
struct ProgramSplineEnds {
  double low, high;
  bool linear;
};

struct ProgramSolve;

struct ProgramInstruction {
  Instruction kind;
  const int64_t* columns;
  int64_t count;   // of the columns
  int64_t saved;   // place of the columns before the instruction
  int64_t params;  // place of what the last conditioner returned
  int64_t after;   // place of the columns after a transform that are kept; 0: they are not
  bool inverse, shift_first;
  // scale: vectors (count,), null if absent; factor is e^{+-log_scale}, and `logdet` its logarithm, set by `prepare`
  const char *shift, *log_scale;
  char* factor;
  double* logdet;
  int64_t shift_place, log_scale_place, logdet_place;  // among the weights
  const char* given_logdet;                            // linear: a number, null if absent
  const double *bounds, *shifts;                       // wrap: of every column
  // net: parts, of which the first reads the columns and perhaps the context; linear: one
  const ProgramPart* parts;
  int64_t part_count;
  int64_t inputs;  // of the first part
  bool context;
  // uniform: the ends of the box in every column, whether the high ones belong to it, the log-density inside
  const double *lows, *highs;
  bool closed;
  double log_density;
  // affine, prior
  ScaleMap map;
  double map_arg;
  int64_t shift_from, scale_from, params_step;  // places of the first column's numbers, and from one to the next
  Prior prior;
  // spline: of every column, numbers of the conditioner or, if there is one, a row of the weight (count, numbers)
  SplineForm spline;
  const ProgramSplineEnds* ends;  // of every column
  bool zero_outside;              // of the ends, and not x
  bool turned;                    // of x mod 2 bound - bound; inverse: returns that of its result
  ProgramWeight numbers;
  // autoregressive: also parts, context
  const ProgramSolve* solve;
};

// a copy of a weight in another order, times a mask
struct ProgramOrdered {
  ProgramWeight weight;
  const char* mask;            // as the weight; null: absent
  const int64_t *rows, *cols;  // which row and column of the weight is each; null: the same
  int64_t row_count, col_count;
  char* to;
};

// An autoregressive inverse. The numbers of every value are in the order of their levels, and so are the weights. A
// block of rows has columns of its own on the tape; places of parts and transforms are among these.
struct ProgramSolve {
  int64_t tape, size;                    // first column on the tape, columns of a block
  int64_t generations;                   // the last one, G; levels are 0 to G
  const int64_t* sources;                // of the inputs: a column of the state, or behind all these of the context
  const ProgramInstruction* transforms;  // of the columns of each generation from 1 on
  const ProgramOrdered* ordered;
  int64_t ordered_count;
};

struct ProgramArgs {
  bool f64;
  const ProgramInstruction* instruction;
  int64_t instructions;
  int64_t rows, columns, context_columns;
  int64_t context_rows, repeats;  // row r of x has the row r / repeats % context_rows of the context
  ProgramMatrix x, context;
  ProgramMatrix products;        // what nets make of the context alone, by its rows; null: every row of x makes its own
  int64_t tile_rows, unit_rows;  // units are of whole tiles, the last tile of each may be smaller
  char* memory;                  // of this thread: program_memory elements, at a multiple of 64 bytes
  int64_t tape;                  // columns of a tile's tape
  // what the forward leaves to the backward of every tile, (columns, rows) each; null: the backward computes all again
  char* kept;
  int64_t kept_columns;
  int64_t width;  // most columns of an array besides the tape
  const int64_t* outputs;
  int64_t output_count;
  ProgramMatrix y;
  char* logdet;
};

// the sum of the gradients of one weight in a group: (rows, width) for a matrix, (rows, kProgramLanes) for a vector;
// the matrix is transposed if that wastes less padding
struct ProgramSum {
  int64_t offset;
  int64_t uses;  // instructions that add to it
  int64_t rows, cols, width;
  bool matrix, transposed;
  const int64_t *row_order, *col_order;  // which row and column of the result is each; null: the same
  bool partial;                          // whether the tiles write some of it alone
  int64_t size() const { return rows * width; }
  // whether the first tile of a group writes it; else it starts at 0
  bool written() const { return matrix && uses == 1 && !partial; }
  const char* mask;  // factor of the result, in its order; null: absent
  char* grad;        // the result, contiguous: (rows, cols) or, if transposed, (cols, rows); a vector (rows,)
};

struct ProgramBackward : ProgramArgs {
  int64_t arrays;                      // of gradients inside a net
  int64_t solve_columns;               // most columns of a block of an autoregressive inverse
  ProgramMatrix grad_y, grad_logdet;   // null: zero; of grad_logdet `row` counts
  ProgramMatrix grad_x, grad_context;  // of every row of x
  ProgramMatrix of_context;            // grad_context summed over the rows of x that share a row of the context
  const ProgramSum* sum;               // one per weight; null: no gradients of weights
  int64_t sums;
  int64_t groups, group_size;  // elements of the sums of a group
  char* group_sums;            // (groups, group_size)
};

// elements of a tile: its state, scratch and tape
inline int64_t program_memory(const ProgramArgs& a) {
  return a.tile_rows * (a.columns + a.context_columns + a.width + a.tape);
}

// and the gradients of the state, of the values of an autoregressive inverse, arrays of gradients inside a net, and a
// transposed array
inline int64_t program_memory(const ProgramBackward& a) {
  const int64_t arrays = a.arrays * a.width + round_up(a.width, kProgramPad);
  const int64_t columns = a.columns + a.context_columns + a.solve_columns;
  return program_memory((const ProgramArgs&)a) + a.tile_rows * (columns + arrays);
}

PYFLOW_CPU_KERNEL(flow_program_prepare, ProgramArgs)
PYFLOW_CPU_KERNEL(flow_program_context, ProgramArgs)
PYFLOW_CPU_KERNEL(flow_program_forward, ProgramArgs)
PYFLOW_CPU_KERNEL(flow_program_backward, ProgramBackward)
PYFLOW_CPU_KERNEL(flow_program_reduce, ProgramBackward)
PYFLOW_CPU_KERNEL(flow_program_reduce_context, ProgramBackward)

}  // namespace pyflow
