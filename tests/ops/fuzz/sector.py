"""Drawn calls of sector counts."""

from __future__ import annotations

import torch

from ..calls import Call, Hand, drawer


@drawer
def sector_counts(hand: Hand) -> Call:
    thresholds = torch.linspace(0, 1, hand.one(1, 0, 3), dtype=torch.float64)
    args = [thresholds, hand.one(4, 1, 33), hand.one(10, 1, 300)]
    return Call("sector_counts", args, {"seed": hand.seed(), "step": hand.step()}, exact=True)
