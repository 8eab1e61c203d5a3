"""Drawn calls of the GAN-QP losses."""

from __future__ import annotations

from torch import Tensor

from pyflow._schemas import DISTANCES

from ..calls import Call, Hand, drawer


def critic(hand: Hand) -> tuple[list[Tensor], tuple[int, ...], tuple[int, ...]]:
    b = hand.batch()
    return [hand.tensor((b,)) for _ in range(2)], (b, *hand.shape(1, 2)), (b, hand.one(2, 8))


@drawer
def gan_qp_loss(hand: Hand) -> Call:
    scores, x, z = critic(hand)
    args = [
        *scores,
        hand.tensor(x),
        hand.tensor(x),
        *([hand.tensor(z), hand.tensor(z)] if hand.maybe() else [None, None]),
    ]
    options = {
        "lam": hand.one(10.0, 0.5), "distance": hand.one(*DISTANCES), "eps": hand.one(0.0, 1e-3),
        "reduction": hand.one("mean", "sum", "none"),
    }  # fmt: skip
    return Call("gan_qp_loss", args, options)


@drawer
def gan_qp_generator_loss(hand: Hand) -> Call:
    scores, x, z = critic(hand)
    args = [*scores, *(hand.tensor(shape) for shape in (x, x, z, z)), hand.one((2.0, 3.0), (0.0, 6))]
    return Call("gan_qp_generator_loss", args, {"reduction": hand.one("mean", "sum", "none")})
