"""Drawn calls of spectral normalisation."""

from __future__ import annotations

import math

import torch

from ..calls import Call, Hand, drawer


@drawer
def spectral_normalize(hand: Hand) -> Call:
    weights, us, vs = [], [], []
    for _ in range(hand.number(1, 4)):
        shape = hand.shape(1, 4)
        weights.append(hand.tensor(shape, hand.one(torch.float32, torch.float64)))
        rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (None, None)
        us.append(None if rows is None else hand.tensor((rows,), weights[-1].dtype, grad=False))
        vs.append(None if rows is None else hand.tensor((columns,), weights[-1].dtype, grad=False))
    options = {"n_iter": hand.one(1, 0, 3), "through_iteration": hand.maybe()}
    # a normalised weight is of size 1, whatever the unit of the weight
    return Call("spectral_normalize", [weights, us, vs], options, scale=lambda: 1.0, unitless=True)
