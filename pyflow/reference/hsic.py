"""Sums over Gram matrices, and centring one, in plain torch: every matrix is made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._schemas import HSIC_KERNELS


def raw(z: Tensor, kernel: str) -> Tensor:
    """(..., n, n) what the kernel is a function of: -|a - b|^2 / 2, |a - b|_1, a.b, mismatches, or the entry itself."""
    if kernel == "precomputed":
        return z
    if kernel in ("laplacian", "delta"):
        difference = z.unsqueeze(-2) - z.unsqueeze(-3)
        return difference.abs().sum(-1) if kernel == "laplacian" else (difference != 0).sum(-1).to(z.dtype)
    dot = z @ z.mT
    if kernel == "polynomial":
        return dot
    half = z.square().sum(-1) / 2
    return (dot - (half.unsqueeze(-1) + half.unsqueeze(-2))).clamp(max=0)


def gram(z: Tensor, shift: Tensor, kernel: str, degree: int) -> Tensor:
    """(..., n, n) kernel matrix minus shift (..., 0 or 1), with zeros on its diagonal."""
    value = raw(z, kernel)
    if kernel in ("rbf", "laplacian"):
        exponent = value if kernel == "rbf" else -value
        value = torch.where(shift[..., None, None] != 0, exponent.expm1(), exponent.exp())
    elif kernel == "polynomial":
        value = value**degree
    elif kernel == "delta":
        value = (value == 0).to(z.dtype)
    return value.masked_fill(torch.eye(z.shape[-2], dtype=torch.bool, device=z.device), 0)


def hsic_sums(
    z: Tensor,
    shift: Tensor,
    dims: Sequence[int],
    kernels: Sequence[int],
    degrees: Sequence[int],
    pairs: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Row sums (B, M, n) of each variable's Gram matrix and sums (B, P) of their products, float64, i != j."""
    parts = z.split(list(dims), -1)
    grams = [gram(part, shift[:, m], HSIC_KERNELS[kernels[m]], degrees[m]).double() for m, part in enumerate(parts)]
    rows = torch.stack([g.sum(-1) for g in grams], 1)
    cross = [(grams[a] * grams[b]).sum((-2, -1)) for a, b in zip(pairs[::2], pairs[1::2])]
    return rows, torch.stack(cross, 1) if cross else rows.new_zeros(len(z), 0)


def hsic_permuted(gram_x: Tensor, gram_y: Tensor, permutations: Tensor) -> Tensor:
    """(R,) sum over i != j of K[i, j] L[p[i], p[j]], float64, for each row p of permutations (R, n)."""
    k = gram_x.double().fill_diagonal_(0) if gram_x.dtype != torch.float64 else gram_x.clone().fill_diagonal_(0)
    sums = [(k * gram_y[p][:, p]).sum() for p in permutations.long()]
    return torch.stack(sums) if sums else k.new_zeros(0)


def center_gram(gram: Tensor) -> Tensor:
    """H K H of (..., n, n)."""
    rows, columns = gram.mean(-1, keepdim=True), gram.mean(-2, keepdim=True)
    return gram - rows - columns + rows.mean(-2, keepdim=True)
