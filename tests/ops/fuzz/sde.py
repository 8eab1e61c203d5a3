"""Drawn calls of steps of SDEs."""

from __future__ import annotations

from ..calls import Call, Hand, drawer


@drawer
def sde_step(hand: Hand) -> Call:
    shape = hand.shape()
    args = [hand.tensor(shape), hand.tensor(shape), *(hand.scalar(shape[0], 1.0, 0.0, -0.5) for _ in range(3))]
    options = hand.streams(shape)
    if hand.maybe():
        options = {"noise": hand.tensor(shape)}
    return Call("sde_step", args, {**options, "return_mean": hand.maybe()})


@drawer
def perturb(hand: Hand) -> Call:
    shape = hand.shape()
    args = [hand.tensor(shape), *(hand.scalar(shape[0], 1.0, 0.0, 0.3) for _ in range(2))]
    return Call("perturb", args, hand.streams(shape))


@drawer
def denoising_loss(hand: Hand) -> Call:
    shape = hand.shape()
    score = hand.maybe()
    options = hand.streams(shape) | {
        "weight": hand.one(None, 1) and hand.scalar(shape[0], 1.0, 2.0), "reduction": hand.one("sum", "mean"),
        "parameterization": "score" if score else "epsilon",
    }  # fmt: skip
    return Call("denoising_loss", [hand.tensor(shape), hand.scalar(shape[0], 1.0, 0.3) if score else None], options)


@drawer
def langevin_step(hand: Hand) -> Call:
    shape = hand.shape()
    options = hand.streams(shape)
    if hand.maybe():
        options["step_size"] = hand.scalar(shape[0], 0.1, 0.0)
    else:
        options |= {"snr": hand.one(0.16, 0.01), "norm": hand.one("marginal", "sample", "batch")}
        if options["norm"] == "marginal":
            options["std"] = hand.scalar(shape[0], 1.0, 0.0, 0.3)
    return Call("langevin_step", [hand.tensor(shape), hand.tensor(shape)], {**options, "return_mean": hand.maybe()})
