"""Critic and generator losses of GAN-QP in plain torch."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from . import compute_dtype


def common_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64, else float32."""
    return compute_dtype(reduce(torch.promote_types, (t.dtype for t in tensors if t is not None)))


def rows(x: Tensor) -> Tensor:
    """(B,) means over all dims but the first."""
    return x.flatten(1).mean(1) if x.dim() > 1 else x


def mean_distance(real: Tensor, fake: Tensor, distance: str, dtype: torch.dtype) -> Tensor:
    difference = real.detach().to(dtype) - fake.detach().to(dtype)
    return rows(difference.abs()) if distance == "l1" else rows(difference.square()).sqrt()


def quotient(t_real: Tensor, t_fake: Tensor, d: Tensor, lam: float, eps: float) -> tuple[Tensor, Tensor]:
    """Return Delta and q = Delta / (2 lam (d + eps)); the loss is least at q = 1/2.

    A sample with d + eps = 0 gets Delta = 0 and q = 1/2, so that its loss and gradients are 0.
    """
    width = 2 * lam * (d + eps)
    zero = width == 0
    delta = torch.where(zero, 0, t_real.to(d.dtype) - t_fake.to(d.dtype))
    return delta, torch.where(zero, 0.5, delta / torch.where(zero, 1, width))


def gan_qp_loss(
    t_real: Tensor,
    t_fake: Tensor,
    x_real: Tensor,
    x_fake: Tensor,
    z_real: Tensor | None,
    z_fake: Tensor | None,
    *,
    lam: float,
    eps: float,
    distance: str,
) -> tuple[Tensor, Tensor]:
    """(B,) losses and (B,) distances."""
    dtype = common_dtype(t_real, t_fake, x_real, x_fake, z_real, z_fake)
    d = mean_distance(x_real, x_fake, distance, dtype)
    if z_real is not None and z_fake is not None:
        d = d + mean_distance(z_real, z_fake, distance, dtype)
    delta, q = quotient(t_real, t_fake, d, lam, eps)
    return delta * q - delta, d


def gan_qp_loss_backward(
    grad: Tensor, t_real: Tensor, t_fake: Tensor, d: Tensor, *, lam: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of (t_real, t_fake)."""
    _, q = quotient(t_real, t_fake, d, lam, eps)
    grad_delta = grad.to(d.dtype) * (2 * q - 1)
    return grad_delta.to(t_real.dtype), -grad_delta.to(t_fake.dtype)


def gan_qp_generator_loss(
    t_real: Tensor,
    t_fake: Tensor,
    x: Tensor | None,
    x_rec: Tensor | None,
    z: Tensor | None,
    z_rec: Tensor | None,
    betas: tuple[float, float],
) -> Tensor:
    """(B,) losses."""
    dtype = common_dtype(t_real, t_fake, x, x_rec, z, z_rec)
    loss = t_real.to(dtype) - t_fake.to(dtype)
    for beta, given, rebuilt in ((betas[0], z, z_rec), (betas[1], x, x_rec)):
        if given is not None and rebuilt is not None:
            loss = loss + beta * rows((given.detach().to(dtype) - rebuilt.to(dtype)).square())
    return loss
