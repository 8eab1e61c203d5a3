"""Forward SDEs dx = f(t) x dt + g(t) dw for t in [0, T], with T = 1 here, and the scalars of their reverse steps.

x_t given x_0 is normal with mean alpha(t) x_0 and standard deviation std(t). Only `drift` and `prior_sample` involve x.
Float64 times give float64 results.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
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
    """Times of the steps, from T down to eps, and the index of each in a discrete table with one entry per step."""

    times: Tensor
    index: Tensor

    @classmethod
    def of(cls, steps: int, eps: float, T: float = 1.0) -> Grid:
        # floor(t / T (N - 1)) written so that rounding of t cannot move it
        k = torch.arange(steps, device="cpu")
        index = steps - 1 - k + (k.double() * (eps / T)).floor().long()
        return cls(torch.linspace(T, eps, steps, dtype=torch.float64, device="cpu"), index)

    @property
    def steps(self) -> int:
        return len(self.times)

    def spread(self) -> Tensor:
        """Return i / (N - 1) for every table entry i; 1 for a table with a single entry."""
        return torch.linspace(1, 0, self.steps, dtype=torch.float64, device="cpu").flip(0)


class SDE:
    """Base class; a subclass defines `marginal` and `rates`, and overrides the step methods if it has discrete tables.

    Both get t as a number or a tensor, in samplers 1-d float64 on the CPU, and return two tensors of its shape.

    Attributes:
        T: time at which x has the prior's distribution.
        prior_std: standard deviation of the prior, about that of `marginal(T)`.
    """

    T = 1.0
    prior_std = 1.0

    def marginal(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha, std) of x_t given x_0, in the shape of t."""
        raise NotImplementedError(f"{type(self).__name__}: marginal must be defined, it returns (alpha, std) of a time")

    def rates(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return (f, g squared), f being the factor of x in the drift, in the shape of t."""
        raise NotImplementedError(f"{type(self).__name__}: rates must be defined, it returns (f, g squared) of a time")

    def grid(self, steps: int, eps: float) -> Grid:
        """Return the times at which a sampler's steps start."""
        return Grid.of(steps, eps, self.T)

    def last_time(self, eps: float) -> float:
        """Return the time at which the ODE from data to prior ends."""
        return self.T

    def drift(self, x: Tensor, t: float | Tensor) -> Tensor:
        """Return f(t) x; t is a number or (B,)."""
        check.float_tensor("drift", "x", x)
        time = time_tensor(t, x.device)
        f, _ = self.rates(time)
        f = f.to(x.device).reshape(f.shape + (1,) * (x.dim() - f.dim()))
        if f.dim() > x.dim() or any(m not in (1, n) for m, n in zip(f.shape, x.shape, strict=False)):
            raise ValueError(f"drift: t must have the shape () or {tuple(x.shape[:1])}, got {tuple(time.shape)}")
        return (f * x).to(x.dtype)

    def diffusion(self, t: float | Tensor) -> Tensor:
        """Return g(t)."""
        return self.rates(t)[1].sqrt()

    def prior_sample(
        self,
        shape: Sequence[int],
        seed: int | Tensor | None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Return x at t = T: normal with mean 0 and standard deviation `prior_std`.

        `pyflow.ops.sample_seeds` makes one seed per sample from an integer; (B,) int64 gives the seeds directly.
        """
        op = "prior_sample"
        shape, dtype = check.batch_shape(op, shape), check.float_dtype(op, dtype)
        seed = seeds_for(op, shape[0], seed, device)
        return normal(shape, seed=seed, purpose="prior").mul_(self.prior_std).to(dtype)

    def euler_maruyama(self, grid: Grid) -> Row:
        f, g2 = self.rates(grid.times)
        variance = self.T * g2 / grid.steps
        return 1 - self.T * f / grid.steps, variance, variance.sqrt()

    def reverse_diffusion(self, grid: Grid) -> Row:
        return self.euler_maruyama(grid)

    def ancestral(self, grid: Grid) -> Row:
        raise ValueError(f"{type(self).__name__}: ancestral sampling is defined for VPSDE and VESDE only")

    def probability_flow(self, grid: Grid, predictor: str = "euler_maruyama") -> Row:
        """Return the scalars of `predictor` without noise, with half of its score term."""
        a, b, c = getattr(self, predictor)(grid)
        return a, b / 2, torch.zeros_like(c)

    def corrector_alpha(self, grid: Grid) -> Tensor:
        """Return the square of the factor by which the drift of one step multiplies x."""
        return torch.exp(2 * self.T * self.rates(grid.times)[0] / grid.steps)


class _LinearBeta(SDE):
    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        name = type(self).__name__
        self.beta_min = check.positive(name, "beta_min", beta_min)
        self.beta_max = check.number(name, "beta_max", beta_max)
        if not self.beta_min <= self.beta_max < math.inf:
            raise ValueError(f"{name}: beta_max must be finite and at least beta_min, {beta_min}, got {beta_max}")

    def beta(self, t: float | Tensor) -> Tensor:
        return self.beta_min + time_tensor(t) * (self.beta_max - self.beta_min)

    def log_alpha(self, t: float | Tensor) -> Tensor:
        t = time_tensor(t)
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
        std is computed by expm1, since the difference 1 - alpha**2 is 1 % off at t = 1e-5 in float32. Discrete methods
        need more than beta_max steps.

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
    """Sub-variance-preserving SDE with linear beta: alpha as in VPSDE, std the square of VPSDE's.

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
        sigma_min, sigma_max: std at t = 0 and t = 1; set sigma_max to about the largest distance between two data
            points.

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
        return self.sigma_min * torch.exp(time_tensor(t) * self._growth)

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
        """Return sigma_i squared and sigma_{i-1} squared, with 0 below the smallest sigma."""
        table = self.sigma(grid.spread()).square()
        below = torch.cat((table.new_zeros(1), table[:-1]))
        return table[grid.index], below[grid.index]

    def __repr__(self) -> str:
        return f"VESDE(sigma_min={self.sigma_min:g}, sigma_max={self.sigma_max:g})"


def seeds_for(op: str, n: int, seed: int | Tensor | None, device: torch.device | str | None) -> Tensor:
    """Return one seed per sample: (n,) seeds unchanged, a single seed through `sample_seeds`."""
    device = None if device is None else check.device(op, device)
    if not isinstance(seed, Tensor):
        # created on the device where it is used, not on torch's default device
        seed = sample_seeds(seed_tensor(op, seed, None, device), n)
    elif seed.dtype != torch.int64:
        raise TypeError(f"{op}: seed must be int64, got {check.short(seed.dtype)}")
    elif seed.dim() == 0:
        seed = sample_seeds(seed, n)
    elif seed.shape != (n,):
        raise ValueError(f"{op}: seed must have one entry per sample, ({n},), got {tuple(seed.shape)}")
    return seed if device is None else seed.to(device)


def time_tensor(t: float | Tensor, device: torch.device | None = None) -> Tensor:
    if isinstance(t, (numbers.Real, list, tuple)):
        # float32 for every default dtype
        return torch.tensor(t, dtype=torch.float32, device=device)
    if not isinstance(t, Tensor):
        if isinstance(t, str) or not hasattr(t, "__array__"):
            raise TypeError(f"sde: t must be a number or a tensor, got {type(t).__name__}")
        t = torch.as_tensor(t)
    check.tensor("sde", "t", t)
    if t.is_complex() or t.dtype == torch.bool:
        raise TypeError(f"sde: t must be real, got {check.short(t.dtype)}")
    return t if t.dtype in (torch.float32, torch.float64) else t.float()
