"""MALA accept steps, the gradient penalty and the losses of energy-based GANs in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from . import compute_dtype
from . import noise as draws
from .sde import column, rows


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def log_ratio(z: Tensor, z_new: Tensor, grad: Tensor, grad_new: Tensor, alpha: Tensor) -> Tensor:
    """(B,) log q(z|z') - log q(z'|z), where q(z'|z) is normal with mean z - alpha grad and variance 2 alpha.

    |z' - z + alpha g|^2 / (4 alpha) - |z - z' + alpha g'|^2 / (4 alpha), expanded.
    """
    quarter = 0.25 * column(alpha, z)
    return rows((grad + grad_new) * (0.5 * (z_new - z) + quarter * (grad - grad_new)))


def log_uniforms(count: int, seed: Tensor, step: Tensor) -> Tensor:
    """(count,) logarithms of the accept uniforms: element i of the stream of seed (), or element 0 of seed (B,)[i]."""
    u = draws.noise((count,), seed, step, kind="uniform", purpose="accept", dtype=torch.float32)
    return torch.where(u > 0, draws.log(torch.where(u > 0, u, 1.0)), -torch.inf)


def mala_accept(
    z: Tensor,
    z_new: Tensor,
    u: Tensor,
    u_new: Tensor,
    grad: Tensor,
    grad_new: Tensor,
    alpha: Tensor,
    seed: Tensor,
    step: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = common_dtype(z, z_new, u, u_new, grad, grad_new)
    position, proposal, slope, new_slope = (t.to(dtype) for t in (z, z_new, grad, grad_new))
    ratio = log_ratio(position, proposal, slope, new_slope, alpha)
    bound = u.to(dtype) - u_new.to(dtype) + ratio
    log_u = log_uniforms(z.shape[0], seed.to(z.device), step)
    # a proposal whose position, energy or gradient is not finite is rejected
    accepted = (log_u < bound) & u_new.isfinite() & ratio.isfinite()
    of_row = accepted.reshape(-1, *(1,) * (z.dim() - 1))
    return (
        torch.where(of_row, z_new.to(z.dtype), z),
        torch.where(accepted, u_new.to(u.dtype), u),
        torch.where(of_row, grad_new.to(grad.dtype), grad),
        accepted,
    )


def grad_norm_penalty(grad: Tensor) -> Tensor:
    return rows(grad.to(compute_dtype(grad.dtype)).square())


def energy_loss(u_real: Tensor, u_fake: Tensor, *, kind: str, margin: float) -> Tensor:
    """Loss of an energy that is to be low on data (u_real) and high on samples (u_fake)."""
    real, fake = (u.to(compute_dtype(u.dtype)) for u in (u_real, u_fake))
    if kind == "linear":
        return real.mean() - fake.mean()
    pushed = torch.relu(margin - fake).mean()
    return torch.relu(margin + real).mean() + pushed if kind == "hinge" else real.mean() + pushed
