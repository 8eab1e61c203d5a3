"""Drawn calls of coupling layers."""

from __future__ import annotations

from pyflow._schemas import PACKINGS, SCALE_MAPS

from ..calls import Call, Hand, drawer


@drawer
def additive_coupling(hand: Hand) -> Call:
    shape = hand.shape()
    args = [hand.tensor(shape), hand.tensor(shape)]
    return Call("additive_coupling", args, {"inverse": hand.maybe(), "mask": hand.mask(shape)})


def map_options(hand: Hand) -> dict[str, object]:
    return {
        "scale_map": hand.one(*SCALE_MAPS), "clamp": hand.one(2.0, 0.5, 30), "eps": hand.one(0.0, 1e-3, 0.1),
        "slope": hand.one(1e-3, 0.5), "shift_first": hand.maybe(), "inverse": hand.maybe(),
    }  # fmt: skip


@drawer
def affine_coupling(hand: Hand) -> Call:
    shape = hand.shape()
    args = [hand.tensor(shape) for _ in range(3)]
    options = {"mask": hand.mask(shape), "event_dims": hand.one(None, *range(len(shape) + 1))}
    return Call("affine_coupling", args, {**map_options(hand), **options})


@drawer
def affine_coupling_packed(hand: Hand) -> Call:
    shape = hand.shape()
    dim = hand.number(-len(shape), len(shape) - 1)
    packed = list(shape)
    packed[dim] *= 2
    args = [hand.tensor(shape), hand.tensor(tuple(packed))]
    options = {"mask": hand.mask(shape), "event_dims": hand.one(None, *range(len(shape) + 1))}
    return Call(
        "affine_coupling_packed", args, {"packing": hand.one(*PACKINGS), "dim": dim, **map_options(hand), **options}
    )
