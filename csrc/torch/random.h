// Shared by the operators that draw noise.
#pragma once

#include "../args/noise.h"
#include "device.h"

namespace pyflow {

// `seed` is 0-d or (rows,), `step` 0-d, both int64
RandomStream random_stream(const Tensor& seed, const Tensor& step, Purpose purpose);

}  // namespace pyflow
