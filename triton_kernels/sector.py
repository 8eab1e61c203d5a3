"""Largest gaps of random points on a circle: one trial per lane, with the operations of csrc/ops/sector.h."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, _random
from ._random import log_plain, words_at

BLOCK = 256  # trials of a program per round
PROGRAMS = 4096  # at most; programs stride over the blocks of trials


@triton.jit
def positive_uniform(word):
    """Uniform in (0, 1] from a word."""
    return (word.to(tl.float32) + 1.0) * 2.3283064365386963e-10


@triton.jit
def fixed_log(u):
    """-log(u) in units of 2**-24."""
    return (-log_plain(u) * 16777216.0).to(tl.int32)


@triton.jit
def used(word, at, points):
    """The word, or 0xFFFFFFFF beyond the last point: adds 0 to the sum and is never the minimum."""
    return tl.where(at < points, word, tl.full([], 0xFFFFFFFF, tl.uint32))


@triton.jit(do_not_specialize=["count", "points", "trials", "rounds"])
def counts_kernel(thresholds, counts, count, points, trials, rounds, stream, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    blocks = (points + 3) // 4
    for i in range(0, rounds):
        trial = (tl.num_programs(0).to(tl.int64) * i + tl.program_id(0)) * BLOCK + lane
        inside = trial < trials
        low = tl.full([BLOCK], 0xFFFFFFFF, tl.uint32)
        total = tl.zeros([BLOCK], tl.int64)
        for block in range(0, blocks):
            w0, w1, w2, w3 = words_at(trial * blocks + block, stream, lane, BLOCK)
            w1 = used(w1, 4 * block + 1, points)
            w2 = used(w2, 4 * block + 2, points)
            w3 = used(w3, 4 * block + 3, points)
            u = positive_uniform(w0) * positive_uniform(w1) * (positive_uniform(w2) * positive_uniform(w3))
            total += fixed_log(tl.maximum(u, 1.1754943508222875e-38)).to(tl.int64)
            low = tl.minimum(low, tl.minimum(tl.minimum(w0, w1), tl.minimum(w2, w3)))
        largest = fixed_log(positive_uniform(low)).to(tl.float64)
        whole = total.to(tl.float64)
        for k in range(0, count):
            reached = (largest >= tl.load(thresholds + k) * whole) & inside
            tl.atomic_add(counts + k, tl.sum(reached.to(tl.int32)).to(tl.int64), sem="relaxed")


def sector_counts(thresholds: Tensor, points: int, trials: int, seed: Tensor, step: Tensor, purpose: int) -> Tensor:
    thresholds = thresholds.contiguous()
    counts = torch.zeros(thresholds.shape, dtype=torch.int64, device=thresholds.device)
    if counts.numel() == 0:
        return counts
    programs = min(-(-trials // BLOCK), PROGRAMS)
    _launch.launch(
        counts_kernel, programs, counts.device, thresholds, counts, counts.numel(), points, trials,
        -(-trials // (BLOCK * programs)), _random.stream(seed, step, purpose), BLOCK=BLOCK,
    )  # fmt: skip
    return counts
