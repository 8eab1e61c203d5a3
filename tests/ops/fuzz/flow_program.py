"""Drawn programs of flows."""

from __future__ import annotations

import torch

from ..calls import Call, Hand, drawer
from ..programs import Builder, drawn


@drawer
def flow_program(hand: Hand) -> Call:
    dtype = hand.one(torch.float32, torch.float64)
    build = Builder(hand.one(2, 1, 3, 5, 8, 17, 33), hand.one(0, 1, 3, 8), seed=hand.number(0, 2**31))
    program = drawn(hand.one, build, hand.one(2, 1, 3, 4, 0))
    batch = hand.one(1, 2, 33, 64, 130, 0)
    weights = [hand.laid_out(w.to(dtype)).requires_grad_(hand.maybe()) for w in build.weights]
    context = hand.tensor((batch, program.context), dtype) if program.context else None
    return Call("flow_program", [hand.tensor((batch, program.columns), dtype), program, weights], {"context": context})
