"""Replacements for schedulers of diffusers, with every step in one fused pass.

Only the import changes: config, timesteps, sigmas, saving and loading are the same as in diffusers.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_sde_ve import ScoreSdeVeScheduler as _Ve
from diffusers.schedulers.scheduling_sde_ve import SdeVeOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Generator, Tensor

from .. import _checks as check
from ..ops import langevin_step, perturb, sde_step
from ..reference import compute_dtype
from ..sde import VPSDE
from ..sde.equations import seeds_for

Seeds = Generator | Sequence[Generator] | int | Tensor | None


class _Stream(TypedDict, total=False):
    """Keyword arguments of a step that select its noise."""

    seed: int | Tensor | None
    step: int | Tensor


class _Noise:
    """Derives the seeds of a scheduler's steps from its argument `generator`."""

    _predictions = _corrections = 0
    # a tensor after set_timesteps, None before; diffusers does not annotate it
    timesteps: Any

    def _seeds(self, op: str, generator: Seeds, x: Tensor, step: int) -> _Stream:
        """Return `seed`, drawn from the generators, or the given seeds with `step`, the number of calls so far."""
        if generator is None:
            return {"seed": None}
        if isinstance(generator, Generator):
            return {"seed": _draw(generator, ()).to(x.device)}
        if isinstance(generator, (list, tuple)):
            if len(generator) != x.shape[0]:
                raise ValueError(f"{op}: generator must have one entry per sample, {x.shape[0]}, got {len(generator)}")
            for each in generator:
                if not isinstance(each, Generator):
                    raise TypeError(f"{op}: generator must hold torch.Generators, got {type(each).__name__}")
            return {"seed": torch.cat([_draw(each, (1,)) for each in generator]).to(x.device)}
        if isinstance(generator, (numbers.Integral, Tensor)):
            return {"seed": seeds_for(op, x.shape[0], generator, x.device), "step": step}
        raise TypeError(f"{op}: generator must be torch.Generators or seeds, got {type(generator).__name__}")

    def _check(self, op: str, x_name: str, x: Tensor, score_name: str, score: Tensor) -> None:
        """Check the arguments; called before a seed is drawn, so that a refused call draws none."""
        if self.timesteps is None:
            raise ValueError(f"{op}: timesteps are not set, call set_timesteps first")
        check.float_tensor(op, x_name, x)
        check.like(op, score_name, score, x_name, x.shape, x.device)

    def _time(self, op: str, name: str, t: float | Tensor, x: Tensor) -> Tensor:
        """Return the time as a tensor, checked like the other arguments; it stays on its device."""
        if not isinstance(t, Tensor):
            t = torch.as_tensor(t, dtype=torch.float32, device="cpu")
        if t.shape not in ((), x.shape[:1]):
            raise ValueError(
                f"{op}: {name} must be one number or one per sample, {tuple(x.shape[:1])}, got {tuple(t.shape)}"
            )
        return t


