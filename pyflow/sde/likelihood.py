"""Log-likelihood of a score model by its probability-flow ODE."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import _checks as check
from ..ops import uniform
from ..reference import compute_dtype
from ._plan import check_model
from ._score import Score
from .equations import SDE, seeds_for

DIVERGENCES = ("hutchinson", "exact")
# solvers of torchdiffeq with adaptive and with fixed steps
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
    """Return the log-density of x under the probability-flow ODE of a score.

    dx/dt = f x - g**2 score / 2 carries x at t = eps to the prior at t = 1, and
    log p(x) = log prior(x(1)) + integral of the divergence of dx/dt.

    Args:
        sde, score_fn: as for `pyflow.sde.sample`; score_fn must be differentiable in x. Both are evaluated
            at times in [eps, 1] only.
        x: (B, ...), any float dtype.
        divergence: "hutchinson", an unbiased estimate from random signs that costs one gradient per probe, or "exact",
            which costs one gradient per element of a sample.
        probes: number of sign vectors per sample; all times share them.
        eps: time at which the ODE starts from x, in (0, 1).
        rtol, atol: tolerances of the solvers with adaptive steps.
        solver: method of `torchdiffeq.odeint`; with adaptive steps "dopri5", "dopri8", "bosh3", "fehlberg2" or
            "adaptive_heun", with fixed steps "euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams" or
            "implicit_adams".
        steps: number of steps of the solvers with fixed steps, all of the same length.
        seed: seed of the signs, an integer or (B,) int64, as for `sample`.

    Returns:
        (B,) nats, float32 (float64 for float64 x), without a graph. `bits_per_dim` converts them to bits.

    Raises:
        ImportError: torchdiffeq is not installed.
        TypeError, ValueError: x is not a float tensor with a batch dim, unknown divergence, eps outside (0, 1), ...; a
            score that depends on x but has no graph to it, for example under `no_grad`: it has no divergence.
        FloatingPointError: the solver finds no step, for example because the score is not finite.

    Notes:
        An adaptive solver chooses its steps for the whole batch, so a value depends on the batch, within the tolerance.
        Works in inference mode too. For a schedule with alpha(1) = 0 the ODE ends at t = 1 - eps, with N(0, std**2) of
        that time as the prior.

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
    check_model(op, sde, score_fn, eps)
    check.float_tensor(op, "x", x)
    check.batch(op, "x", x)
    exact = check.choice(op, "divergence", divergence, DIVERGENCES) == 1
    check.at_least(op, "probes", probes, 1)
    check.at_least(op, "steps", steps, 1)
    check.choice(op, "solver", solver, ADAPTIVE + FIXED)
    eps = float(eps)
    if not eps < (end := sde.last_time(eps)):
        raise ValueError(f"{op}: eps must be below the time at which the ODE ends, {end:g}, got {eps}")
    for name, value in (("rtol", rtol), ("atol", atol)):
        check.positive(op, name, value)
    if x.numel() == 0:
        return x.new_zeros(x.shape[0], dtype=compute_dtype(x.dtype))
    if x.is_meta:
        raise ValueError(f"{op}: x must have values, on which the solver chooses its steps, got a meta tensor")
    if check.values_are_checked(x) and not bool(x.isfinite().all()):
        raise ValueError(f"{op}: x must be finite, got other values")
    # inference mode records no graph, and the divergence needs one; nothing else does
    with torch.inference_mode(False), torch.no_grad():
        x = x.clone() if x.is_inference() else x.detach()
        signs = () if exact else _signs(x, probes, seeds_for(op, x.shape[0], seed, x.device))
        return _solve(sde, score_fn, x, signs, (eps, end), solver, rtol, atol, steps)


def _solve(
    sde: SDE,
    score_fn: Score,
    x: Tensor,
    signs: tuple[Tensor, ...],
    ends: tuple[float, float],
    solver: str,
    rtol: float,
    atol: float,
    steps: int,
) -> Tensor:
    odeint = _odeint()
    dtype, size, (eps, end) = compute_dtype(x.dtype), x[0].numel(), ends
    score_and_divergence = _Divergence(score_fn, signs)

    def slope(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        now, t = state[0], t.clamp(eps, end)
        f, g2 = (value.to(now) for value in sde.rates(t))
        score, divergence = score_and_divergence(now.to(x.dtype), t.float().expand(len(now)).clone())
        return f * now - 0.5 * g2 * score.to(dtype), f * size - 0.5 * g2 * divergence.to(dtype)

    start = x.to(dtype), x.new_zeros(x.shape[0], dtype=dtype)
    times = torch.tensor([eps, end], dtype=torch.float64, device=x.device)
    # without these options an adaptive solver steps beyond the end and interpolates, and a fixed one takes one step
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
    """The score and, per sample, the trace of its Jacobian: exact without signs, else the mean over the signs."""

    def __init__(self, score_fn: Score, signs: tuple[Tensor, ...]) -> None:
        self.score_fn, self.signs, self.is_constant = score_fn, signs, False

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            # a clone, because score_fn may write in place and a leaf must not be changed
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
        """Return the trace, or None if the score has no graph to the leaf."""
        trace = leaf.new_zeros(leaf.shape[0], dtype=compute_dtype(leaf.dtype))
        for probe in self.signs or _units(leaf):
            grad = torch.autograd.grad(score, leaf, probe.to(score.dtype), retain_graph=True, allow_unused=True)[0]
            if grad is None:
                return None
            trace += (grad * probe).reshape(len(trace), -1).sum(1, dtype=trace.dtype)
        return trace / max(len(self.signs), 1)

    def _check_constant(self, x: Tensor, t: Tensor, score: Tensor) -> None:
        """Raise ValueError if a score without a graph to x still depends on x; otherwise its divergence is 0."""
        if not self.is_constant:
            elsewhere = self.score_fn(1.37 * x + 0.71, t.clone())
            if not torch.equal(elsewhere, score):
                raise ValueError(
                    "log_likelihood: score_fn must keep the graph from x to the score, got a score without one, as "
                    "under no_grad or detach"
                )
            self.is_constant = True


def _units(x: Tensor) -> Iterator[Tensor]:
    """Yield each unit vector of a sample, repeated over the batch."""
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
