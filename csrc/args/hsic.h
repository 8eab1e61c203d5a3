// Arguments of the Gram matrix kernels of HSIC and CKA.
#pragma once

#include "../cpu/dispatch.h"
#include "../ops/hsic.h"
#include "../tiles/plan.h"

namespace pyflow {

// Rows are split into blocks, and a tile is a pair of blocks. Gram matrices are symmetric, so each pair is visited
// once. Tiles are scheduled as a round-robin tournament: no two tiles of a round share a block. Threads never add to
// the same row, and a row's terms are added in the order of the rounds, whatever the thread count and the batch.
constexpr int64_t kBlock = 128;  // largest number of rows in a block; a multiple of every strip width
constexpr int64_t kPad = 32;     // largest strip width

struct Tournament {
  int64_t n, block, blocks;  // block: rows of a block
  int64_t seats;             // blocks, rounded up to even
};

PYFLOW_FN Tournament tournament_of(int64_t n) {
  // a multiple of four blocks: two cores share a round evenly
  const int64_t parts = n <= kBlock ? 1 : 4 * ceil_div(n, 4 * kBlock);
  const int64_t block = round_up(ceil_div(n, parts), kPad);
  const int64_t blocks = n > 0 ? ceil_div(n, block) : 0;
  return {n, block, blocks, blocks + blocks % 2};
}

// round 0 pairs every block with itself; there are `seats` rounds
PYFLOW_FN int64_t tiles_of(const Tournament& t, int64_t round) { return round == 0 ? t.blocks : t.seats / 2; }
PYFLOW_FN int64_t first_tile(const Tournament& t, int64_t round) {
  return round == 0 ? 0 : t.blocks + (round - 1) * (t.seats / 2);
}

struct Pairing {
  int64_t first, second;  // first <= second; second == blocks: `first` has no partner in this round
};

PYFLOW_FN Pairing pairing(const Tournament& t, int64_t round, int64_t tile) {
  if (round == 0) return {tile, tile};
  const int64_t others = t.seats - 1;
  const int64_t i = tile == 0 ? others : (round + tile) % others, j = (round + others - tile) % others;
  return i < j ? Pairing{i, j} : Pairing{j, i};
}

// How a batch is split into groups of items, whose workspace stays in the caches from round to round. In a large batch
// a team is one thread, which processes whole items without barriers between rounds; else one team of all threads
// shares the tiles of a group. The order of an item's sums is the same in both.
struct GramSchedule {
  int64_t batch, teams, items;  // items: of a group
};

constexpr int64_t kGroupBytes = 4 << 20;  // workspace of a group

// `bytes`: workspace of one item
PYFLOW_FN GramSchedule gram_schedule(int64_t batch, int64_t bytes, int64_t threads) {
  const int64_t teams = batch >= 4 * threads && bytes <= kGroupBytes ? threads : 1;
  const int64_t items = bytes > 0 ? kGroupBytes / bytes : batch;
  return {batch, teams, teams > 1 || items < 1 ? 1 : items < batch ? items : batch};
}

struct GramVariable {
  GramKernel kernel;
  int degree;
  int64_t dim, first;    // number of features; index of the first one among all variables' features
  int64_t width;         // dim, rounded up to a multiple of 8; 0 if nothing is packed
  int64_t strips, rows;  // offsets in an item's workspace and grad_workspace; rows: -1 without gradient
  const char* z;         // (B, n, dim), contiguous
  char* grad;            // like z
};

// A call works on batch items [item, item + items); slot s of a workspace belongs to item + s. Arrays behind
// a char* have the compute type.
struct GramArgs {
  Tournament tournament;
  int64_t variables, pairs, columns;  // columns: features of all variables
  const GramVariable* variable;
  const int64_t* pair;     // two variables each
  const char* scale;       // (B, variables): factor of the centred rows (rbf, laplacian), or the shift (polynomial)
  double* shift;           // (B, variables): what is subtracted from K
  char* centres;           // (items, columns)
  char* workspace;         // strips and padded rows, centred and scaled
  int64_t workspace_size;  // elements per item
  char* halves;            // (items, variables, padded): |row|^2 / 2 for distance kernels
  int64_t padded;          // n, rounded up to a multiple of kPad
  char* scratch;           // scratch_of bytes of this thread
  int64_t item, items;
  int64_t round, part, parts;  // only tiles with index % parts == part are visited
  bool f64;
};

struct GramSums : GramArgs {
  double* rows;   // (B, variables, n), accumulated
  double* cross;  // (items, tiles of all rounds, pairs)
};

struct GramBackward : GramArgs {
  const double* grad_rows;   // (B, variables, n)
  const double* grad_cross;  // (B, pairs)
  double* weight_sums;       // (items, variables, padded), accumulated
  char* grad_workspace;      // laid out like the workspace, accumulated
};

constexpr int64_t kPanel = 8;  // largest number of rows of a panel

// bytes of scratch per thread
PYFLOW_FN int64_t scratch_of(const GramArgs& a, bool backward) {
  const int64_t size = a.f64 ? 8 : 4, block = a.tournament.block;
  const int64_t values = backward ? ((a.variables + 1) * block + kPanel) * block : a.variables * kPanel * block;
  return size * values + 8 * (a.variables * block + 16 * a.pairs + a.variables);
}

// a unit is one permutation
struct PermutedArgs {
  int64_t n;
  const char *x, *y;            // (n, n), contiguous, symmetric
  const int32_t* permutations;  // (R, n)
  double* out;
  bool f64;
};

// Terms of HSIC from the sums over tiles; arrays are contiguous but the diagonals. A unit is an item, in the backward a
// variable of an item.
struct TermsArgs {
  int64_t variables, pairs, n;
  const int64_t* pair;  // two variables each
  bool unbiased;        // without diagonals
  const double *rows, *shift;
  const double* diagonals;
  int64_t stride[3];  // of the diagonals' items, variables and rows
};

struct Terms : TermsArgs {
  const double* cross;
  double *more, *less, *totals;
};

struct TermsBackward : TermsArgs {
  const double *grad_more, *grad_less, *totals;  // gradients: null for zero
  double *grad_rows, *grad_diagonals;
};

PYFLOW_CPU_KERNEL(gram_stats, GramArgs)
PYFLOW_CPU_KERNEL(gram_pack, GramArgs)
PYFLOW_CPU_KERNEL(gram_sums, GramSums)
PYFLOW_CPU_KERNEL(gram_clear, GramBackward)
PYFLOW_CPU_KERNEL(gram_backward, GramBackward)
PYFLOW_CPU_KERNEL(gram_finish, GramBackward)
PYFLOW_CPU_KERNEL(gram_permuted, PermutedArgs)
PYFLOW_CPU_KERNEL(hsic_terms, Terms)
PYFLOW_CPU_KERNEL(hsic_terms_backward, TermsBackward)

}  // namespace pyflow
