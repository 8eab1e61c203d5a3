"""Cases of finite scalar quantisation: a million tokens of four to six channels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import pyflow
from pyflow.reference import fsq as ref

from .registry import Case, Outputs, Problem, available, bind, compiled, normals, peer, wide

TOKENS = 1 << 20
LEVELS = ((8, 5, 5, 5), (7, 5, 5, 5, 5), (8, 8, 8, 5, 5, 5))
PEER = "vector-quantize-pytorch"
PEER_COMPILED = f"{PEER} compiled"


def _decided(shape: tuple[int, ...], levels: tuple[int, ...], device: torch.device, dim: int) -> Tensor:
    """Return normal values whose bounded values are not close to a rounding boundary, so that all contenders agree."""
    z = normals(shape, device, 1)[0].movedim(dim, 0)
    b = ref.bound(z.double(), levels, "vqp")
    near = ((b - b.floor()) - 0.5).abs() < 1e-4
    return torch.where(near, z + 0.01, z).movedim(0, dim).contiguous()


def _problem(
    shape: tuple[int, ...], device: torch.device, *, levels: tuple[int, ...], backward: bool, dim: int
) -> Problem:
    z = _decided(shape, levels, device, dim)
    cotangents = normals(shape, device, 1) if backward else None

    def results(codes: Tensor, indices: Tensor | None) -> Outputs:
        return (codes,) if backward or indices is None else (codes, indices)

    def eager(z: Tensor) -> Outputs:
        codes, indices = ref.fsq(z.movedim(dim, 0), levels, variant="vqp")
        return results(codes.movedim(0, dim), indices)

    def op(z: Tensor, dim: int = dim) -> Outputs:
        # torch.compile leaves out indices that are not used
        return results(*pyflow.ops.fsq(z, levels, dim=dim, return_indices=not backward))

    def theirs() -> Callable[[Tensor], Outputs]:
        module = peer(PEER, "vector_quantize_pytorch").FSQ(list(levels)).to(device)
        # its input is (batch, tokens, channels) or images
        return lambda z: results(*module(z)) if z.dim() > 2 else results(*(t[0] for t in module(z[None])))

    peers, missing = available({PEER: theirs, PEER_COMPILED: lambda: compiled(theirs())})
    functions = {"eager": eager, "compile": compiled(eager), "pyflow": op} | peers
    calls = {name: bind(function, (z,), cotangents) for name, function in functions.items()}
    forms = {}
    if dim == 1:
        last = tuple(t.movedim(1, -1).contiguous() for t in (z, *(cotangents or ())))
        calls["pyflow channel last"] = bind(partial(op, dim=-1), last[:1], last[1:] or None)
        forms["pyflow channel last"] = lambda out: tuple(t.movedim(-1, 1) if t.dim() == 4 else t for t in out)
    # forward: z, codes, indices; backward also reads z and the gradient of codes and writes the gradient of z
    moved = 5 * z.nbytes if backward else 2 * z.nbytes + 4 * z.numel() // len(levels)
    truth = bind(eager, wide((z,)), cotangents and wide(cotangents))
    return Problem(calls, truth, moved, missing=missing, forms=forms)


def _case(
    what: str, shape: tuple[int, ...], tiny: tuple[int, ...], levels: tuple[int, ...], dim: int, backward: bool
) -> Case:
    beside = ("pyflow channel last",) if dim == 1 else ()
    return Case(
        f"fsq/{what} {'forward+backward' if backward else 'forward'}",
        partial(_problem, levels=levels, dim=dim, backward=backward),
        shape,
        tiny,
        contenders=("eager", "compile", PEER, PEER_COMPILED, "pyflow", *beside),
        peer=PEER,
        compare=tuple(("pyflow", name) for name in beside),
        quick=levels == LEVELS[0] and dim == -1,
        gpu=(1 << 24, 4) if levels == LEVELS[0] and shape[0] == TOKENS else None,
    )


CASES = [
    _case(what, shape, tiny, levels, dim, backward)
    for what, shape, tiny, levels, dim in [
        *(("-".join(map(str, n)), (TOKENS, len(n)), (9, len(n)), n, -1) for n in LEVELS),
        ("channel first", (64, 4, 128, 128), (2, 4, 3, 5), LEVELS[0], 1),
        ("256 tokens", (256, 4), (9, 4), LEVELS[0], -1),
    ]
    for backward in (False, True)
]


def _modules(shape: tuple[int, ...], device: torch.device, *, stages: int, backward: bool) -> Problem:
    """Residual stages as whole modules."""
    x = normals(shape, device, 1)[0]
    options: dict[str, Any] = {"levels": list(LEVELS[0]), "num_quantizers": stages}
    ours = pyflow.nn.ResidualFSQ(**options).to(device)
    cotangents = normals(shape, device, 1) if backward else None

    def of(module: torch.nn.Module) -> Callable[[Tensor], Outputs]:
        results = slice(0, 1) if backward else slice(0, 2)
        return lambda x: tuple(t[0] for t in module(x[None])[results])

    def eager(x: Tensor) -> Outputs:
        with pyflow.backend("reference"):
            return of(ours)(x)

    def theirs() -> Callable[[Tensor], Outputs]:
        return of(peer(PEER, "vector_quantize_pytorch").ResidualFSQ(**options).to(device))

    peers, missing = available({PEER: theirs, PEER_COMPILED: lambda: compiled(theirs())})
    functions = {"eager": eager, "pyflow": of(ours)} | peers
    calls = {name: bind(function, (x,), cotangents) for name, function in functions.items()}
    moved = 5 * x.nbytes if backward else 2 * x.nbytes + 4 * stages * shape[0]
    # compared with eager in float32: the last stages are finer than float32, so float64 gives other tokens
    return Problem(calls, calls["eager"], moved, missing=missing)


CASES += [
    Case(
        f"fsq/residual, 8 stages, {'forward+backward' if backward else 'forward'}",
        partial(_modules, stages=8, backward=backward),
        (1 << 18, 4),
        (5, 4),
        contenders=("eager", PEER, PEER_COMPILED, "pyflow"),
        peer=PEER,
        gpu=None if backward else (1 << 22, 4),
    )
    for backward in (False, True)
]
