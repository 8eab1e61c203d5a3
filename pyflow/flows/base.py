"""Base class of the flows: prior on z, log-likelihood and sampling."""

from __future__ import annotations

import numbers
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import _checks as check
from .._schemas import PRIORS
from ..ops import flow_log_prob


class Flow(nn.Module):
    """An invertible map x <-> z with `forward(x) -> (z, logdet)` and `inverse(z) -> (x, logdet)`.

    Args:
        latent_shape: shape of one z.
        prior: distribution of every element of z, "gaussian" or "logistic", with location 0 and scale 1.

    Notes:
        Hooks of the flow run in `forward` and `log_prob`. For `sample` and `inverse` of a flow under fully_shard, call
        torch's register_fsdp_forward_method.
    """

    inverse: Callable[[Tensor], tuple[Tensor, Tensor]]

    def __init__(self, latent_shape: tuple[int, ...], prior: str) -> None:
        super().__init__()
        check.choice(type(self).__name__, "prior", prior, PRIORS)
        self.latent_shape, self.prior = latent_shape, prior

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density of each x in nats, (B,)."""
        z, logdet = self(x)
        return flow_log_prob(z, prior=self.prior) + logdet

    def draw_latent(self, n: int, temperature: float = 1.0, seed: int | None = None) -> Tensor:
        """Return n draws of z, scaled by `temperature`; a seed gives the same draws on every device."""
        name = type(self).__name__
        n = check.at_least(name, "n", n, 0)
        if not 0 <= check.number(name, "temperature", temperature) < float("inf"):
            rule = "finite" if temperature > 0 else "at least 0"
            raise ValueError(f"{name}: temperature must be {rule}, got {temperature}")
        generator = None if seed is None else torch.Generator("cpu").manual_seed(_seed(name, seed))
        # float64 on the CPU: together with the clamp below it keeps the logistic's inverse CDF finite
        draw = torch.randn if self.prior == "gaussian" else torch.rand
        z = draw(n, *self.latent_shape, generator=generator, dtype=torch.float64, device="cpu")
        if self.prior == "logistic":
            z = z.clamp_(min=2.0**-54).logit_()
        like = next(self.parameters())
        return z.mul_(temperature).to(like.dtype).to(like.device)

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, seed: int | None = None) -> Tensor:
        """Return n samples, inverse(temperature * z) with z from the prior."""
        return self.inverse(self.draw_latent(n, temperature, seed))[0]


def _seed(op: str, seed: object) -> int:
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"{op}: seed must be an integer, got {type(seed).__name__}")
    if not -(2**63) <= int(seed) < 2**64:
        raise ValueError(f"{op}: seed must fit 64 bits, got {seed}")
    return int(seed)
