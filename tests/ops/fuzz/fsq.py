"""Drawn calls of quantisation."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from pyflow._schemas import FSQ_VARIANTS
from pyflow.testing import compute_dtype

from ..calls import Call, Hand, drawer


def levels(hand: Hand) -> tuple[int, ...]:
    # 1001 levels of "paper" are bounded by 499.5, a tie that every large z comes within an ulp of
    return tuple(hand.one(3, 8, 5, 2, 7, 1000) for _ in range(hand.number(1, 6)))


def within_rounding(call: Call) -> Iterator[Call]:
    """The same call, and with the first tensor a little to either side, in the dtypes that bounds are computed in."""
    z = call.args[0].detach()
    for dtype in {compute_dtype(z.dtype), torch.float64}:
        for move in (0.0, -1e-5, 1e-5):
            moved = (z.double() * (1 + move) + move).to(dtype)
            yield Call(call.op, [moved, *call.args[1:]], call.options)


@drawer
def fsq(hand: Hand) -> Call:
    numbers = levels(hand)
    variant = hand.one(*FSQ_VARIANTS)
    shape = hand.shape(0, 3)
    dim = hand.number(-len(shape) - 1, len(shape))
    shape = list(shape)
    shape.insert(dim % (len(shape) + 1), len(numbers))
    call = Call(
        "fsq", [hand.tensor(tuple(shape)), numbers], {"variant": variant, "dim": dim, "return_indices": hand.maybe()}
    )
    call.rounds = lambda: within_rounding(call)
    return call


@drawer
def residual_fsq(hand: Hand) -> Call:
    # three stages of more levels have digits below float32's last
    numbers = tuple(min(n, 8) for n in levels(hand))
    shape = (*hand.shape(1, 2), len(numbers))
    active = None if hand.maybe() else torch.tensor(hand.one(1, 0, 2, 9))
    args = [hand.tensor(shape), numbers, hand.one(1, 2, 3)]
    call = Call("residual_fsq", args, {"variant": hand.one("symmetric_hard", "symmetric"), "active": active})
    call.rounds = lambda: within_rounding(call)
    return call


@drawer
def fsq_decode(hand: Hand) -> Call:
    numbers = levels(hand)
    size = math.prod(numbers)
    shape = hand.shape(0, 3)
    source = torch.Generator().manual_seed(hand.number(0, 2**31))
    low, high = hand.one((0, size), (-1, size), (-3, size + 2))
    dtype = torch.int64 if size > 2**31 else hand.one(torch.int64, torch.int32)
    indices = torch.randint(low, high, shape, generator=source).to(dtype)
    options = {
        "variant": hand.one(*FSQ_VARIANTS), "dim": hand.number(-len(shape) - 1, len(shape)), "dtype": hand.dtype(),
    }  # fmt: skip
    return Call("fsq_decode", [hand.laid_out(indices), numbers], options, exact=True)


@drawer
def codebook_usage(hand: Hand) -> Call:
    size = hand.one(3, 1, 64, 1000)
    source = torch.Generator().manual_seed(hand.number(0, 2**31))
    indices = torch.randint(hand.one(0, -1, -2), size + hand.one(0, 0, 1), hand.shape(), generator=source)
    return Call("codebook_usage", [hand.laid_out(indices.to(hand.one(torch.int64, torch.int32))), size])
