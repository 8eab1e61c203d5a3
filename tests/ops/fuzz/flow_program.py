"""Drawn programs of flows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..calls import Call, Hand, drawer
from ..programs import Builder, drawn


@drawer
def flow_program(hand: Hand) -> Call:
    dtype, grad = hand.one(torch.float32, torch.float64), hand.maybe()
    build = Builder(hand.one(2, 1, 3, 5, 8, 17, 33), hand.one(0, 1, 3, 8), seed=hand.number(0, 2**31))
    program = drawn(hand.one, build, hand.one(2, 1, 3, 4, 0))
    batch = hand.one(1, 2, 33, 64, 130, 0)

    def tensor(shape: tuple[int, ...]) -> Tensor:
        values = hand.values(shape)
        # a network spreads a NaN over its row, and the slope of a clamp there is 0 or NaN
        values = values.nan_to_num(1.0, 1.0, 1.0) if grad else values
        return hand.laid_out(values.to(dtype)).requires_grad_(grad and hand.maybe())

    weights = [hand.laid_out(w.to(dtype)) for w in build.weights]
    for place, weight in enumerate(weights):
        weight.requires_grad_(place not in build.constants and grad and hand.maybe())
    context = tensor((batch, program.context)) if program.context else None
    return Call("flow_program", [tensor((batch, program.columns)), program, weights], {"context": context})
