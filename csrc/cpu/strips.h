// The shape of what the kernels of Gram matrices multiply, and how their rows are packed: strips of so many rows,
// transposed, serve both sides of a product.
#pragma once

#include "hsic.h"

#if !defined(PYFLOW_ISA)
#error "compiled once per instruction set: PYFLOW_ISA names it"
#endif

namespace pyflow::PYFLOW_ISA {

// as many sums as the registers hold: gcc keeps all of them there and reaches the peak of a core (107 of 112 GFLOP/s
// on a Zen 4, where the BLAS of torch reaches 104)
#if defined(__AVX512F__)
constexpr int kRows = 8, kStripBytes = 128;
#else
constexpr int kRows = 4, kStripBytes = 64;
#endif
template <class T>
constexpr int kCols = kStripBytes / sizeof(T);
static_assert(kRows <= kPanel && kCols<double> % kRows == 0 && kPad % kCols<float> == 0);

}  // namespace pyflow::PYFLOW_ISA
