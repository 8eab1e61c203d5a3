"""Forward SDEs dx = f(t) x dt + g(t) dw on t in [0, 1], and the rows of numbers their reverse steps take.

x_t given x_0 is normal with mean alpha(t) x_0 and standard deviation std(t). Nothing here depends on x but `drift`
and `prior_sample`; what is given in float64 is computed in float64.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks as check
from ..ops import normal, sample_seeds
from ..ops.noise import seed_tensor

# a reverse step is x' = a x + b score + c z
Row = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Grid:
    """Times of the steps, from 1 down to eps, and their places in the discrete tables of as many entries."""

    times: Tensor
    index: Tensor

    @classmethod
    def of(cls, steps: int, eps: float) -> Grid:
        # floor(t (N - 1)) written so that rounding of t cannot move it
        k = torch.arange(steps, device="cpu")
        index = steps - 1 - k + (k.double() * eps).floor().long()
        return cls(torch.linspace(1, eps, steps, dtype=torch.float64, device="cpu"), index)

    @property
    def steps(self) -> int:
        return len(self.times)

    def spread(self) -> Tensor:
        """i / (N - 1) of every table entry; a table of one entry holds the upper end."""
        return torch.linspace(1, 0, self.steps, dtype=torch.float64, device="cpu").flip(0)


class SDE:
    """What every SDE offers; a subclass gives `marginal` and `rates`, and its discrete tables where it has any."""

    T = 1.0
    prior_std = 1.0

    def marginal(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, std) of x_t given x_0, in the shape of t."""
        raise NotImplementedError

    def rates(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """(f, g squared) with f the factor of x in the drift, in the shape of t."""
        raise NotImplementedError

    def grid(self, steps: int, eps: float) -> Grid:
        """The times that a sampler steps from."""
        return Grid.of(steps, eps)

    def last_time(self, eps: float) -> float:
        """Where the ODE that carries data to the prior ends."""
        return self.T

    def drift(self, x: Tensor, t: float | Tensor) -> Tensor:
        """f(t) x, for t of a number or (B,)."""
        check.float_tensor("drift", "x", x)
        f, _ = self.rates(_time(t, x.device))
        f = f.to(x.device).reshape(f.shape + (1,) * (x.dim() - f.dim()))
        if f.dim() > x.dim() or any(m not in (1, n) for m, n in zip(f.shape, x.shape)):
            raise ValueError(f"drift: t must have the shape () or {tuple(x.shape[:1])}, got {tuple(t.shape)}")
        return (f * x).to(x.dtype)

    def diffusion(self, t: float | Tensor) -> Tensor:
        """g(t)."""
        return self.rates(t)[1].sqrt()

    def prior_sample(
        self,
        shape: Sequence[int],
        seed: int | Tensor | None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """x at t = 1: normal with mean 0 and standard deviation `prior_std`.

        An integer seed goes through `pyflow.ops.sample_seeds`; (B,) seeds are the samples' own.
        """
        op = "prior_sample"
        shape, dtype = check.batch_shape(op, shape), check.float_dtype(op, dtype)
        seed = seeds_for(op, shape[0], seed, device)
        return normal(shape, seed=seed, purpose="prior").mul_(self.prior_std).to(dtype)

    def euler_maruyama(self, grid: Grid) -> Row:
        f, g2 = self.rates(grid.times)
        variance = g2 / grid.steps
        return 1 - f / grid.steps, variance, variance.sqrt()

    def reverse_diffusion(self, grid: Grid) -> Row:
        return self.euler_maruyama(grid)

    def ancestral(self, grid: Grid) -> Row:
        raise ValueError(f"{type(self).__name__}: ancestral sampling is defined for VPSDE and VESDE only")

    def probability_flow(self, grid: Grid, predictor: str = "euler_maruyama") -> Row:
        """The rows of `predictor` without noise, which takes half of the score's term."""
        a, b, c = getattr(self, predictor)(grid)
        return a, b / 2, torch.zeros_like(c)

    def corrector_alpha(self, grid: Grid) -> Tensor:
        """The square of what one step's drift multiplies x by."""
        return torch.exp(2 * self.rates(grid.times)[0] / grid.steps)


class _LinearBeta(SDE):
    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        name = type(self).__name__
        self.beta_min = check.positive(name, "beta_min", beta_min)
        self.beta_max = check.number(name, "beta_max", beta_max)
        if not self.beta_min <= self.beta_max < math.inf:
            raise ValueError(f"{name}: beta_max must be finite and at least beta_min, {beta_min}, got {beta_max}")

    def beta(self, t: float | Tensor) -> Tensor:
        return self.beta_min + _time(t) * (self.beta_max - self.beta_min)

    def log_alpha(self, t: float | Tensor) -> Tensor:
        t = _time(t)
        return -0.25 * t * t * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def corrector_alpha(self, grid: Grid) -> Tensor:
        return 1 - self._betas(grid)

    def _betas(self, grid: Grid) -> Tensor:
        if grid.steps <= self.beta_max:
            raise ValueError(
                f"{type(self).__name__}: steps must be more than beta_max, {self.beta_max:g}, for a discrete table "
                f"with every beta_i below 1, got {grid.steps}"
            )
        table = self.beta_min + grid.spread() * (self.beta_max - self.beta_min)
        return table[grid.index] / grid.steps

    def __repr__(self) -> str:
        return f"{type(self).__name__}(beta_min={self.beta_min:g}, beta_max={self.beta_max:g})"


class VPSDE(_LinearBeta):
    """Variance-preserving SDE with linear beta.

    dx = -beta x / 2 dt + sqrt(beta) dw, log alpha = -t**2 (beta_max - beta_min) / 4 - t beta_min / 2,
    std = sqrt(1 - alpha**2).

    Args:
        beta_min, beta_max: beta at t = 0 and t = 1.

    Raises:
        ValueError: beta_min not positive, or beta_max below it.

    Notes:
        std comes from expm1: the plain difference is 1 % off at t = 1e-5 in float32. Discrete methods need more
        than beta_max steps.

    Source:
        Song et al. 2021, arXiv:2011.13456, section 3.4 and appendices B and C.

    Example:
        >>> alpha, std = VPSDE().marginal(0.5)
        >>> round(alpha.item(), 4), round(std.item(), 4)
        (0.2812, 0.9597)
    """

    def marginal(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = self.log_alpha(t)
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def rates(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        beta = self.beta(t)
        return -0.5 * beta, beta

    def reverse_diffusion(self, grid: Grid) -> Row:
        beta = self._betas(grid)
        return 2 - (1 - beta).sqrt(), beta, beta.sqrt()

    def ancestral(self, grid: Grid) -> Row:
        beta = self._betas(grid)
        root = (1 - beta).sqrt()
        return 1 / root, beta / root, beta.sqrt()


class SubVPSDE(_LinearBeta):
    """Sub-variance-preserving SDE with linear beta: alpha as VPSDE, std its square.

    dx = -beta x / 2 dt + g dw, g**2 = beta (1 - alpha**4), std = 1 - alpha**2.

    Args:
        beta_min, beta_max: beta at t = 0 and t = 1.

    Raises:
        ValueError: beta_min not positive, or beta_max below it.

    Notes:
        Reverse diffusion is Euler-Maruyama; ancestral sampling is not defined.

    Source:
        Song et al. 2021, arXiv:2011.13456, section 3.4 and appendix B.

    Example:
        >>> SubVPSDE().marginal(0.5)[1].item() < VPSDE().marginal(0.5)[1].item()
        True
    """

    def marginal(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = self.log_alpha(t)
        return log_alpha.exp(), -torch.expm1(2 * log_alpha)

    def rates(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        beta = self.beta(t)
        return -0.5 * beta, -beta * torch.expm1(4 * self.log_alpha(t))


class VESDE(SDE):
    """Variance-exploding SDE: noise is added, x is not shrunk.

    dx = g dw, g = sigma sqrt(2 log(sigma_max / sigma_min)), std = sigma = sigma_min (sigma_max / sigma_min)**t.

    Args:
        sigma_min, sigma_max: std at t = 0 and t = 1, the latter about the largest distance between two data.

    Raises:
        ValueError: sigma_min not positive, or sigma_max not above it.

    Source:
        Song et al. 2021, arXiv:2011.13456, section 3.4 and appendices B and C.

    Example:
        >>> [round(v.item(), 4) for v in VESDE().marginal(0.5)]
        [1.0, 0.7071]
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        self.sigma_min = check.positive("VESDE", "sigma_min", sigma_min)
        self.sigma_max = check.number("VESDE", "sigma_max", sigma_max)
        if not self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"VESDE: sigma_max must be finite and above sigma_min, {sigma_min}, got {sigma_max}")
        self.prior_std = self.sigma_max
        self._growth = math.log(self.sigma_max / self.sigma_min)

    def sigma(self, t: float | Tensor) -> Tensor:
        return self.sigma_min * torch.exp(_time(t) * self._growth)

    def marginal(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.sigma(t)
        return torch.ones_like(sigma), sigma

    def rates(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.sigma(t)
        return torch.zeros_like(sigma), 2 * self._growth * sigma.square()

    def reverse_diffusion(self, grid: Grid) -> Row:
        here, below = self._variances(grid)
        return torch.ones_like(here), here - below, (here - below).sqrt()

    def ancestral(self, grid: Grid) -> Row:
        here, below = self._variances(grid)
        return torch.ones_like(here), here - below, (below * (here - below) / here).sqrt()

    def corrector_alpha(self, grid: Grid) -> Tensor:
        return torch.ones_like(grid.times)

    def _variances(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """sigma_i squared and sigma_{i-1} squared, which is 0 at the end."""
        table = self.sigma(grid.spread()).square()
        below = torch.cat((table.new_zeros(1), table[:-1]))
        return table[grid.index], below[grid.index]

    def __repr__(self) -> str:
        return f"VESDE(sigma_min={self.sigma_min:g}, sigma_max={self.sigma_max:g})"


# an alpha of this part of the largest is 0: rounding leaves cos(pi / 2) at 6e-17, in float32 at -4e-8
NOTHING = 1e-6
FALLS = "from_marginals: std / alpha must not fall as t grows"


class _FromMarginals(SDE):
    def __init__(self, alpha: Callable[[Tensor], Tensor], std: Callable[[Tensor], Tensor]) -> None:
        for name, function in (("alpha", alpha), ("std", std)):
            if not callable(function):
                raise TypeError(f"from_marginals: {name} must be callable, got {type(function).__name__}")
        self._alpha, self._std = alpha, std
        self._slopes_are_checked = False
        with torch.no_grad():
            self.prior_std = float(self._values(torch.ones((), dtype=torch.float64, device="cpu"))[1])
        check.positive("from_marginals", "std(1)", self.prior_std)

    def marginal(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        return self._values(_time(t))

    def rates(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        self._check_slopes()
        t, keeps_graph = _time(t), torch.is_grad_enabled()
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
        # times before the first one that is kept
        start = int(kept.long().cumsum(0).eq(0).sum())
        if start == steps:
            raise ValueError(
                f"from_marginals: steps must be so many that alpha is above 0 at one of their times, got {steps}"
            )
        if not bool(kept[start:].all()):
            raise ValueError("from_marginals: alpha(t) must be positive for t below 1")
        return Grid(grid.times[start:], grid.index[start:])

    def last_time(self, eps: float) -> float:
        # rates have no bound where alpha reaches 0
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
        """Whether alpha reaches 0: its rate has no bound there, and steps take exact transitions instead."""
        return bool(grid.times[0] < self.T)

    def _transitions(self, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha'/alpha, the variance that x gains on the way up, std and std'; a prime is the time below, 0 at last."""
        alpha, std = self.marginal(torch.cat((grid.times, grid.times.new_zeros(1))))
        alpha, lower, std, below = alpha[:-1], alpha[1:], std[:-1], std[1:]
        variance = std.square() - (alpha / lower * below).square()
        if bool((variance < -1e-5 * std.square()).any()):
            raise ValueError(FALLS)
        return lower / alpha, variance.clamp_min(0), std, below

    def _slopes(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, std and their derivatives at t."""
        if not t.requires_grad:
            t = t.clone().requires_grad_()
        alpha, std = self._values(t)
        return alpha, std, _slope(alpha, t), _slope(std, t)

    def _check_slopes(self) -> None:
        """Their integrals are what the functions grow by; a table or a function without a graph has slopes of 0."""
        if self._slopes_are_checked:
            return
        with torch.inference_mode(False), torch.enable_grad():
            t = torch.linspace(0, 1, 514, dtype=torch.float64, device="cpu")[1:-1]
            alpha, std, *slopes = (part.detach() for part in self._slopes(t))
        for name, value, slope in zip(("alpha", "std"), (alpha, std), slopes):
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
            # a tensor of its own: a function may change it in place
            value = function(t.clone())
            if not isinstance(value, Tensor):
                value = torch.full_like(t, check.number("from_marginals", f"{name}(t)", value))
            if value.shape != t.shape:
                raise ValueError(f"from_marginals: {name}(t) must have the shape of t, got {tuple(value.shape)}")
            values.append(value.to(t))
        return values[0], values[1]

    def __repr__(self) -> str:
        return f"from_marginals({self._alpha!r}, {self._std!r})"

def from_marginals(alpha: Callable[[Tensor], Tensor], std: Callable[[Tensor], Tensor]) -> SDE:
    """The SDE whose x_t given x_0 is normal with mean alpha(t) x_0 and standard deviation std(t).

    f = d log(alpha)/dt, g**2 = alpha**2 d(std**2 / alpha**2)/dt, both by autograd.

    Args:
        alpha, std: functions of a tensor t in [0, 1], elementwise and differentiable by torch; alpha > 0 but at t = 1,
            where it may be 0, and std / alpha grows with t. A constant may be a number.

    Returns:
        An `SDE` with `marginal`, `rates`, `drift`, `diffusion`, `prior_sample` and every method of `sample` but
        ancestral; its prior is N(0, std(1)**2).

    Raises:
        TypeError: alpha or std is not callable.
        ValueError: a result of another shape than t; std / alpha falls; at the first use of derivatives: they are not
            those of the functions, as where torch records no graph (a table, `no_grad`, NumPy, `detach`).

    Notes:
        The functions are given float64 tensors on the CPU when `sample` makes its tables. Where alpha reaches 0 (the
        cosine schedule, the straight line), `sample` leaves out the times of alpha 0 and begins at the first one after
        them, with N(0, std**2), and its steps are exact transitions from t to the time t' below, without derivatives:
        with v = std**2 - (alpha std' / alpha')**2, a = alpha'/alpha, b = a v, c = std'/std sqrt(v); for the
        probability flow b = a std**2 - std std', c = 0.

    Source:
        Song et al. 2021, arXiv:2011.13456, appendix B, read backwards; Kingma et al. 2021, arXiv:2107.00630, eq. 2.

    Example:
        >>> sde = from_marginals(lambda t: torch.cos(1.5 * t), lambda t: torch.sin(1.5 * t))
        >>> [round(v.item(), 4) for v in sde.rates(0.5)]  # -1.5 tan, 3 tan
        [-1.3974, 2.7948]
    """
    return _FromMarginals(alpha, std)


def seeds_for(op: str, n: int, seed: int | Tensor | None, device: torch.device | str | None) -> Tensor:
    """One seed per sample: (n,) seeds as they are, anything else through `sample_seeds`."""
    device = None if device is None else check.device(op, device)
    if not isinstance(seed, Tensor):
        # made where it is used, wherever torch's default device is
        seed = sample_seeds(seed_tensor(op, seed, None, device), n)
    elif seed.dim() == 0:
        seed = sample_seeds(seed, n)
    elif seed.dtype != torch.int64:
        raise TypeError(f"{op}: seed must be int64, got {check.short(seed.dtype)}")
    elif seed.shape != (n,):
        raise ValueError(f"{op}: seed must have one entry per sample, ({n},), got {tuple(seed.shape)}")
    return seed if device is None else seed.to(device)


def _time(t: float | Tensor, device: torch.device | None = None) -> Tensor:
    if isinstance(t, (numbers.Real, list, tuple)):
        # float32 whatever the default dtype
        return torch.tensor(t, dtype=torch.float32, device=device)
    if not isinstance(t, Tensor):
        if isinstance(t, str) or not hasattr(t, "__array__"):
            raise TypeError(f"sde: t must be a number or a tensor, got {type(t).__name__}")
        t = torch.as_tensor(t)
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def _slope(value: Tensor, t: Tensor) -> Tensor:
    """0 where the value does not depend on t."""
    if not value.requires_grad:
        return torch.zeros_like(t)
    slope = torch.autograd.grad(value.sum(), t, create_graph=True, allow_unused=True)[0]
    return torch.zeros_like(t) if slope is None else slope
