"""SDEs defined by their marginals: rates by autograd, and exact transitions if alpha reaches 0."""

from __future__ import annotations

import numbers
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _checks as check
from .equations import SDE, Grid, Row, time_tensor

# alpha below this fraction of its maximum counts as 0: cos(pi / 2) rounds to 6e-17, in float32 to -4e-8
NOTHING = 1e-6
FALLS = "from_marginals: std / alpha must not fall as t grows"


# a constant may be a number
Function = Callable[[Tensor], Tensor | float] | float


class FromMarginals(SDE):
    def __init__(self, alpha: Function, std: Function) -> None:
        for name, function in (("alpha", alpha), ("std", std)):
            if not callable(function) and not isinstance(function, numbers.Real):
                got = type(function).__name__
                raise TypeError(f"from_marginals: {name} must be callable or a number, got {got}")
        self._alpha, self._std = alpha, std
        self._slopes_are_checked = False
        with torch.no_grad():
            self.prior_std = float(self._values(torch.ones((), dtype=torch.float64, device="cpu"))[1])
        check.positive("from_marginals", "std(1)", self.prior_std)

    def marginal(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        return self._values(time_tensor(t))

    def rates(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        self._check_slopes()
        t = time_tensor(t)
        # gradients may flow to the caller's t or to parameters of the schedule, not to the copy of t in _slopes
        keeps_graph = torch.is_grad_enabled() and (t.requires_grad or any(v.requires_grad for v in self._values(t)))
        with torch.inference_mode(False), torch.enable_grad():
            alpha, std, alpha_slope, std_slope = self._slopes(t)
            f = alpha_slope / alpha
            # alpha^2 d(std^2 / alpha^2)/dt without dividing by an alpha near 0
            g2, size = 2 * std * (std_slope - f * std), 2 * std * (std_slope.abs() + f.abs() * std)
            if not keeps_graph:
                f, g2 = f.detach(), g2.detach()
        if check.values_are_checked(g2) and bool((g2 < -1e-5 * size).any()):
            raise ValueError(FALLS)
        return f, g2.clamp_min(0)

    def grid(self, steps: int, eps: float) -> Grid:
        grid = Grid.of(steps, eps)
        alpha, _ = self.marginal(grid.times)
        if not bool(alpha.isfinite().all()):
            raise ValueError("from_marginals: alpha(t) must be finite")
        kept = alpha > NOTHING * alpha.abs().max()
        # index of the first time that is kept
        start = int(kept.long().cumsum(0).eq(0).sum())
        if start == steps:
            raise ValueError(
                f"from_marginals: steps must be large enough that alpha is above 0 at one of the times, got {steps}"
            )
        if not bool(kept[start:].all()):
            raise ValueError("from_marginals: alpha(t) must be positive for t below 1")
        return Grid(grid.times[start:], grid.index[start:])

    def last_time(self, eps: float) -> float:
        # the rates are unbounded where alpha reaches 0
        alpha, _ = self.marginal(torch.tensor([self.T, eps], dtype=torch.float64, device="cpu"))
        return self.T if bool(alpha[0] > NOTHING * alpha[1].abs()) else self.T - eps

    def euler_maruyama(self, grid: Grid) -> Row:
        if not self._begins_late(grid):
            return super().euler_maruyama(grid)
        ratio, variance, std, below = self._transitions(grid)
        return ratio, ratio * variance, below / std * variance.sqrt()

    def probability_flow(self, grid: Grid, predictor: str = "euler_maruyama") -> Row:
        if not self._begins_late(grid):
            return super().probability_flow(grid, predictor)
        ratio, _, std, below = self._transitions(grid)
        return ratio, std * (ratio * std - below), torch.zeros_like(std)

    def corrector_alpha(self, grid: Grid) -> Tensor:
        return self._transitions(grid)[0] ** -2 if self._begins_late(grid) else super().corrector_alpha(grid)

    def _begins_late(self, grid: Grid) -> bool:
        """Whether alpha reaches 0, where its rate is unbounded: the steps then are exact transitions."""
        return bool(grid.times[0] < self.T)

    def _transitions(self, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return alpha'/alpha, the variance added from t' to t, std and std'; t' is the next time, 0 after the last."""
        alpha, std = self.marginal(torch.cat((grid.times, grid.times.new_zeros(1))))
        alpha, lower, std, below = alpha[:-1], alpha[1:], std[:-1], std[1:]
        variance = std.square() - (alpha / lower * below).square()
        if bool((variance < -1e-5 * std.square()).any()):
            raise ValueError(FALLS)
        return lower / alpha, variance.clamp_min(0), std, below

    def _slopes(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return alpha, std and their derivatives at t."""
        if not t.requires_grad:
            t = t.clone().requires_grad_()
        alpha, std = self._values(t)
        return alpha, std, _slope(alpha, t), _slope(std, t)

    def _check_slopes(self) -> None:
        """Raise ValueError unless the derivatives integrate to the change of alpha and std.

        They do not for a table or for a function without a graph, which has derivatives of 0.
        """
        if self._slopes_are_checked:
            return
        with torch.inference_mode(False), torch.enable_grad():
            t = torch.linspace(0, 1, 514, dtype=torch.float64, device="cpu")[1:-1]
            alpha, std, *slopes = (part.detach() for part in self._slopes(t))
        for name, value, slope in zip(("alpha", "std"), (alpha, std), slopes, strict=True):
            grown, integral = value[-1] - value[0], torch.trapezoid(slope, t)
            if bool((integral - grown).abs() > 0.1 * (value.max() - value.min()) + 1e-6 * value.abs().max()):
                raise ValueError(
                    f"from_marginals: {name}(t) must be differentiable in t by torch, got a derivative whose integral "
                    f"is {integral:.3g} where {name} grows by {grown:.3g}"
                )
        self._slopes_are_checked = True

    def _values(self, t: Tensor) -> tuple[Tensor, Tensor]:
        values = []
        for name, function in (("alpha", self._alpha), ("std", self._std)):
            # a copy, since the function may change it in place
            value = function(t.clone()) if callable(function) else function
            if not isinstance(value, Tensor):
                value = torch.full_like(t, check.number("from_marginals", f"{name}(t)", value))
            if value.shape != t.shape:
                raise ValueError(f"from_marginals: {name}(t) must have the shape of t, got {tuple(value.shape)}")
            values.append(value.to(t))
        return values[0], values[1]

    def __repr__(self) -> str:
        return f"from_marginals({self._alpha!r}, {self._std!r})"


def from_marginals(alpha: Function, std: Function) -> SDE:
    """Return the SDE in which x_t given x_0 is normal with mean alpha(t) x_0 and standard deviation std(t).

    f = d log(alpha)/dt, g**2 = alpha**2 d(std**2 / alpha**2)/dt, both by autograd.

    Args:
        alpha, std: elementwise functions of a tensor t in [0, 1] that torch can differentiate, or numbers if constant;
            a function may also return a number. alpha > 0, except that alpha(1) may be 0, and std / alpha grows with t.

    Returns:
        An `SDE` with `marginal`, `rates`, `drift`, `diffusion` and `prior_sample`, for every method of `sample` except
        "ancestral"; its prior is N(0, std(1)**2).

    Raises:
        TypeError: alpha or std is neither callable nor a number.
        ValueError: a result does not have the shape of t; std / alpha falls; autograd does not give the
            derivatives, since torch records no graph (a table, `no_grad`, `detach`); found at their first use.
            Functions of NumPy and math raise errors of their own.

    Notes:
        `sample` calls the functions with float64 tensors on the CPU. If alpha reaches 0 (the cosine schedule, the
        straight line), `sample` skips the times with alpha 0 and starts at the next one with N(0, std**2). Its steps
        then are exact transitions from t to the next time t' < t, which need no derivatives: a = alpha'/alpha, b = a v,
        c = std'/std sqrt(v), with v = std**2 - (alpha std' / alpha')**2; for the probability flow
        b = a std**2 - std std' and c = 0.

    Source:
        Song et al. 2021, arXiv:2011.13456, appendix B, read backwards; Kingma et al. 2021, arXiv:2107.00630, eq. 2.

    Example:
        >>> sde = from_marginals(lambda t: torch.cos(1.5 * t), lambda t: torch.sin(1.5 * t))
        >>> [round(v.item(), 4) for v in sde.rates(0.5)]  # -1.5 tan, 3 tan
        [-1.3974, 2.7948]
    """
    return FromMarginals(alpha, std)


def _slope(value: Tensor, t: Tensor) -> Tensor:
    """Return the derivative of value in t, 0 if value does not depend on t."""
    if not value.requires_grad:
        return torch.zeros_like(t)
    slope = torch.autograd.grad(value.sum(), t, create_graph=True, allow_unused=True)[0]
    return torch.zeros_like(t) if slope is None else slope
