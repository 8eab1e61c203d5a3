// Counter-based noise: uniform or normal floats from the random words of a block.
#pragma once

#include "../math/normal.h"
#include "../tiles/enum.h"

// in the order of NOISES in pyflow/_schemas.py
#define PYFLOW_NOISES(F) \
  F(uniform)             \
  F(normal)

// PURPOSES: what a draw is for, the top byte of the last counter word
#define PYFLOW_PURPOSES(F) \
  F(noise)                 \
  F(corrector)             \
  F(prior)                 \
  F(accept)                \
  F(data)                  \
  F(permutation)           \
  F(monte_carlo)

namespace pyflow {

PYFLOW_ENUM(Purpose, PYFLOW_PURPOSES)

PYFLOW_ENUM(NoiseKind, PYFLOW_NOISES)

// four consecutive elements of a stream: one block
struct Four {
  float v[4];
};

template <NoiseKind K>
PYFLOW_FN Four noise_of(const Words& w) {
  if constexpr (K == NoiseKind::normal) {
    const Pair p = box_muller(w.v[0], w.v[1]), q = box_muller(w.v[2], w.v[3]);
    return {{p.even, p.odd, q.even, q.odd}};
  } else {
    return {{uniform(w.v[0]), uniform(w.v[1]), uniform(w.v[2]), uniform(w.v[3])}};
  }
}

}  // namespace pyflow
