"""Cases of HSIC with rbf kernels, and of centring Gram matrices.

Eager code is the usual one: two n x n matrices in float32, multiplied and summed. "floor" is a lower bound for methods
that compute one triangle of both matrices: half of torch's matrix products and exponentials of that shape.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import pyflow
from pyflow.reference.center import center_gram

from .registry import FRESH, Call, Case, Outputs, Problem, available, bind, compiled, normals, peer, wide

FLOOR = "floor"


def plain(x: Tensor, y: Tensor, sigma: float) -> Outputs:
    """Return the biased estimate from both matrices; the means of x and y must be near 0."""
    n = x.shape[-2]

    def gram(z: Tensor) -> Tensor:
        squares = z.square().sum(-1)
        distances = squares.unsqueeze(-1) + squares.unsqueeze(-2) - 2 * (z @ z.mT)
        return torch.exp(distances.clamp(min=0) / (-2 * sigma**2))

    k, m = gram(x), gram(y)
    rows = (k.sum(-1) * m.sum(-1)).sum(-1)
    total = (k * m).sum((-2, -1)) - 2 / n * rows + k.sum((-2, -1)) * m.sum((-2, -1)) / n**2
    return (total / (n - 1) ** 2,)


def keops(lazy: Any, x: Tensor, y: Tensor, sigma: float) -> Outputs:
    """Return the same estimate by KeOps' lazy tensors, which store no n x n matrix."""
    n, one = x.shape[-2], torch.ones_like(x[..., :1])

    def gram(z: Tensor) -> Any:
        return (-((lazy(z[:, :, None]) - lazy(z[:, None])) ** 2).sum(-1) / (2 * sigma**2)).exp()

    k, m = gram(x), gram(y)
    rows, columns, cross = k @ one, m @ one, (k * m) @ one
    product = rows.sum((-2, -1)) * columns.sum((-2, -1))
    total = cross.sum((-2, -1)) - 2 / n * (rows * columns).sum((-2, -1)) + product / n**2
    return (total / (n - 1) ** 2,)


def least(shape: tuple[int, ...], device: torch.device) -> Callable[[], Outputs]:
    """Return a function that computes half the products and exponentials of both matrices."""
    batch, n, _ = shape
    # scaled so that no exponential overflows
    x, y = (z / shape[-1] ** 0.5 for z in normals(shape, device, 2))
    halves = torch.empty((batch, n // 2, n), device=device)

    def run() -> Outputs:
        for z in (x, y):
            torch.bmm(z[:, : n // 2], z.mT, out=halves)
            halves.exp_()
        return (halves,)

    return run


def _problem(shape: tuple[int, ...], device: torch.device, *, backward: bool, beside: tuple[str, ...]) -> Problem:
    x, noise = normals(shape, device, 2)
    y = x + noise
    sigma = shape[-1] ** 0.5
    cotangents = (torch.ones(shape[:1], device=device),) if backward else None
    eager = partial(plain, sigma=sigma)
    functions: dict[str, Callable[..., Outputs]] = {
        "eager": eager,
        "compile": compiled(eager),
        "pyflow": lambda x, y: (pyflow.ops.hsic(x, y, bandwidth=sigma),),
    }
    calls = {name: bind(function, (x, y), cotangents) for name, function in functions.items()}
    truth = bind(eager, wide((x, y)), cotangents and wide(cotangents))
    forms: dict[str, Callable[[Outputs], Outputs]] = {}
    if FLOOR in beside:
        calls[FLOOR] = least(shape, device)
        forms[FLOOR] = lambda out: tuple(t.float() for t in truth())

    def theirs() -> Call:
        return bind(partial(keops, peer("pykeops", "pykeops.torch").LazyTensor, sigma=sigma), (x, y))

    peers, missing = available({"KeOps": theirs} if "KeOps" in beside else {})
    moved = (4 if backward else 2) * x.nbytes
    pairs = shape[0] * shape[1] * (shape[1] - 1) // 2
    # one triangle of each matrix; backward recomputes it and multiplies its weights with the rows on both sides
    flops = 2 * 2 * pairs * shape[2] * (4 if backward else 1)
    # the tolerance allows for the float32 errors of the eager form
    return Problem(calls | peers, truth, moved, flops, missing, forms, tolerance=1e-3 if backward else 1e-4)


def _case(
    name: str,
    shape: tuple[int, ...],
    backward: bool = False,
    more: tuple[str, ...] = (),
    pages: str = "reused",
    **options: Any,
) -> Case:
    beside = () if backward else (FLOOR, *more)
    return Case(
        f"hsic/{name} {'forward+backward' if backward else 'forward'}{FRESH if pages == 'fresh' else ''}",
        partial(_problem, backward=backward, beside=beside),
        shape,
        (2, 12, 3),
        contenders=("eager", "compile", *more, "pyflow", *(() if backward else (FLOOR,))),
        peer="KeOps" if more else None,
        compare=() if backward else ((FLOOR, "pyflow"),),
        pages=pages,
        **options,
    )


def _center(shape: tuple[int, ...], device: torch.device) -> Problem:
    gram = normals(shape, device, 1)
    functions = {
        "eager": lambda gram: (center_gram(gram),),
        "compile": compiled(lambda gram: (center_gram(gram),)),
        "pyflow": lambda gram: (pyflow.ops.center_gram(gram),),
    }
    calls = {name: bind(function, gram) for name, function in functions.items()}
    return Problem(calls, bind(functions["eager"], wide(gram)), 2 * gram[0].nbytes)


CASES = [
    # fresh pages come first: see `memory.set_pages`
    _case("4096", (1, 4096, 64), pages="fresh"),
    _case("4096", (1, 4096, 64), backward=True, pages="fresh"),
    _case("4096", (1, 4096, 64), quick=True, more=("KeOps",), gpu=(1, 4096, 64)),
    _case("4096", (1, 4096, 64), backward=True, quick=True, gpu=(1, 4096, 64)),
    _case("64 of 512", (64, 512, 256)),
    _case("64 of 512", (64, 512, 256), backward=True),
    _case("32 of 256", (32, 256, 128)),
    _case("32 of 256", (32, 256, 128), backward=True),
    _case("10000", (1, 10000, 64)),
    Case("hsic/center_gram", _center, (16, 1024, 1024), (2, 9, 9), gpu=(64, 1024, 1024)),
]
