"""HSIC sums over Gram matrices and centring in plain torch. Whole n x n matrices are stored."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._schemas import HSIC_KERNELS
from . import matmul

# A bandwidth is wide if the mean of |a - b|^2 is at most 4, or the mean of |a - b|_1 at most 2, in bandwidths. The
# first mean is twice the sum of the variances; the second, for normal data, is 2 / sqrt(pi) times the sum of the
# standard deviations.
WIDE_VARIANCE = 2.0
WIDE_DEVIATION = math.sqrt(math.pi)


def raw(z: Tensor, scale: Tensor, kernel: str, middle: Tensor | None = None) -> Tensor:
    """Return the argument of the kernel function, (..., n, n): -|a - b|^2 / 2 for rbf, |a - b|_1 for laplacian, a.b for
    polynomial, the number of different entries for delta, and the entry itself for precomputed.

    Distances are in units of the bandwidth.
    """
    if kernel == "precomputed":
        return z
    if kernel in ("laplacian", "delta"):
        difference = z.unsqueeze(-2) - z.unsqueeze(-3)
        if kernel == "delta":
            return (difference != 0).sum(-1).to(z.dtype)
        return (difference * scale[..., None, None, None]).abs().sum(-1)
    if kernel == "polynomial":
        return matmul(z, z.mT)
    # float64, because float32 keeps no digit of the distance between two close rows that are 1e5 bandwidths away from
    # the other rows
    middle = middle_row(z) if middle is None else middle
    dtype, z = z.dtype, (z.double() - middle.double()) * scale.double()[..., None, None]
    half = z.square().sum(-1) / 2
    return (z @ z.mT - (half.unsqueeze(-1) + half.unsqueeze(-2))).clamp(max=0).to(dtype)


def centred(z: Tensor) -> Tensor:
    """Subtract `middle_row`; exactly 0 if all rows are equal."""
    return z - middle_row(z)


def middle_row(z: Tensor) -> Tensor:
    """Return the median of five rows (of all, if there are fewer), (..., 1, d) without a gradient.

    A mean would move towards outliers; the median of five rows does not, unless three of them are outliers.
    """
    n, rows = z.shape[-2], z.detach()
    if n == 0:
        return rows.new_zeros((*rows.shape[:-2], 1, rows.shape[-1]))
    step = max((n - 1) // 4, 1)
    few = rows[..., : 4 * step + 1 : step, :]
    return few.sort(-2).values.narrow(-2, few.shape[-2] // 2, 1)


def shift_of(z: Tensor, scale: Tensor, kernel: str, middle: Tensor | None = None) -> Tensor:
    """Return what is subtracted from K, (...): entries that hardly differ keep more digits without their common part.

    1 for kernels of distances with a wide bandwidth, `scale` for polynomial kernels, else 0.
    """
    if kernel == "polynomial":
        return scale.detach().expand(z.shape[:-2])
    if kernel not in ("rbf", "laplacian"):
        return z.new_zeros(z.shape[:-2])
    middle = middle_row(z) if middle is None else middle
    z = (z.detach() - middle) * scale.detach()[..., None, None]
    variance = (z - z.mean(-2, keepdim=True)).square().sum(-2) / max(z.shape[-2] - 1, 1)
    if kernel == "rbf":
        return (variance.sum(-1) <= WIDE_VARIANCE).to(z.dtype)
    return (variance.sqrt().sum(-1) <= WIDE_DEVIATION).to(z.dtype)


def gram(z: Tensor, scale: Tensor, kernel: str, degree: int) -> tuple[Tensor, Tensor]:
    """Return the kernel matrix minus its shift, (..., n, n) with a zero diagonal, and the shift, (...)."""
    value, shift = entries(z, scale, kernel, degree)
    return value.masked_fill(torch.eye(z.shape[-2], dtype=torch.bool, device=z.device), 0), shift


def entries(z: Tensor, scale: Tensor, kernel: str, degree: int) -> tuple[Tensor, Tensor]:
    """Return `gram` with a diagonal of any values."""
    middle = middle_row(z) if kernel in ("rbf", "laplacian") else None
    value, shift = raw(z, scale, kernel, middle), shift_of(z, scale, kernel, middle)
    if kernel in ("rbf", "laplacian"):
        exponent = value if kernel == "rbf" else -value
        value = torch.where(shift[..., None, None] != 0, exponent.expm1(), exponent.exp())
    elif kernel == "polynomial":
        value = value**degree - shift[..., None, None]
    elif kernel == "delta":
        value = (value == 0).to(z.dtype)
    return value, shift


def hsic_sums(
    z: Sequence[Tensor],
    scale: Tensor,
    kernels: Sequence[int],
    degrees: Sequence[int],
    pairs: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return row sums (B, M, n), sums of products of pairs (B, P) and shifts (B, M), all float64.

    The matrices are kernel matrices minus their shifts, with a zero diagonal. Variables are (B, n, d_m); `scale` (B, M)
    is one over the bandwidths, and the shifts of polynomial kernels; `pairs` is flat, two variable indices per product.
    """
    made = [gram(variable, scale[:, m], HSIC_KERNELS[kernels[m]], degrees[m]) for m, variable in enumerate(z)]
    grams = [matrix.double() for matrix, _ in made]
    rows = torch.stack([g.sum(-1) for g in grams], 1)
    cross = [(grams[a] * grams[b]).sum((-2, -1)) for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
    shift = torch.stack([shift.double() for _, shift in made], 1)
    return rows, torch.stack(cross, 1) if cross else rows.new_zeros(len(scale), 0), shift


def hsic_terms(
    rows: Tensor, cross: Tensor, shift: Tensor, diagonals: Tensor, pairs: Sequence[int], unbiased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (more, less) (B, P) with HSIC = (more - less) / divisor for each pair, and totals of row sums (B, M).

    `rows`, `cross` and `shift` are those of `hsic_sums`, `diagonals` (B, M, n) those of the kernel matrices; all
    float64. The unbiased estimator does without diagonals.
    """
    n = rows.shape[-1]
    own = diagonals - shift[..., None]
    rows = rows if unbiased else rows + own
    totals = rows.sum(-1)
    more, less = [], []
    for p, (a, b) in enumerate(zip(pairs[::2], pairs[1::2], strict=True)):
        product = totals[:, a] * totals[:, b] / ((n - 1) * (n - 2) if unbiased else n**2)
        more.append(cross[:, p] + product if unbiased else cross[:, p] + (own[:, a] * own[:, b]).sum(-1) + product)
        less.append(2 / (n - 2 if unbiased else n) * (rows[:, a] * rows[:, b]).sum(-1))
    return torch.stack(more, 1), torch.stack(less, 1), totals


def hsic_terms_backward(
    grad_more: Tensor | None, grad_less: Tensor | None, rows: Tensor, shift: Tensor, diagonals: Tensor, totals: Tensor,
    pairs: Sequence[int], unbiased: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of rows, cross and diagonals."""
    n, none = rows.shape[-1], rows.new_zeros(len(rows), len(pairs) // 2)
    grad_more, grad_less = (none if grad is None else grad for grad in (grad_more, grad_less))
    own = diagonals - shift[..., None]
    rows = rows if unbiased else rows + own
    # not `totals`, which have no gradient
    of_product = grad_more[..., None] * rows.sum(-1)[:, None] / ((n - 1) * (n - 2) if unbiased else n**2)
    of_rows = grad_less * (2 / (n - 2 if unbiased else n))
    grads = [torch.zeros_like(rows[:, 0]) for _ in range(rows.shape[1])]
    grad_own = list(grads)
    for p, (a, b) in enumerate(zip(pairs[::2], pairs[1::2], strict=True)):
        for m, other in ((a, b), (b, a)):
            grads[m] = grads[m] + of_product[:, p, other, None] + of_rows[:, p, None] * rows[:, other]
            grad_own[m] = grad_own[m] + grad_more[:, p, None] * own[:, other]
    grad_rows = torch.stack(grads, 1)
    grad_diagonals = torch.zeros_like(grad_rows) if unbiased else grad_rows + torch.stack(grad_own, 1)
    return grad_rows, grad_more.clone(), grad_diagonals


def hsic_permuted(gram_x: Tensor, gram_y: Tensor, permutations: Tensor) -> Tensor:
    """(R,) float64 sums over i != j of K[i, j] L[p[i], p[j]], one for each row p of permutations (R, n)."""
    k = gram_x.double().fill_diagonal_(0) if gram_x.dtype != torch.float64 else gram_x.clone().fill_diagonal_(0)
    sums = [(k * gram_y[p][:, p]).sum() for p in permutations.long()]
    return torch.stack(sums) if sums else k.new_zeros(0)
