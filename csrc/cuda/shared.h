// What csrc/torch calls in csrc/cuda besides the functions of the families. Needs no CUDA header.
#pragma once

#include "../tiles/view.h"

struct CUstream_st;

namespace pyflow::cuda {

using Stream = CUstream_st*;

// the text of the last launch error of this thread, which it clears; null if there is none
const char* launch_error();

// sums.partial (rows, segments) -> sums.out (rows), of the compute type
void sum_segments(const RowSums& sums, int64_t rows, int64_t segments, bool f64, Stream);

}  // namespace pyflow::cuda
