// Register tile of the Gram matrix kernels, kRows x kCols, and the packed format of its operands: a strip is kCols
// rows, transposed to (features, kCols). Left and right operand of a product use the same strips.
#pragma once

#include "../args/hsic.h"

#if !defined(PYFLOW_ISA)
#error "compiled once per instruction set: PYFLOW_ISA names it"
#endif

namespace pyflow::PYFLOW_ISA {

// as many sums as fit in the registers: gcc keeps all of them there and nearly reaches the peak of a core (107 of 112
// GFLOP/s on a Zen 4; torch's BLAS reaches 104)
#if defined(__AVX512F__)
constexpr int kRows = 8, kStripBytes = 128;
#else
constexpr int kRows = 4, kStripBytes = 64;
#endif
template <class T>
constexpr int kCols = kStripBytes / sizeof(T);
static_assert(kRows <= kPanel && kCols<double> % kRows == 0 && kPad % kCols<float> == 0);

}  // namespace pyflow::PYFLOW_ISA
