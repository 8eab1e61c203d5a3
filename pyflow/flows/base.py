"""Base class of the flows: prior on z, log-likelihood and sampling, with or without a context."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._schemas import PRIORS
from .._torch import has_hooks
from ..ops import flow_log_prob, normal, uniform
from ..ops.noise import seed_tensor
from ..reference.flow_program import of_rows
from ._fuser import Fusing


class Flow(Fusing):
    """An invertible map x <-> z with `forward(x, context=None) -> (z, logdet)` and `inverse(z, context=None)`.

    Args:
        latent_shape: shape of one z.
        prior: distribution of every element of z, "gaussian" or "logistic", with location 0 and scale 1.
        context_features: size of the context that the density of x is conditioned on, 0 for none. The layers get it
            as their first argument after x.

    Notes:
        Hooks of the flow run in `forward` and `log_prob`. For `sample` and `inverse` of a flow under fully_shard, call
        torch's register_fsdp_forward_method.
    """

    inverse: Callable[..., tuple[Tensor, Tensor]]
    _inverts_vectors = True  # whether an inverse may be that of a program

    def __init__(self, latent_shape: tuple[int, ...], prior: str, context_features: int = 0) -> None:
        super().__init__()
        name = type(self).__name__
        check.choice(name, "prior", prior, PRIORS)
        self.latent_shape, self.prior = latent_shape, prior
        self.context_features = check.at_least(name, "context_features", context_features, 0)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the log-density of each x in nats, given its context (B, context_features)."""
        # hooks of a flow without context see one argument
        z, logdet = self(x) if context is None else self(x, context)
        return self._prior_log_prob(z) + logdet

    def draw_latent(self, n: int, temperature: float = 1.0, seed: int | Tensor | None = None) -> Tensor:
        """Return n draws of z, scaled by `temperature`; a seed gives the same draws on every device and for every n."""
        name = type(self).__name__
        n = check.at_least(name, "n", n, 0)
        if not 0 <= check.number(name, "temperature", temperature) < float("inf"):
            rule = "finite" if temperature > 0 else "at least 0"
            raise ValueError(f"{name}: temperature must be {rule}, got {temperature}")
        like = next(self.parameters())
        dtype = torch.promote_types(like.dtype, torch.float32)
        shape = (n, *self.latent_shape)
        seed = seed if seed is None else seed_tensor(name, seed, shape, like.device)
        draw = normal if self.prior == "gaussian" else uniform
        z = draw(shape, seed=seed, purpose="prior", dtype=dtype, device=like.device)
        if self.prior == "logistic":
            # u is a multiple of 2**-24 below 1: the middle of its step, and 1 less it, are neither 0 nor rounded to 1
            half, last = 2.0**-25, 1 - 2.0**-24
            z = (z + half).log() - (last - z + half).log()
        return z.mul(temperature).to(like.dtype)

    @torch.no_grad()
    def sample(
        self, n: int, context: Tensor | None = None, temperature: float = 1.0, seed: int | Tensor | None = None
    ) -> Tensor:
        """Return n samples, inverse(temperature * z) with z from the prior.

        Args:
            n: number of samples, of each context if there is one.
            context: (..., context_features) for a flow with a context.
            temperature: >= 0, factor of z.
            seed: integer, or int64 tensor, 0-d or one seed for each sample; None draws one from torch's default
                generator.

        Returns:
            (n, shape of x), or (n, ..., shape of x) with the leading dims of the context.
        """
        return self.rsample(n, context, temperature, seed)

    @torch.no_grad()
    def sample_and_log_prob(
        self, n: int, context: Tensor | None = None, temperature: float = 1.0, seed: int | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return samples as `sample` does, and log_prob of each (in nats, of temperature 1), in one pass."""
        return self.rsample_and_log_prob(n, context, temperature, seed)

    def rsample(
        self, n: int, context: Tensor | None = None, temperature: float = 1.0, seed: int | Tensor | None = None
    ) -> Tensor:
        """Return samples as `sample` does, differentiable in the parameters and the context."""
        _, x, _, lead = self._drawn(n, context, temperature, seed)
        return x.reshape(*lead, *x.shape[1:])

    def rsample_and_log_prob(
        self, n: int, context: Tensor | None = None, temperature: float = 1.0, seed: int | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what `sample_and_log_prob` does, differentiable in the parameters and the context."""
        z, x, logdet, lead = self._drawn(n, context, temperature, seed)
        nats = self._prior_log_prob(z) - logdet
        return x.reshape(*lead, *x.shape[1:]), nats.reshape(lead)

    def _drawn(
        self, n: int, context: Any, temperature: float, seed: int | Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
        """Return z (N, ...), its inverse, the log-determinants (N,), and the dims that N stands for."""
        n = check.at_least(type(self).__name__, "n", n, 0)
        device = next(self.parameters()).device
        context = check.context(type(self).__name__, context, self.context_features, device=device)
        if context is None:
            z = self.draw_latent(n, temperature, seed)
            return z, *self.inverse(z), (n,)
        lead = (n, *context.shape[:-1])
        z = self.draw_latent(math.prod(lead), temperature, seed)
        context = context.reshape(math.prod(lead[1:]), self.context_features)
        # an inverse of the module itself gathers the parameters, with fully_shard
        if self._inverts_vectors and "inverse" not in vars(self):
            result = self._fuser.run(self, z, (context.to(z.dtype),), self.latent_shape[0], True, repeats=1)
            if result is not None:
                return z, *result, lead
        return z, *self.inverse(z, of_rows(context, z.shape[0], 1)), lead

    def _program(
        self, x: Any, context: Any, inverse: bool = False, prior: str | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Return forward or inverse of vectors by one operator, with a prior (nothing, log_prob of x).

        None: the layers have to run, or to say what is wrong with x.
        """
        size = self.latent_shape[0]
        if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
            return None
        if x.layout is not torch.strided or x.is_nested or x.dim() != 2 or x.shape[1] != size:
            return None
        return self._fuser.run(self, x, self._given(context, x), size, inverse, prior)

    def _program_log_prob(self, x: Any, context: Any) -> Tensor | None:
        # hooks run only when the module is called: fully_shard gathers the parameters in one
        if has_hooks(self) or "forward" in vars(self):
            return None
        result = self._program(x, context, prior=self.prior)
        return None if result is None else result[1]

    def _check_dtype(self, label: str, x: Tensor) -> None:
        if (parameter := next(self.parameters(), None)) is not None:
            check.parameter_dtype(type(self).__name__, label, x, parameter)

    def _prior_log_prob(self, z: Tensor) -> Tensor:
        """Return the log-density of z (..., D), the sum over its last dim."""
        nats = flow_log_prob(z if z.dim() == 2 else z.reshape(-1, z.shape[-1]), prior=self.prior)
        return nats if z.dim() == 2 else nats.view(z.shape[:-1])

    def _given(self, context: Any, x: Tensor) -> tuple[Tensor, ...]:
        """Return the arguments of the layers after x (B, ...): nothing, or the context as (B, context_features)."""
        name, size = type(self).__name__, self.context_features
        context = check.context(name, context, size, device=x.device)
        if context is None:
            return ()
        batch, lead = x.shape[0], context.shape[:-1]
        # dynamo takes `in` for symbolic sizes to be false
        if len(lead) > 1 or (len(lead) == 1 and lead[0] != 1 and lead[0] != batch):
            raise ValueError(
                f"{name}: context must have the shape ({batch}, {size}) or ({size},), got {tuple(context.shape)}"
            )
        return (context.to(x.dtype).expand(batch, size),)
