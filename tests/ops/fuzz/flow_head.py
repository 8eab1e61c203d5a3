"""Drawn calls of the head of a flow."""

from __future__ import annotations

from pyflow._schemas import PRIORS

from ..calls import Call, Hand, drawer


@drawer
def flow_log_prob(hand: Hand) -> Call:
    shape = hand.shape(2, 4)
    log_scale = hand.one(None, shape[1:], shape)
    log_scale = None if log_scale is None else hand.tensor(log_scale)
    return Call("flow_log_prob", [hand.tensor(shape), log_scale], {"prior": hand.one(*PRIORS)})
