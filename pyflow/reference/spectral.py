"""Spectral normalisation in plain torch: power iteration and division by the largest singular value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import compute_dtype, matmul

# lower limit of norms and sigmas; torch's spectral_norm uses the same one for norms
FLOOR = 1e-12

Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def floored(sigma: Tensor) -> Tensor:
    """sigma, or FLOOR if |sigma| is below it; NaN stays NaN."""
    return torch.where(sigma.abs() <= FLOOR, FLOOR, sigma)


def norm(x: Tensor) -> Tensor:
    """2-norm with gradient 0 at 0."""
    square = x.square().sum()
    return torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), square)


def iterate(matrix: Tensor, u: Tensor, v: Tensor, n_iter: int) -> tuple[Tensor, Tensor]:
    """Run rounds of u = Wv / |Wv|, v = W'u / |W'u|; if a norm is at most FLOOR, u and v do not change."""
    for _ in range(n_iter):
        y = matmul(matrix, v)
        size_y = norm(y)
        new_u = y / torch.where(size_y <= FLOOR, 1, size_y)
        z = matmul(matrix.mT, new_u)
        size_z = norm(z)
        new_v = z / torch.where(size_z <= FLOOR, 1, size_z)
        stalled = (size_y <= FLOOR) | (size_z <= FLOOR)
        u, v = torch.where(stalled, u, new_u), torch.where(stalled, v, new_v)
    return u, v


def spectral_normalize(
    weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], *, n_iter: int, through_iteration: bool = False
) -> Lists:
    """Return (weights, u, v, sigmas). For a weight of one dim, u and v are copied."""
    out: Lists = ([], [], [], [])
    for weight, left, right in zip(weights, u, v, strict=True):
        dtype = compute_dtype(weight.dtype)
        if weight.dim() == 1:
            new_left, new_right = left.clone(), right.clone()
            sigma = floored(norm(weight.to(dtype)))
        else:
            matrix = weight.to(dtype).flatten(1)
            if through_iteration:
                new_left, new_right = iterate(matrix, left.to(dtype), right.to(dtype), n_iter)
            else:
                with torch.no_grad():
                    new_left, new_right = iterate(matrix.detach(), left.to(dtype), right.to(dtype), n_iter)
            sigma = floored(torch.dot(new_left, matmul(matrix, new_right)))
        normalized = (weight.to(dtype) / sigma).to(weight.dtype)
        for values, value in zip(
            out, (normalized, new_left.to(left.dtype), new_right.to(right.dtype), sigma), strict=True
        ):
            values.append(value)
    return out


def spectral_normalize_backward(
    grads: Sequence[Tensor],
    grad_sigmas: Sequence[Tensor],
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    sigmas: Sequence[Tensor],
) -> list[Tensor]:
    """Return grad / sigma + (grad_sigma - sum(grad W) / sigma^2) u v' per weight; u and v are constants."""
    out = []
    for grad, grad_sigma, weight, left, right, sigma in zip(grads, grad_sigmas, weights, u, v, sigmas, strict=True):
        dtype = compute_dtype(weight.dtype)
        g, w, s = grad.to(dtype), weight.to(dtype), sigma.to(dtype)
        outer = w / s if w.dim() == 1 else torch.outer(left.to(dtype), right.to(dtype)).view(w.shape)
        slope = grad_sigma.to(dtype) - (g * w).sum() / (s * s)
        out.append((g / s + torch.where(s.abs() <= FLOOR, 0, slope) * outer).to(weight.dtype))
    return out
