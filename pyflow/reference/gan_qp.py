"""GAN-QP in plain torch: the critic's loss against a distance, and what generator and encoder minimise."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from . import compute_dtype


def common_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where one of the tensors is, else float32."""
    return compute_dtype(reduce(torch.promote_types, (t.dtype for t in tensors if t is not None)))


def rows(x: Tensor) -> Tensor:
    """Means over all but the first dim, (B,)."""
    return x.flatten(1).mean(1) if x.dim() > 1 else x


def mean_distance(real: Tensor, fake: Tensor, distance: str, dtype: torch.dtype) -> Tensor:
    difference = real.detach().to(dtype) - fake.detach().to(dtype)
    return rows(difference.abs()) if distance == "l1" else rows(difference.square()).sqrt()


def quotient(t_real: Tensor, t_fake: Tensor, d: Tensor, lam: float, eps: float) -> tuple[Tensor, Tensor]:
    """Delta and Delta / (2 lam (d + eps)), half where the loss is least: there is where no distance puts a sample."""
    width = 2 * lam * (d + eps)
    still = width == 0
    delta = torch.where(still, 0, t_real.to(d.dtype) - t_fake.to(d.dtype))
    return delta, torch.where(still, 0.5, delta / torch.where(still, 1, width))


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
    if z_real is not None:
        d = d + mean_distance(z_real, z_fake, distance, dtype)
    delta, q = quotient(t_real, t_fake, d, lam, eps)
    return delta * q - delta, d


def gan_qp_loss_backward(
    grad: Tensor, t_real: Tensor, t_fake: Tensor, d: Tensor, *, lam: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of (t_real, t_fake)."""
    _, q = quotient(t_real, t_fake, d, lam, eps)
    of_delta = grad.to(d.dtype) * (2 * q - 1)
    return of_delta.to(t_real.dtype), -of_delta.to(t_fake.dtype)


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
        if given is not None:
            loss = loss + beta * rows((given.detach().to(dtype) - rebuilt.to(dtype)).square())
    return loss
