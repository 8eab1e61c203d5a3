"""Cases of the spline family: float32, 8 bins, linear tails at +-3, variant nflows unless the name says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import pyflow
from pyflow.reference import spline as ref

from .registry import Case, Outputs, Problem, available, bind, compiled, normals, peer, wide

MAIN = (16384, 8)
LARGE = (65536, 64)
BINS, BOUND = 8, 3.0
PEERS = {"nflows": ("nflows", "normflows"), "zuko": ("zuko",)}


def _reference(variant: str, inverse: bool, bins: int) -> Callable[..., Outputs]:
    options: dict[str, Any] = {
        "bounds": None, "mask": None, "bound": BOUND, "bins": bins, "tails": (0,), "form": variant, "param_scale": 1.0,
        "min_bin": 1e-3, "min_slope": 1e-3, "inverse": inverse, "event_dims": 1,
    }  # fmt: skip
    return lambda x, params: ref.rq_spline(x, params, **options)


def _op(variant: str, inverse: bool, bins: int) -> Callable[..., Outputs]:
    return partial(pyflow.ops.rq_spline, bins=bins, bound=BOUND, variant=variant, inverse=inverse)


def _split(params: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    return params[..., :bins], params[..., bins : 2 * bins], params[..., 2 * bins :]


def _of_nflows(package: str, module: str, inverse: bool, bins: int) -> Callable[..., Outputs]:
    """A spline with the signature that nflows and normflows share."""
    spline = peer(package, module).unconstrained_rational_quadratic_spline

    def function(x: Tensor, params: Tensor) -> Outputs:
        y, logdet = spline(x, *_split(params, bins), inverse=inverse, tails="linear", tail_bound=BOUND)
        return y, logdet.sum(1)

    return function


def _of_zuko(inverse: bool, bins: int) -> Callable[..., Outputs]:
    transforms = peer("zuko", "zuko.transforms")

    def function(x: Tensor, params: Tensor) -> Outputs:
        transform = transforms.MonotonicRQSTransform(*_split(params, bins), bound=BOUND)
        y, logdet = (transform.inv if inverse else transform).call_and_ladj(x)
        return y, logdet.sum(1)

    return function


def _makers(inverse: bool, bins: int) -> dict[str, Callable[[], Callable[..., Outputs]]]:
    return {
        "nflows": partial(_of_nflows, "nflows", "nflows.transforms.splines.rational_quadratic", inverse, bins),
        "normflows": partial(_of_nflows, "normflows", "normflows.utils.splines", inverse, bins),
        "zuko": partial(_of_zuko, inverse, bins),
    }


def _problem(
    shape: tuple[int, ...],
    device: torch.device,
    *,
    variant: str = "nflows",
    inverse: bool = False,
    backward: bool = False,
    bins: int = BINS,
) -> Problem:
    (x,), (params,) = normals(shape, device, 1), normals((*shape, 3 * bins - 1), device, 1)
    eager = _reference(variant, inverse, bins)
    makers = _makers(inverse, bins)
    theirs, missing = available({name: makers[name] for name in PEERS[variant]})
    functions = {"eager": eager, "compile": compiled(eager), "pyflow": _op(variant, inverse, bins), **theirs}
    inputs, rows = (x, params), shape[0]
    cotangents = (*normals(shape, device, 1), *normals((rows,), device, 1)) if backward else None
    # forward: x, params -> y, logdet; backward: x, params, both gradients -> the gradients of x and params
    passes = 2 + 3 * backward + (1 + 2 * backward) * (3 * bins - 1)
    return Problem(
        {name: bind(function, inputs, cotangents) for name, function in functions.items()},
        lambda: bind(eager, wide(inputs), cotangents and wide(cotangents))(),
        passes * x.nbytes + 4 * rows * (2 if backward else 1),
        missing=missing,
        # an inverse divides by slopes down to 1e-3
        tolerance=1e-3,
    )


def _case(name: str, shape: tuple[int, ...] = MAIN, variant: str = "nflows", **options: Any) -> Case:
    more = {key: options.pop(key) for key in ("quick", "gpu") if key in options}
    peers = PEERS[variant]
    return Case(
        f"spline/{name}",
        partial(_problem, variant=variant, **options),
        shape,
        (5, 6),
        contenders=("eager", "compile", *peers, "pyflow"),
        peer=peers[0],
        **more,
    )


CASES = [
    _case("forward", quick=True, gpu=LARGE),
    _case("inverse", inverse=True, quick=True),
    _case("forward+backward", backward=True, quick=True, gpu=LARGE),
    _case("inverse+backward", inverse=True, backward=True),
    _case("16 bins forward", bins=16),
    _case("16 bins forward+backward", bins=16, backward=True),
    _case("small forward", (64, 8), quick=True),
    _case("zuko forward", variant="zuko"),
    _case("zuko inverse", variant="zuko", inverse=True),
    _case("zuko forward+backward", variant="zuko", backward=True),
]
