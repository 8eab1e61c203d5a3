"""Log-likelihood of a score model through its probability-flow ODE."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import _checks as check
from ..ops import uniform
from ..reference import compute_dtype
from ._score import Score
from .equations import SDE, seeds_for

DIVERGENCES = ("hutchinson", "exact")
# of torchdiffeq: those that choose their steps, and those that are told them
ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams")


def log_likelihood(
    sde: SDE,
    score_fn: Score,
    x: Tensor,
    *,
    divergence: str = "hutchinson",
    probes: int = 1,
    eps: float = 1e-5,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    solver: str = "dopri5",
    steps: int = 1000,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Log-density of x under the probability-flow ODE of a score.

    dx/dt = f x - g**2 score / 2 carries x at t = eps to the prior at t = 1, and
    log p(x) = log prior(x(1)) + integral of the divergence of dx/dt.

    Args:
        sde, score_fn: as for `pyflow.sde.sample`; score_fn must be differentiable in x. Both are asked for times in
            [eps, 1] only.
        x: (B, ...) float.
        divergence: "hutchinson", an unbiased estimate by random signs, one gradient per probe, or "exact", one
            gradient per element of a sample.
        probes: sign vectors per sample, the same at all times.
        eps: time that x is taken to be at, in (0, 1).
        rtol, atol: of the solvers that choose their steps: "dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun".
        solver: of `torchdiffeq.odeint`: one of these, or with fixed steps "euler", "midpoint", "heun2", "heun3", "rk4",
            "explicit_adams", "implicit_adams".
        steps: number of steps of the latter, of equal length.
        seed: of the signs, an integer or (B,) int64, as for `sample`.

    Returns:
        (B,) nats, float32 (float64 for float64 x), without a graph. `bits_per_dim` turns them into bits.

    Raises:
        ImportError: torchdiffeq is not installed.
        TypeError, ValueError: x is no float tensor with a batch dim, an unknown divergence, eps outside (0, 1), ...; a
            score that depends on x but keeps no graph to it, as under `no_grad`: its divergence cannot be had.
        FloatingPointError: the solver found no step, as where the score is not finite.

    Notes:
        The solver picks its steps for the batch as a whole, so a value depends on the batch within the tolerance. It
        may be called in inference mode. Of a schedule whose alpha(1) is 0, the prior is that of t = 1 - eps.

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
    check.at_least(op, "steps", steps, 1)
    check.choice(op, "solver", solver, ADAPTIVE + FIXED)
    if not 0 < check.number(op, "eps", eps) < sde.T:
        raise ValueError(f"{op}: eps must be in (0, {sde.T:g}), got {eps}")
    for name, value in (("rtol", rtol), ("atol", atol)):
        check.positive(op, name, value)
    if x.numel() == 0:
        return x.new_zeros(x.shape[0], dtype=compute_dtype(x.dtype))
    if check.values_are_checked(x) and not bool(x.isfinite().all()):
        raise ValueError(f"{op}: x must be finite, got other values")
    # out of inference mode, where no graph is recorded, and without a graph but that of the divergence
    with torch.inference_mode(False), torch.no_grad():
        x = x.clone() if x.is_inference() else x.detach()
        signs = () if exact else _signs(x, probes, seeds_for(op, x.shape[0], seed, x.device))
        return _solve(sde, score_fn, x, signs, eps, solver, rtol, atol, steps)


def _solve(
    sde: SDE,
    score_fn: Score,
    x: Tensor,
    signs: tuple[Tensor, ...],
    eps: float,
    solver: str,
    rtol: float,
    atol: float,
    steps: int,
) -> Tensor:
    odeint = _odeint()
    dtype, size = compute_dtype(x.dtype), x[0].numel()
    end = sde.last_time(eps)
    score_and_divergence = _Divergence(score_fn, signs)

    def slope(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        now, t = state[0], t.clamp(eps, end)
        f, g2 = (value.to(now) for value in sde.rates(t))
        score, divergence = score_and_divergence(now.to(x.dtype), t.float().expand(len(now)).clone())
        return f * now - 0.5 * g2 * score.to(dtype), f * size - 0.5 * g2 * divergence.to(dtype)

    start = x.to(dtype), x.new_zeros(x.shape[0], dtype=dtype)
    times = torch.tensor([eps, end], dtype=torch.float64, device=x.device)
    # an adaptive solver would step beyond the end and interpolate, one of fixed steps take a single one
    options = {"step_t": times[1:]} if solver in ADAPTIVE else {"step_size": (end - eps) / steps}
    try:
        final, change = odeint(slope, start, times, rtol=rtol, atol=atol, method=solver, options=options)
    except AssertionError as error:
        raise FloatingPointError(
            f"log_likelihood: {solver} found no step; the score must be finite and smooth, got {error}"
        ) from error
    prior_std = sde.prior_std if end == sde.T else sde.marginal(times[1])[1].to(dtype)
    z = final[-1].reshape(len(x), -1) / prior_std
    prior = -0.5 * z.square().sum(1) - size * (0.5 * math.log(2 * math.pi) + math.log(prior_std))
    return prior + change[-1]


class _Divergence:
    """The score, and per sample the trace of its Jacobian: exact without signs, else averaged over them."""

    def __init__(self, score_fn: Score, signs: tuple[Tensor, ...]) -> None:
        self.score_fn, self.signs, self.is_constant = score_fn, signs, False

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            # not the leaf itself, which must not be changed in place
            score = self.score_fn(leaf.clone(), t.clone())
        check.float_tensor("log_likelihood", "the score", score)
        if score.shape != x.shape:
            raise ValueError(
                f"log_likelihood: score_fn must return the shape of x, {tuple(x.shape)}, got {tuple(score.shape)}"
            )
        trace = self._trace(score, leaf) if score.requires_grad else None
        score = score.detach()
        if trace is None:
            self._check_constant(x, t, score)
            trace = x.new_zeros(x.shape[0], dtype=compute_dtype(x.dtype))
        return score, trace

    def _trace(self, score: Tensor, leaf: Tensor) -> Tensor | None:
        """None where no graph leads to the leaf."""
        trace = leaf.new_zeros(leaf.shape[0], dtype=compute_dtype(leaf.dtype))
        for probe in self.signs or _units(leaf):
            grad = torch.autograd.grad(score, leaf, probe.to(score.dtype), retain_graph=True, allow_unused=True)[0]
            if grad is None:
                return None
            trace += (grad * probe).reshape(len(trace), -1).sum(1, dtype=trace.dtype)
        return trace / max(len(self.signs), 1)

    def _check_constant(self, x: Tensor, t: Tensor, score: Tensor) -> None:
        """A score without a graph to x has divergence 0 only if it is the same elsewhere."""
        if not self.is_constant:
            elsewhere = self.score_fn(1.37 * x + 0.71, t.clone())
            if not torch.equal(elsewhere, score):
                raise ValueError(
                    "log_likelihood: score_fn must keep the graph from x to the score, got a score without one, as "
                    "under no_grad or detach"
                )
            self.is_constant = True


def _units(x: Tensor) -> Iterator[Tensor]:
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
