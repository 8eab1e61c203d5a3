// What an instruction does to a tile: Rule<I>::forward and Rule<I>::backward, one file per instruction.
#pragma once

#include "product.h"

namespace pyflow::PYFLOW_ISA {

template <Instruction I>
struct Rule;

}  // namespace pyflow::PYFLOW_ISA
