"""Log-likelihood of a score model through its probability-flow ODE."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _checks as check
from ..ops import uniform
from ..reference import compute_dtype
from .equations import SDE, seeds_for

DIVERGENCES = ("hutchinson", "exact")


def log_likelihood(
    sde: SDE,
    score_fn: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    *,
    divergence: str = "hutchinson",
    probes: int = 1,
    eps: float = 1e-5,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    solver: str = "dopri5",
    seed: int | Tensor | None = None,
) -> Tensor:
    """Log-density of x under the probability-flow ODE of a score.

    dx/dt = f x - g**2 score / 2 carries x at t = eps to the prior at t = 1, and
    log p(x) = log prior(x(1)) + integral of the divergence of dx/dt.

    Args:
        sde, score_fn: as for `pyflow.sde.sample`; score_fn must be differentiable.
        x: (B, ...) float.
        divergence: "hutchinson", an unbiased estimate by random signs, one gradient per probe, or "exact", one
            gradient per element of a sample.
        probes: sign vectors per sample, the same at all times.
        eps: time that x is taken to be at, in (0, 1).
        rtol, atol, solver: of `torchdiffeq.odeint`.
        seed: of the signs, an integer or (B,) int64, as for `sample`.

    Returns:
        (B,) nats, float32 (float64 for float64 x), without a graph. `bits_per_dim` turns them into bits.

    Raises:
        ImportError: torchdiffeq is not installed.
        TypeError, ValueError: x is no float tensor with a batch dim, an unknown divergence, eps outside (0, 1), ...

    Notes:
        The solver picks its steps for the batch as a whole, so a value depends on the batch within the tolerance.

    Source:
        Song et al. 2021, arXiv:2011.13456, section 4.3 and appendix D.2; Skilling 1989 and Hutchinson 1990.

    Example:
        >>> import pyflow
        >>> sde = pyflow.sde.VPSDE()
        >>> nats = log_likelihood(sde, lambda x, t: -x, torch.zeros(1, 2), divergence="exact")
        >>> round(nats.item(), 3), round(-math.log(2 * math.pi), 3)
        (-1.838, -1.838)
    """
    op = "log_likelihood"
    if not isinstance(sde, SDE):
        raise TypeError(f"{op}: sde must be a pyflow.sde.SDE, got {type(sde).__name__}")
    if not callable(score_fn):
        raise TypeError(f"{op}: score_fn must be callable, got {type(score_fn).__name__}")
    check.float_tensor(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dim, the batch, got a scalar")
    exact = check.choice(op, "divergence", divergence, DIVERGENCES) == 1
    check.at_least(op, "probes", probes, 1)
    if not 0 < check.number(op, "eps", eps) < sde.T:
        raise ValueError(f"{op}: eps must be in (0, {sde.T:g}), got {eps}")
    for name, value in (("rtol", rtol), ("atol", atol)):
        check.positive(op, name, value)
    if x.numel() == 0:
        return x.new_zeros(x.shape[0], dtype=compute_dtype(x.dtype))
    signs = () if exact else _signs(x, probes, seeds_for(op, x.shape[0], seed, x.device))
    return _solve(sde, score_fn, x, signs, eps, solver, rtol, atol)


@torch.no_grad()
def _solve(sde, score_fn, x, signs, eps, solver, rtol, atol) -> Tensor:
    odeint = _odeint()
    dtype, size = compute_dtype(x.dtype), x[0].numel()

    def slope(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        now = state[0]
        f, g2 = (value.to(now) for value in sde.rates(t))
        score, divergence = _score_and_divergence(score_fn, now.to(x.dtype), t.float().repeat(len(now)), signs)
        return f * now - 0.5 * g2 * score.to(dtype), f * size - 0.5 * g2 * divergence.to(dtype)

    start = x.to(dtype), x.new_zeros(x.shape[0], dtype=dtype)
    times = torch.tensor([eps, sde.T], dtype=dtype, device=x.device)
    end, change = odeint(slope, start, times, rtol=rtol, atol=atol, method=solver)
    z = end[-1].flatten(1) / sde.prior_std
    prior = -0.5 * z.square().sum(1) - size * (0.5 * math.log(2 * math.pi) + math.log(sde.prior_std))
    return prior + change[-1]


def _score_and_divergence(score_fn, x: Tensor, t: Tensor, signs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The score, and per sample the trace of its Jacobian: exact without signs, else averaged over them."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        score = score_fn(x, t)
    if score.shape != x.shape:
        raise ValueError(
            f"log_likelihood: score_fn must return the shape of x, {tuple(x.shape)}, got {tuple(score.shape)}"
        )
    trace = x.new_zeros(x.shape[0], dtype=compute_dtype(x.dtype))
    if not score.requires_grad:
        return score, trace
    for probe in signs or _units(x):
        grad = torch.autograd.grad(score, x, probe.to(score.dtype), retain_graph=True, allow_unused=True)[0]
        if grad is not None:
            trace += (grad * probe).flatten(1).sum(1, dtype=trace.dtype)
    return score.detach(), trace / max(len(signs), 1)


def _units(x: Tensor):
    """Each unit vector of a sample, for all samples at once."""
    for i in range(x[0].numel()):
        unit = torch.zeros_like(x, memory_format=torch.contiguous_format)
        unit.view(len(x), -1)[:, i] = 1
        yield unit


def _signs(x: Tensor, probes: int, seeds: Tensor) -> tuple[Tensor, ...]:
    draws = (uniform(x.shape, seed=seeds, step=i, purpose="monte_carlo") for i in range(probes))
    return tuple(torch.where(u < 0.5, -1.0, 1.0).to(x.dtype) for u in draws)


def _odeint() -> Callable:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError("log_likelihood: needs the package torchdiffeq (pip install torchdiffeq)") from error
    return odeint
