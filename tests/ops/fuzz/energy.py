"""Drawn calls of energies and Langevin chains."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflow.testing import compute_dtype

from ..calls import Call, Hand, drawer


def quadratic(z: Tensor) -> Tensor:
    # without a dim beside the batch too: what an energy raises is its own matter
    return (z.flatten(1).square().sum(1) if z.dim() > 1 else z.square()) / 2


@drawer
def energy_and_grad(hand: Hand) -> Call:
    return Call("energy_and_grad", [quadratic, hand.tensor(hand.shape(2, 3))])


def chain(hand: Hand) -> tuple[tuple[int, ...], torch.dtype, float | Tensor]:
    shape = hand.shape(2, 3)
    return shape, hand.dtype(), hand.scalar(shape[0], 0.1, 1.0)


@drawer
def mala_propose(hand: Hand) -> Call:
    shape, dtype, alpha = chain(hand)
    return Call("mala_propose", [hand.tensor(shape, dtype) for _ in range(2)] + [alpha], hand.streams(shape))


@drawer
def mala_accept(hand: Hand) -> Call:
    shape, dtype, alpha = chain(hand)
    energies = [hand.tensor(shape[:1], compute_dtype(dtype)) for _ in range(2)]
    states, grads = ([hand.tensor(shape, dtype) for _ in range(2)] for _ in range(2))
    return Call("mala_accept", [*states, *energies, *grads, alpha], hand.streams(shape))


@drawer
def mala_step(hand: Hand) -> Call:
    shape, dtype, alpha = chain(hand)
    z = hand.tensor(shape, dtype, grad=False)
    u = quadratic(z.to(compute_dtype(dtype)))
    return Call("mala_step", [z, u, z.clone(), quadratic, alpha], hand.streams(shape))


@drawer
def energy_loss(hand: Hand) -> Call:
    shape = hand.shape(1, 2)
    args = [hand.tensor(shape), hand.tensor(shape), hand.one("linear", "hinge", "ebgan"), hand.one(1.0, 0.0)]
    return Call("energy_loss", args)


@drawer
def grad_norm_penalty(hand: Hand) -> Call:
    return Call("grad_norm_penalty", [hand.tensor(hand.shape(2, 4))])
