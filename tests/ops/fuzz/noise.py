"""Drawn calls of noise."""

from __future__ import annotations

import torch

from ..calls import Call, Hand, drawer


def noise(hand: Hand, op: str) -> Call:
    shape = hand.shape(0, 3)
    batch = shape[0] if shape else None
    options = {
        "seed": hand.seed(batch), "step": hand.step(), "dtype": hand.dtype(),
        "purpose": hand.one("noise", "corrector", "prior"),
    }  # fmt: skip
    return Call(op, [shape], options, exact=True)


@drawer
def normal(hand: Hand) -> Call:
    return noise(hand, "normal")


@drawer
def uniform(hand: Hand) -> Call:
    return noise(hand, "uniform")


@drawer
def philox(hand: Hand) -> Call:
    shape = hand.shape(0, 2)
    source = torch.Generator().manual_seed(hand.number(0, 2**31))
    words = [torch.randint(0, 2**32, (*shape, n), generator=source) for n in (4, 2)]
    return Call("philox", [hand.laid_out(each) for each in words], exact=True)


@drawer
def sample_seeds(hand: Hand) -> Call:
    return Call("sample_seeds", [hand.seed(), hand.one(5, 0, 1, 130), hand.one(0, 7, 2**40)], exact=True)
