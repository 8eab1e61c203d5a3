"""Drawn calls of HSIC and CKA."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import pyflow

from ..calls import Call, Hand, drawer


def samples(hand: Hand, n: int, kernel: str) -> Tensor:
    """n rows of the few dims this kernel takes; a few times without the rows' dim."""
    if hand.one(False, False, False, False, False, False, False, True):
        return hand.tensor((n,))
    if kernel == "precomputed":
        values = hand.values((n, n))
        return hand.laid_out((values + values.T).to(hand.dtype())).requires_grad_(hand.maybe())
    if kernel == "delta":
        return hand.laid_out(torch.arange(n * (d := hand.one(1, 2))).view(n, d) % 3)
    return hand.tensor((n, hand.one(1, 2, 5, 33)))


def hsic_options(hand: Hand) -> dict[str, object]:
    return {
        "kernel": hand.one("rbf", "laplacian", "linear", "polynomial", "delta", "precomputed", "rbf", "linear"),
        "bandwidth": hand.one("median", 1.0, 0.01, 30.0), "kernel_y": hand.one(None, "rbf", "linear", "laplacian"),
        "bandwidth_y": hand.one(None, 2.0), "degree": hand.one(3, 1, 2), "gamma": hand.one(None, 0.5),
        "coef0": hand.one(1.0, 0.0),
    }  # fmt: skip


def of_samples(hand: Hand, op: str) -> Call:
    n = hand.one(8, 5, 4, 17, 33, 64, 8, 5, 4, 17, 3, 2, 1, 0)
    options = hsic_options(hand)
    kernels = options["kernel"], options["kernel_y"] or options["kernel"]
    return Call(op, [samples(hand, n, kernel) for kernel in kernels], options)


def hsic_scale(x: Tensor, y: Tensor, options: dict[str, object]) -> float:
    """The size of both variables."""
    plain = {
        name: value for name, value in options.items() if name not in ("normalize", "approximate", "n_features", "seed")
    }
    with pyflow.backend("reference"):
        own = dict(plain, kernel_y=None, bandwidth_y=None)
        other = dict(
            own,
            kernel=options["kernel_y"] or options["kernel"],
            bandwidth=options["bandwidth_y"] or options["bandwidth"],
        )
        return _size(x, own) * _size(y, other)


def _size(z: Tensor, options: dict[str, object]) -> float:
    """The root of a variable's own HSIC, or what 512 roundings of its kernel matrix amount to if that is more: a
    polynomial of tiny rows is 1 + 1e-12, and float64 keeps four digits of what differs.
    """
    size = math.sqrt(abs(pyflow.ops.hsic(z.double(), z.double(), **options)))
    if options["kernel"] != "polynomial" or not z.numel():
        return size
    rows = z.detach().double().reshape(len(z), -1)
    gamma = options["gamma"] or 1 / rows.shape[1]
    largest = (gamma * float(rows.square().sum(1).max()) + options["coef0"]) ** options["degree"]
    return max(size, largest / 512)


@drawer
def hsic(hand: Hand) -> Call:
    call = of_samples(hand, "hsic")
    call.options |= {
        "estimator": hand.one("biased", "unbiased", "biased_n2"), "normalize": hand.one(False, False, True),
        "approximate": hand.one(None, None, None, "rff", "nystrom"), "n_features": hand.one(4, 16), "seed": 0,
    }  # fmt: skip
    call.scale = lambda: 1.0 if call.options["normalize"] else hsic_scale(*call.args, call.options)
    call.unitless = call.options["normalize"]
    return call


@drawer
def cka(hand: Hand) -> Call:
    call = of_samples(hand, "cka")
    call.options["estimator"] = hand.one("biased", "unbiased")
    call.scale = lambda: 1.0
    call.unitless = True
    return call


@drawer
def nhsic(hand: Hand) -> Call:
    call = of_samples(hand, "nhsic")
    call.options["epsilon"] = hand.one(1e-2, 1e-5)
    call.scale = lambda: float(len(call.args[0]))
    call.unitless = True
    return call


@drawer
def hsic_matrix(hand: Hand) -> Call:
    n = hand.one(8, 4, 17, 33, 3, 0)
    options = hsic_options(hand) | {"estimator": hand.one("biased", "unbiased"), "normalize": hand.maybe()}
    kernels = options["kernel"], options["kernel_y"] or options["kernel"]
    lists = [[samples(hand, n, kernel) for _ in range(hand.number(1, 3))] for kernel in kernels]
    call = Call("hsic_matrix", lists, options)
    call.scale = lambda: 1.0 if options["normalize"] else max(
        (hsic_scale(x, y, {**options}) for x in lists[0] for y in lists[1]), default=1.0
    )  # fmt: skip
    call.unitless = options["normalize"]
    return call
