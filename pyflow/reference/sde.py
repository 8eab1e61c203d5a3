"""Steps of stochastic differential equations and the denoising loss in plain torch.

Coefficients are 0-d or (B,) tensors; noise is given or drawn by `reference.noise`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import compute_dtype
from . import noise as draws


def noise_like(x: Tensor, seed: Tensor | None, step: Tensor | None, noise: Tensor | None, purpose: str) -> Tensor:
    """Return the noise z, given or drawn, in the compute dtype of x."""
    if noise is None:
        assert seed is not None and step is not None
        seed = seed.to(x.device)
        noise = draws.noise(x.shape, seed, step, kind="normal", purpose=purpose, dtype=torch.float32)
    return noise.to(compute_dtype(x.dtype))


def column(value: Tensor, x: Tensor) -> Tensor:
    """Reshape a coefficient so that it broadcasts over the samples of x, and cast it to x's compute dtype."""
    value = value.to(compute_dtype(x.dtype))
    return value.reshape(-1, *(1,) * (x.dim() - 1)) if value.dim() else value


def sde_step(
    x: Tensor, score: Tensor | None, a: Tensor, b: Tensor | None, c: Tensor, z: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a x + b score + c z and the mean a x + b score, in the compute dtype."""
    mean = column(a, x) * x.to(z.dtype)
    if score is not None:
        assert b is not None
        mean = mean + column(b, x) * score.to(z.dtype)
    # + 0.0 turns -0 into +0, so that c = 0 gives the same bits for positive and negative z
    return mean + (column(c, x) * z + 0.0), mean


def rows(x: Tensor) -> Tensor:
    """(B,) sums over all dims but the first; (1,) for a scalar."""
    return x.flatten(1).sum(1) if x.dim() > 1 else x.reshape(-1)


def sde_step_backward(
    grad: Tensor,
    grad_mean: Tensor,
    x: Tensor | None,
    score: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    c: Tensor,
    z: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Return the gradients of x, score and z, and (3, B) gradients of a, b and c per sample (None without x)."""
    total = grad + grad_mean
    grads = column(a, grad) * total, None if b is None else column(b, grad) * total, column(c, grad) * grad
    if x is None:
        return *grads, None
    assert z is not None
    of_b = torch.zeros_like(total) if score is None else total * score.to(grad.dtype)
    return *grads, torch.stack((rows(total * x.to(grad.dtype)), rows(of_b), rows(grad * z)))


def residual(pred: Tensor, std: Tensor | None, z: Tensor) -> Tensor:
    """The residual that the loss squares: std * score + z, or pred - z if std is None."""
    pred = pred.to(z.dtype)
    return pred - z if std is None else column(std, pred) * pred + z


def denoising_loss(pred: Tensor, std: Tensor | None, z: Tensor) -> Tensor:
    return rows(residual(pred, std, z).square()) / 2


def denoising_loss_backward(grad: Tensor, pred: Tensor, std: Tensor | None, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of pred and the (B,) gradients of std per sample."""
    r, grad = residual(pred, std, z), grad.to(z.dtype)
    slope = column(grad, pred) if std is None else column(grad, pred) * column(std, pred)
    return slope * r, grad * rows(pred.to(z.dtype) * r)


def langevin_squares(score: Tensor, z: Tensor) -> Tensor:
    """(2, B) squared norms of score and noise."""
    return torch.stack((rows(score.to(z.dtype).square()), rows(z.square())))