class ScoreSdeVeScheduler(_Noise, _Ve):  # type: ignore[misc]  # diffusers: config_name differs between its mixins
    """diffusers' variance-exploding scheduler with fused steps.

    step_pred: x' = x + (sigma_i**2 - sigma_{i-1}**2) score + sqrt(sigma_i**2 - sigma_{i-1}**2) z;
    step_correct: x' = x + eps score + sqrt(2 eps) z, eps = 2 (snr |z| / |score|)**2.

    Args:
        num_train_timesteps, snr, sigma_min, sigma_max, sampling_eps, correct_steps: as in diffusers.
        norm: norms in the corrector's step size: "batch", means over the batch as in the paper and in diffusers, or
            "sample", one per sample, so that samples do not depend on each other.

    Raises:
        ValueError: unknown norm; a timestep outside [0, 1]; a number of timesteps, generators or seeds that is neither
            one nor one per sample.
        TypeError: generator is neither torch.Generators nor seeds.

    Notes:
        Results have the dtype of the sample. `generator` is a torch.Generator, a list with one per sample, or seeds:
        an integer, from which `pyflow.ops.sample_seeds` makes one seed per sample, or (B,) int64. With seeds, the
        number of calls since `set_timesteps` selects the noise of a step. With one generator or seed per sample and
        norm="sample", a sample's noise does not depend on its batch. `noise=` passes z instead.

    Source:
        diffusers 0.42, `ScoreSdeVeScheduler`; Song et al. 2021, arXiv:2011.13456, algorithm 2.

    Example:
        >>> scheduler = ScoreSdeVeScheduler(sigma_max=50.0)
        >>> scheduler.set_timesteps(10)
        >>> scheduler.set_sigmas(10)
        >>> x = torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)
        >>> scheduler.step_pred(x, scheduler.timesteps[0], x, generator=0).prev_sample.dtype
        torch.bfloat16
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 2000,
        snr: float = 0.15,
        sigma_min: float = 0.01,
        sigma_max: float = 1348.0,
        sampling_eps: float = 1e-5,
        correct_steps: int = 1,
        norm: str = "batch",
    ) -> None:
        check.choice("ScoreSdeVeScheduler", "norm", norm, ("batch", "sample"))
        super().__init__(
            num_train_timesteps=num_train_timesteps, snr=snr, sigma_min=sigma_min, sigma_max=sigma_max,
            sampling_eps=sampling_eps, correct_steps=correct_steps,
        )  # fmt: skip
        _keep_positional(self, ScoreSdeVeScheduler.__init__)

    def set_timesteps(
        self, num_inference_steps: int, sampling_eps: float | None = None, device: str | torch.device | None = None
    ) -> None:
        eps = self.config["sampling_eps"] if sampling_eps is None else sampling_eps
        self.timesteps = _timesteps(num_inference_steps, eps, device)
        # with given seeds the noise repeats from its first step
        self._predictions = self._corrections = 0

    def set_sigmas(
        self,
        num_inference_steps: int,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sampling_eps: float | None = None,
    ) -> None:
        low = check.positive("set_sigmas", "sigma_min", self.config["sigma_min"] if sigma_min is None else sigma_min)
        high = check.positive("set_sigmas", "sigma_max", self.config["sigma_max"] if sigma_max is None else sigma_max)
        if self.timesteps is None:
            self.set_timesteps(num_inference_steps, sampling_eps)
        # float32 for every default dtype
        between = torch.linspace(math.log(low), math.log(high), num_inference_steps, dtype=torch.float32, device="cpu")
        self.discrete_sigmas = between.exp()
        # one at a time, as in diffusers: a vectorised power has other bits
        self.sigmas = torch.stack([low * (high / low) ** t for t in self.timesteps.cpu()])

    def step_pred(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Seeds = None,
        return_dict: bool = True,
        *,
        noise: Tensor | None = None,
    ) -> SdeVeOutput | tuple[Tensor, Tensor]:
        op = "step_pred"
        self._check(op, "sample", sample, "model_output", model_output)
        timestep = self._time(op, "timestep", timestep, sample)
        if check.values_are_checked(timestep):
            outside = ~((timestep >= 0) & (timestep <= 1))
            if bool(outside.any()):
                raise ValueError(f"{op}: timestep must be in [0, 1], got {timestep[outside][0].item():.6g}")
        index = (timestep.float() * (len(self.timesteps) - 1)).long()
        sigmas = self.discrete_sigmas.to(index.device)
        below = torch.where(index == 0, 0, sigmas[index - 1])
        gap = (sigmas[index] ** 2 - below**2).to(sample.device)
        seeds: _Stream = {} if noise is not None else self._seeds(op, generator, sample, self._predictions)
        moved, mean = sde_step(sample, model_output, 1.0, gap, gap.sqrt(), noise=noise, return_mean=True, **seeds)
        # counted last, so that a failed call does not count
        self._predictions += 1
        return SdeVeOutput(prev_sample=moved, prev_sample_mean=mean) if return_dict else (moved, mean)

    def step_correct(
        self,
        model_output: Tensor,
        sample: Tensor,
        generator: Seeds = None,
        return_dict: bool = True,
        *,
        noise: Tensor | None = None,
    ) -> SchedulerOutput | tuple[Tensor]:
        op = "step_correct"
        self._check(op, "sample", sample, "model_output", model_output)
        seeds: _Stream = {} if noise is not None else self._seeds(op, generator, sample, self._corrections)
        moved = langevin_step(
            sample, model_output, snr=self.config["snr"], norm=self.config["norm"], noise=noise, **seeds
        )
        assert isinstance(moved, Tensor)
        self._corrections += 1
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def add_noise(self, original_samples: Tensor, noise: Tensor | None, timesteps: Tensor) -> Tensor:
        """Return x + sigma z; `timesteps` (B,) are indices into the discrete sigmas. With noise=None z is drawn."""
        sigma = self.discrete_sigmas.to(original_samples.device)[timesteps.to(original_samples.device)]
        return _noised(original_samples, noise, torch.ones_like(sigma), sigma)


class ScoreSdeVpScheduler(_Noise, SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # config_name, as above
    """diffusers' variance-preserving scheduler with fused steps.

    step_pred: score = -model output / std(t), then the Euler-Maruyama step of `pyflow.sde.VPSDE`.

    Args:
        num_train_timesteps, beta_min, beta_max, sampling_eps: as in diffusers.

    Raises:
        ValueError: a step before `set_timesteps`; a number of times, generators or seeds that is neither one nor one
            per sample.
        TypeError: generator is neither torch.Generators nor seeds.

    Notes:
        dtype, `generator` and `noise=` as in `ScoreSdeVeScheduler`. std is computed by expm1; diffusers computes it by
        a difference that loses digits near t = 0. diffusers' class has no `add_noise`; here it takes times in [0, 1].

    Source:
        diffusers 0.42, `ScoreSdeVpScheduler`; Song et al. 2021, arXiv:2011.13456, section 3.4.

    Example:
        >>> scheduler = ScoreSdeVpScheduler()
        >>> scheduler.set_timesteps(10)
        >>> x, mean = scheduler.step_pred(torch.zeros(2, 3), torch.ones(2, 3), scheduler.timesteps[0], generator=0)
        >>> mean[0].tolist()
        [2.0, 2.0, 2.0]
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 2000,
        beta_min: float = 0.1,
        beta_max: float = 20,
        sampling_eps: float = 1e-3,
    ) -> None:
        self.sigmas = self.discrete_sigmas = self.timesteps = None
        _keep_positional(self, ScoreSdeVpScheduler.__init__)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        self.timesteps = _timesteps(num_inference_steps, self.config["sampling_eps"], device)
        self._predictions = 0

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    def step_pred(
        self, score: Tensor, x: Tensor, t: float | Tensor, generator: Seeds = None, *, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        op = "step_pred"
        self._check(op, "x", x, "score", score)
        sde = self._sde()
        t = self._time(op, "t", t, x).to(x.device, torch.float32)
        beta = sde.beta(t) / len(self.timesteps)
        seeds: _Stream = {} if noise is not None else self._seeds(op, generator, x, self._predictions)
        factor = -beta / sde.marginal(t)[1]
        moved, mean = sde_step(x, score, 1 + beta / 2, factor, beta.sqrt(), noise=noise, return_mean=True, **seeds)
        # counted last, so that a failed call does not count
        self._predictions += 1
        return moved, mean

    def add_noise(self, original_samples: Tensor, noise: Tensor | None, timesteps: Tensor) -> Tensor:
        """Return alpha x + std z at `timesteps`, (B,) in [0, 1]. With noise=None z is drawn."""
        alpha, std = self._sde().marginal(timesteps.to(original_samples.device))
        return _noised(original_samples, noise, alpha, std)

    def _sde(self) -> VPSDE:
        return VPSDE(self.config["beta_min"], self.config["beta_max"])


def _keep_positional(scheduler: ConfigMixin, init: Callable[..., None]) -> None:
    """Keep positional arguments in the config: diffusers records them as defaults, which `from_config` drops."""
    parameters, config = inspect.signature(init).parameters, scheduler.config
    unset = [
        name
        for name in config.get("_use_default_values", ())
        if name in parameters and config[name] == parameters[name].default
    ]
    scheduler.register_to_config(_use_default_values=unset)


def _timesteps(steps: int, eps: float, device: str | torch.device | None) -> Tensor:
    steps = check.at_least("set_timesteps", "num_inference_steps", steps, 1)
    return torch.linspace(1, eps, steps, dtype=torch.float32, device=device or "cpu")


def _draw(generator: Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(2**63 - 1, shape, generator=generator, device=generator.device)


def _noised(x: Tensor, noise: Tensor | None, alpha: Tensor, std: Tensor) -> Tensor:
    # the sum has the dtype of x, and integers would cut it off
    check.float_tensor("add_noise", "original_samples", x)
    if noise is None:
        return perturb(x, alpha, std, seed=None)
    alpha, std = (v.reshape(v.shape + (1,) * (x.dim() - v.dim())) for v in (alpha, std))
    dtype = compute_dtype(x.dtype)
    return (alpha * x.to(dtype) + std * noise.to(dtype)).to(x.dtype)
