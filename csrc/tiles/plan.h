// How rows x columns are split into units of work. A unit is a block of whole short rows or one segment of a long row.
// The split depends on the sizes alone, not on the number of threads or processors, so neither do sums.
#pragma once

#include "view.h"

namespace pyflow {

struct Plan {
  int64_t tile_rows;  // rows of a unit
  int64_t segments;   // units in a row
  int64_t units;
  int64_t grain;      // CPU: smallest number of units per thread
  int64_t tile_cols;  // GPU: columns of a tile; tile_cols / kEach threads share a row
  int64_t segment;    // columns of a unit; GPU: one or more tiles
};

PYFLOW_FN int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYFLOW_FN int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PYFLOW_FN int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

inline int64_t next_power_of_two(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

// CPU: a unit is processed in chunks
constexpr int64_t kChunk = 512;  // elements per chunk: the buffers of a kernel stay in L1
constexpr int64_t kSegment = 16 * kChunk;

// smallest number of units per thread, for units of `elements` elements
inline int64_t grain_of(int64_t elements) { return elements > 32768 ? 1 : 32768 / (elements > 0 ? elements : 1); }

// `flat`: every tensor is contiguous, so short rows are cheaper several at a time
inline Plan cpu_plan(const Space& s, bool flat) {
  Plan p{};
  const bool row_by_row = s.cols > kChunk / 2 || (!flat && s.cols >= 128);
  p.tile_rows = row_by_row ? 1 : kChunk / (s.cols > 0 ? s.cols : 1);
  p.segment = kSegment;
  p.segments = s.cols > kSegment ? ceil_div(s.cols, kSegment) : 1;
  p.units = ceil_div(s.rows, p.tile_rows) * p.segments;
  p.grain = grain_of(p.tile_rows * smaller(s.cols, kSegment));
  return p;
}

// GPU: a unit is a block of threads, which steps over its columns tile by tile. The split and the order of every sum
// match triton_kernels/_launch.py and _tiles.py.
constexpr int kThreads = 256;
constexpr int kEach = 4;                 // neighbouring columns per thread
constexpr int kTile = kThreads * kEach;  // elements of a tile
constexpr int64_t kLongest = 4 * kTile;  // most columns of a row in one unit

inline Plan gpu_plan(const Space& s) {
  Plan p{};
  const int64_t whole = next_power_of_two(s.cols), half = kTile / 2;
  p.tile_cols = s.cols > 2 * kTile ? kTile : whole < kEach ? kEach : whole < half ? whole : half;
  p.tile_rows = kTile / p.tile_cols;
  // a row without columns is one unit too: its sums are 0
  const int64_t tiles = s.cols > 0 ? ceil_div(s.cols, p.tile_cols) : 1;
  p.segment = smaller(p.tile_cols * tiles, kLongest);
  p.segments = s.cols > 0 ? ceil_div(s.cols, p.segment) : 1;
  p.units = ceil_div(s.rows, p.tile_rows) * p.segments;
  return p;
}

}  // namespace pyflow
