// Arguments of the kernels of Gram matrices; the functions live in one namespace per instruction set.
#pragma once

#include "../ops/hsic.h"
#include "view.h"

namespace pyflow {

// Rows are cut into blocks, and a tile is a pair of them: each is visited once, as matrices are symmetric. A round
// holds tiles of which no two share a block, as in a tournament: whoever plays, a row's sums grow in the order of the
// rounds, so they depend neither on threads nor on what else is in the batch.
constexpr int64_t kBlock = 128;  // rows in a block, at most; a multiple of every strip's width
constexpr int64_t kPad = 32;     // strips are this wide at most

struct Tournament {
  int64_t n, block, blocks, seats;  // seats: blocks, made even
};

PYFLOW_FN Tournament tournament_of(int64_t n) {
  // four blocks or a multiple of it: two cores share a round evenly
  const int64_t parts = n <= kBlock ? 1 : 4 * ((n + 4 * kBlock - 1) / (4 * kBlock));
  const int64_t block = ((n + parts - 1) / parts + kPad - 1) / kPad * kPad;
  const int64_t blocks = n > 0 ? (n + block - 1) / block : 0;
  return {n, block, blocks, blocks + blocks % 2};
}

// round 0 is of every block with itself; there are `seats` rounds
PYFLOW_FN int64_t tiles_of(const Tournament& t, int64_t round) { return round == 0 ? t.blocks : t.seats / 2; }
PYFLOW_FN int64_t first_tile(const Tournament& t, int64_t round) {
  return round == 0 ? 0 : t.blocks + (round - 1) * (t.seats / 2);
}

struct Pairing {
  int64_t first, second;  // first <= second; second == blocks: nobody sits there
};

PYFLOW_FN Pairing pairing(const Tournament& t, int64_t round, int64_t tile) {
  if (round == 0) return {tile, tile};
  const int64_t others = t.seats - 1;
  const int64_t i = tile == 0 ? others : (round + tile) % others, j = (round + others - tile) % others;
  return i < j ? Pairing{i, j} : Pairing{j, i};
}

struct GramVariable {
  GramKernel kernel;
  int degree;
  int64_t dim, first;    // features; of the features of all, where these begin
  int64_t width;         // dim, made a multiple of 8; 0 where nothing is packed
  int64_t strips, rows;  // where they begin in an item's workspace (rows: -1 without gradient), as in the gradient's
  const char* z;         // (B, n, dim), contiguous
  char* grad;            // as z
};

// Works on batch items [item, item + items); what it needs of them lies side by side in workspaces.
struct GramArgs {
  Tournament tournament;
  int64_t variables, pairs, columns;  // columns: features of all variables
  const GramVariable* variable;
  const int64_t* pair;     // two variables each
  const char* scale;       // (B, variables), of the compute type as all that is char*; of a kernel of distances, whose
                           // rows are centred first
  double* shift;           // (B, variables): 0, or 1 where K - 1 takes the place of K
  char* centres;           // (items, columns)
  char* workspace;         // strips and padded rows, centred and scaled
  int64_t workspace_size;  // elements of an item
  char* halves;            // (items, variables, padded): of kernels of distances, half the squares of rows
  int64_t padded;          // n, made a multiple of kPad
  char* scratch;           // of this thread
  int64_t item, items;
  int64_t round, part, parts;
  bool f64;
};

struct GramSums : GramArgs {
  double* rows;   // (B, variables, n), added to
  double* cross;  // (items, tiles of all rounds, pairs)
};

struct GramBackward : GramArgs {
  const double* grad_rows;   // (B, variables, n)
  const double* grad_cross;  // (B, pairs)
  double* weight_sums;       // (items, variables, padded), added to
  char* grad_workspace;      // added to; as the workspace
};

constexpr int64_t kPanel = 8;  // rows that are worked on together, at most

// bytes a thread needs
PYFLOW_FN int64_t scratch_of(const GramArgs& a, bool backward) {
  const int64_t size = a.f64 ? 8 : 4, block = a.tournament.block;
  const int64_t values = backward ? ((a.variables + 1) * block + kPanel) * block : a.variables * kPanel * block;
  return size * values + 8 * (a.variables * block + 16 * a.pairs + a.variables);
}

// units: permutations
struct PermutedArgs {
  int64_t n;
  const char *x, *y;            // (n, n), contiguous, symmetric
  const int32_t* permutations;  // (R, n)
  double* out;
  bool f64;
};

constexpr int64_t kCenterRows = 64;  // units: so many rows of a matrix

struct CenterArgs {
  Space space;  // (matrices, n) x (n)
  View gram, out;
  int64_t n, blocks;  // blocks of rows in a matrix
  double* row_means;  // (matrices, n)
  double* columns;    // (matrices, blocks, n): sums; the first block's become the means of the matrix
  double* means;      // (matrices)
  bool f64;
};

}  // namespace pyflow
