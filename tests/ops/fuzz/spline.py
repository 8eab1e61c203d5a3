"""Drawn calls of splines."""

from __future__ import annotations

import torch

from pyflow._schemas import SPLINE_VARIANTS, TAILS

from ..calls import Call, Hand, drawer


@drawer
def rq_spline(hand: Hand) -> Call:
    shape, bins = hand.shape(1, 3), hand.one(8, 2, 3, 16, 32, 33)
    tails = hand.one("linear", "circular", "list", None)
    count = {"linear": -1, "circular": 0}.get(str(tails), 1)
    x, params = hand.tensor(shape), hand.tensor((*shape, 3 * bins + count))
    if tails is None:
        # the domain; out of it now and then
        with torch.no_grad():
            x.copy_(x.abs().clamp(max=1) if hand.one(True, True, True, False) else x)
    variant = hand.one(*SPLINE_VARIANTS)
    options = {
        "bins": bins, "tails": [hand.one(*TAILS) for _ in range(shape[-1])] if tails == "list" else tails,
        "variant": variant, "param_scale": hand.one(1.0, 0.3), "min_bin": hand.one(1e-3, 1e-2, 1 / 64),
        "min_slope": hand.one(1e-3, 0.5), "inverse": hand.maybe(), "mask": hand.mask(shape),
        "bound": hand.one(1.0, 3, torch.linspace(0.5, 4.0, shape[-1], dtype=hand.dtype())),
        "event_dims": hand.one(None, *range(len(shape) + 1)),
    }  # fmt: skip
    return Call("rq_spline", [x, params], options)
