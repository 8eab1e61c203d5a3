"""Drawn calls of HSIC and CKA."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import pyflow
from pyflow.hsic.estimators import Pairs, estimates, whole
from pyflow.hsic.inputs import variable
from pyflow.hsic.kernels import KernelSpec
from pyflow.ops.hsic import sums

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


def own(call_options: dict[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """Options of each variable's HSIC with itself."""
    other = {"normalize", "approximate", "n_features", "seed"}
    of_x = {name: value for name, value in call_options.items() if name not in other}
    of_x |= {"kernel_y": None, "bandwidth_y": None}
    kernel, bandwidth = call_options["kernel_y"], call_options["bandwidth_y"]
    return of_x, of_x | {"kernel": kernel or of_x["kernel"], "bandwidth": bandwidth or of_x["bandwidth"]}


def hsic_scale(x: Tensor, y: Tensor, options: dict[str, object]) -> float:
    """The size of both variables."""
    return math.prod(_size(z, of) for z, of in zip((x, y), own(options), strict=True))


def _size(z: Tensor, options: dict[str, object]) -> float:
    """The root of a variable's own HSIC, or what 512 roundings of its kernel matrix amount to if that is more: a
    polynomial of tiny rows is 1 + 1e-12, and float64 keeps four digits of what differs.
    """
    size = math.sqrt(abs(_own(z, options)))
    if options["kernel"] != "polynomial" or not z.numel():
        return size
    rows = z.detach().double().reshape(len(z), -1)
    gamma = options["gamma"] or 1 / rows.shape[1]
    largest = (gamma * float(rows.square().sum(1).max()) + options["coef0"]) ** options["degree"]
    return max(size, largest / 512)


def _own(z: Tensor, options: dict[str, object]) -> float:
    with pyflow.backend("reference"):
        return float(pyflow.ops.hsic(z.detach().double(), z.detach().double(), **options))


def ratio_scale(x: Tensor, y: Tensor, options: dict[str, object]) -> float:
    """How much rounding of each variable's own HSIC, of which terms cancel if it is unbiased, moves their ratio.

    Infinite where entries of a kernel matrix are below the range of float32.
    """
    scale = 1.0
    for z, of in zip((x, y), own(options), strict=True):
        value = abs(_own(z, of))
        if 0 < value < torch.finfo(torch.float32).tiny ** 2:
            return math.inf
        if value and options["estimator"] == "unbiased":
            scale = max(scale, _terms(z, of) / value)
    return scale


def _terms(z: Tensor, options: dict[str, object]) -> float:
    """The absolute values of the terms of a variable's own HSIC; of linear kernels those of the biased one."""
    spec = KernelSpec(*(options[name] for name in ("kernel", "bandwidth", "degree", "gamma", "coef0")))
    with pyflow.backend("reference"):
        made = variable("hsic", "x", z.detach().double(), spec)
        of = Pairs("hsic", [made], [(0, 0)], options["estimator"], False, sums)
        (added,) = estimates(of, with_added=True).added
    if added is None:
        return _own(z, {**options, "estimator": "biased"})
    return float(whole(added, made, made))


@drawer
def hsic(hand: Hand) -> Call:
    call = of_samples(hand, "hsic")
    call.options |= {
        "estimator": hand.one("biased", "unbiased", "biased_n2"), "normalize": hand.one(False, False, True),
        "approximate": hand.one(None, None, None, "rff", "nystrom"), "n_features": hand.one(4, 16), "seed": 0,
    }  # fmt: skip
    call.scale = lambda: (ratio_scale if call.options["normalize"] else hsic_scale)(*call.args, call.options)
    call.unitless = call.options["normalize"]
    return call


@drawer
def cka(hand: Hand) -> Call:
    call = of_samples(hand, "cka")
    call.options["estimator"] = hand.one("biased", "unbiased")
    call.scale = lambda: ratio_scale(*call.args, call.options)
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
    lists = [[samples(hand, n, kernel) for _ in range(hand.number(1, 2))] for kernel in kernels]
    call = Call("hsic_matrix", lists, options)
    scale = ratio_scale if options["normalize"] else hsic_scale
    call.scale = lambda: max((scale(x, y, options) for x in lists[0] for y in lists[1]), default=1.0)
    call.unitless = options["normalize"]
    return call
