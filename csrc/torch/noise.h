// Shared by the operators that draw noise.
#pragma once

#include "../cpu/noise.h"
#include "tensor.h"

namespace pyflow {

// `seed` is 0-d or (rows,), `step` 0-d, both int64 on the CPU
Stream stream_of(const Tensor& seed, const Tensor& step, int64_t purpose);

}  // namespace pyflow
