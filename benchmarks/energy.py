"""Cases of energies: Metropolis-adjusted Langevin (MALA) steps on (4096, 128) chains, and the gradient penalty.

"mala step" gets the energy and gradient of the proposal as inputs, so only pyflow's operations are measured; another
case evaluates a quadratic energy. Each contender draws its own noise: eager torch is checked by the mean squares of its
results, pyflow value by value.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import pyflow
from pyflow.reference import energy as ref

from .registry import Call, Case, Outputs, Problem, bind, compiled, normals, wide

SEED, STEP, ALPHA = 5, 7, 0.01


def _propose(z: Tensor, grad: Tensor) -> Tensor:
    return z - ALPHA * grad + math.sqrt(2 * ALPHA) * torch.randn_like(z)


def _accept(
    z: Tensor, new: Tensor, u: Tensor, u_new: Tensor, grad: Tensor, grad_new: Tensor, log_uniforms: Tensor
) -> Outputs:
    """Accept or reject proposals in plain torch: two norms and three selections."""
    there = (new - z + ALPHA * grad).square().sum(1)
    back = (z - new + ALPHA * grad_new).square().sum(1)
    accepted = log_uniforms < u - u_new + (there - back) / (4 * ALPHA)
    of_row = accepted[:, None]
    return torch.where(of_row, new, z), torch.where(accepted, u_new, u), torch.where(of_row, grad_new, grad)


def _log_uniforms(like: Tensor) -> Tensor:
    return torch.rand(like.shape[0], device=like.device).log()


def _chain(shape: tuple[int, ...], device: torch.device) -> Outputs:
    """Return z, z', u, u', grad, grad' where half of the chains always accept and the other half always reject."""
    z, noise, grad = normals(shape, device, 3)
    new = z - ALPHA * grad + math.sqrt(2 * ALPHA) * noise
    (u,) = normals(shape[:1], device, 1)
    jump = torch.where(torch.arange(shape[0], device=device) % 2 == 0, -1e4, 1e4)
    return z, new, u, u + jump, grad, grad + 0.1 * noise


def _accept_problem(shape: tuple[int, ...], device: torch.device) -> Problem:
    args = _chain(shape, device)

    def eager(z: Tensor, new: Tensor, u: Tensor, u_new: Tensor, grad: Tensor, grad_new: Tensor) -> Outputs:
        return _accept(z, new, u, u_new, grad, grad_new, _log_uniforms(z))

    def op(z: Tensor, new: Tensor, u: Tensor, u_new: Tensor, grad: Tensor, grad_new: Tensor) -> Outputs:
        return pyflow.ops.mala_accept(z, new, u, u_new, grad, grad_new, ALPHA, seed=SEED, step=STEP)[:3]

    calls = {n: bind(f, args) for n, f in (("eager", eager), ("compile", compiled(eager)), ("pyflow", op))}
    # reads z, z', grad, grad' and writes two tensors
    return Problem(calls, bind(eager, wide(args)), 6 * args[0].nbytes)


def _size(result: Outputs) -> Outputs:
    """Return the mean squares of a result, which hardly depend on the noise."""
    return tuple(v.double().square().mean()[None] for v in result)


def _step_problem(shape: tuple[int, ...], device: torch.device, *, quadratic: bool) -> Problem:
    """Propose and accept; with `quadratic` the energy U = |z|^2 / 2 is evaluated in between."""
    args = _chain(shape, device)
    z, _, u, u_new, grad, grad_new = args
    if quadratic:
        z, grad = args[0], args[0]
        u = z.square().sum(1) / 2

    def energy(new: Tensor) -> tuple[Tensor, Tensor]:
        return (new.square().sum(1) / 2, new) if quadratic else (u_new, grad_new)

    def eager(z: Tensor, u: Tensor, grad: Tensor) -> Outputs:
        new = _propose(z, grad)
        u_new, grad_new = energy(new)
        return _accept(z, new, u, u_new, grad, grad_new, _log_uniforms(z))

    def op(z: Tensor, u: Tensor, grad: Tensor) -> Outputs:
        new = pyflow.ops.mala_propose(z, grad, ALPHA, seed=SEED, step=STEP)
        u_new, grad_new = energy(new)
        return pyflow.ops.mala_accept(z, new, u, u_new, grad, grad_new, ALPHA, seed=SEED, step=STEP)[:3]

    def exact() -> Outputs:
        new = pyflow.ops.mala_propose(z, grad, ALPHA, seed=SEED, step=STEP).double()
        u_new, grad_new = (v.double() for v in energy(new))
        seed, step = (torch.tensor(v, device=device) for v in (SEED, STEP))
        log_uniforms = ref.log_uniforms(shape[0], seed, step)
        return _accept(z.double(), new, u.double(), u_new, grad.double(), grad_new, log_uniforms)

    calls = {n: bind(f, (z, u, grad)) for n, f in (("eager", eager), ("compile", compiled(eager)), ("pyflow", op))}
    truths: dict[str, Call] = defaultdict(lambda: exact)
    for name in ("eager", "compile"):
        truths[name] = lambda: _size(exact())
    # propose: z, grad -> z'; accept: reads z, z', grad, grad', writes two tensors
    forms = dict.fromkeys(("eager", "compile"), _size)
    return Problem(calls, truths, (3 + 6) * z.nbytes, forms=forms, tolerance=0.05)


def _penalty_problem(shape: tuple[int, ...], device: torch.device, *, backward: bool) -> Problem:
    (grad,) = normals(shape, device, 1)
    cotangents = normals(shape[:1], device, 1) if backward else None

    def eager(grad: Tensor) -> Outputs:
        return (ref.grad_norm_penalty(grad),)

    def op(grad: Tensor) -> Outputs:
        return (pyflow.ops.grad_norm_penalty(grad),)

    functions = {"eager": eager, "compile": compiled(eager), "pyflow": op}
    calls = {name: bind(function, (grad,), cotangents) for name, function in functions.items()}
    truth = bind(eager, wide((grad,)), cotangents and wide(cotangents))
    return Problem(calls, truth, (1 + 2 * backward) * grad.nbytes)


def _case(name: str, build: Callable[..., Problem], shape: tuple[int, ...] = (4096, 128), **more: Any) -> Case:
    return Case(f"energy/{name}", build, shape, (64, 10), **more)


CASES = [
    _case("mala step", partial(_step_problem, quadratic=False), quick=True, gpu=(65536, 1024)),
    _case("mala step, quadratic energy", partial(_step_problem, quadratic=True)),
    _case("mala accept", _accept_problem),
    _case("gradient penalty", partial(_penalty_problem, backward=False), (256, 49152)),
    _case("gradient penalty forward+backward", partial(_penalty_problem, backward=True), (256, 49152), quick=True),
]
