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
    values = hand.values(shape)
    if tails is None:
        # the domain; out of it now and then
        values = values.abs().clamp(max=1) if hand.one(True, True, True, False) else values
    else:
        # gradients jump at knots, of which equal bins have one at 0
        values = values + 0.1
    x = hand.laid_out(values.to(hand.dtype())).requires_grad_(hand.maybe())
    params = hand.tensor((*shape, 3 * bins + count))
    variant = hand.one(*SPLINE_VARIANTS)
    options = {
        "bins": bins, "tails": [hand.one(*TAILS) for _ in range(shape[-1])] if tails == "list" else tails,
        "variant": variant, "param_scale": hand.one(1.0, 0.3), "min_bin": hand.one(1e-3, 1e-2, 1 / 64),
        "min_slope": hand.one(1e-3, 0.5), "inverse": hand.maybe(), "mask": hand.mask(shape),
        "bound": hand.one(1.0, 3, torch.linspace(0.5, 4.0, shape[-1], dtype=hand.dtype())),
        "event_dims": hand.one(None, *range(len(shape) + 1)),
    }  # fmt: skip
    # a knot's error counts 1 / width times in a place within its bin, and as often again in a gradient
    return Call("rq_spline", [x, params], options, scale=lambda: float(bins**2))
