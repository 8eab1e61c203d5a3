"""Estimates of HSIC from sums over the tiles of kernel matrices, and what they are divided or multiplied by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from .._schemas import HSIC_KERNELS
from ..reference import matmul
from .kernels import Variable
from .powers import times_two_to

ESTIMATORS = ("biased", "biased_n2", "unbiased")
EPS = torch.finfo(torch.float64).eps

# (op, variables, pairs, allow_tf32) -> row sums, sums of products, shift: `pyflow.ops.hsic.sums`, or the same in parts
TileSums = Callable[[str, Sequence[Variable], Sequence[tuple[int, int]], bool], tuple[Tensor, Tensor, Tensor]]


class Pairs(NamedTuple):
    """Pairs of variables, and how their HSIC is estimated."""

    op: str  # public function that errors come from
    every: Sequence[Variable]
    pairs: Sequence[tuple[int, int]]  # indices of variables
    estimator: str
    allow_tf32: bool
    sums: TileSums


class Estimate(NamedTuple):
    """HSIC of two variables, (*batch) float64; for a variable with itself also how reliable it is."""

    value: Tensor
    lost: Tensor | None = None  # bool: the value may be pure rounding error; None: it is not
    added: Tensor | None = None  # sum of the absolute values of the terms


def rows_needed(op: str, n: int, estimator: str) -> None:
    check.choice(op, "estimator", estimator, ESTIMATORS)
    least = 4 if estimator == "unbiased" else 2
    if n < least:
        raise ValueError(f"{op}: the {estimator} estimator needs at least {least} rows, got {n}")


def divisor(n: int, estimator: str) -> int:
    """Return the divisor of the sum of products of centred matrices."""
    if estimator == "unbiased":
        return n * (n - 3)
    return n**2 if estimator == "biased_n2" else (n - 1) ** 2


def values(of: Pairs) -> Tensor:
    """Return HSIC of every pair of variables, (*batch, P) float64, for the kernels of z.

    The value is 0 if all rows of a variable are equal, and for a variable with itself if it is not above its rounding
    error.
    """
    result = []
    for (a, b), (value, lost, _) in zip(of.pairs, estimates(of), strict=True):
        if lost is not None:
            value = torch.where(lost, 0.0, value)
        for m in {a, b}:
            constant = of.every[m].constant
            if constant is not None:
                value = torch.where(constant, 0.0, value)
        result.append(value)
    return torch.stack(result, -1)


def estimates(of: Pairs, *, with_added: bool = False) -> list[Estimate]:
    """Return the estimate of every pair of variables, for the kernels of z.

    `added` is None if the covariance form is used (linear kernels).
    """
    op, every, pairs, estimator, allow_tf32, sums = of
    n = every[0].z.shape[-2]
    if all(v.linear for v in every):
        used = [every[m] for pair in pairs for m in pair]
        widths = [(a.z.shape[-1], b.z.shape[-1]) for a, b in zip(used[::2], used[1::2], strict=True)]
        if sum(a * b for a, b in widths) < n * sum(v.z.shape[-1] for v in every) / 2:
            return [_of_covariance(every[a], every[b], estimator, a == b) for a, b in pairs]
    rows, cross, shift = sums(op, every, pairs, allow_tf32)
    diagonals = [v.diagonal - shift[..., m, None] for m, v in enumerate(every)]
    result = []
    for p, (a, b) in enumerate(pairs):
        more, less, over = _terms(
            cross[..., p], rows[..., a, :], rows[..., b, :], diagonals[a], diagonals[b], estimator
        )
        value = (more - less) / over
        if a != b:
            result.append(Estimate(value))
        else:
            added = (more + less) / over if with_added else None
            result.append(Estimate(value, _lost(every[a], more, less, over), added))
    return result


def _lost(v: Variable, more: Tensor, less: Tensor, over: int) -> Tensor:
    """Whether HSIC of v with itself, (more - less) / over, may be pure rounding error."""
    n = v.z.shape[-2]
    # n^2 terms are added in float64; errors of entries have random signs, so that their squares add up
    entry = (v.degree * torch.finfo(v.z.dtype).eps) ** 2
    rounding = chain(n) + entry
    most = more * ((1 - rounding) / (1 + rounding))
    if HSIC_KERNELS[v.kernel] == "polynomial":
        # the rounding error of a dot product is relative to the lengths of both rows
        most = most - entry * over * (v.diagonal.sum(-1) / n).square()
    return less >= most


def chain(n: int) -> float:
    """Bound the relative rounding error of two float64 sums over n^2 terms, row sums first, with a factor of two."""
    return 4 * EPS * (2 * n)


def _terms(
    cross: Tensor, k: Tensor, m: Tensor, diag_k: Tensor, diag_l: Tensor, estimator: str
) -> tuple[Tensor, Tensor, int]:
    """Return (more, less, over) with HSIC = (more - less) / over; all three are positive if K = L.

    `cross` is the sum of K_ij L_ij over i != j, k and m are the row sums of K and L without the diagonals diag_k and
    diag_l; all float64.
    """
    n = k.shape[-1]
    if estimator == "unbiased":
        product = k.sum(-1) * m.sum(-1) / ((n - 1) * (n - 2))
        return cross + product, 2 / (n - 2) * (k * m).sum(-1), divisor(n, estimator)
    k, m = k + diag_k, m + diag_l
    more = cross + (diag_k * diag_l).sum(-1) + k.sum(-1) * m.sum(-1) / n**2
    return more, 2 / n * (k * m).sum(-1), divisor(n, estimator)


def _of_covariance(x: Variable, y: Variable, estimator: str, same: bool) -> Estimate:
    """Return HSIC of linear kernels from the squared entries of the covariance matrix."""
    n = x.z.shape[-2]
    over = divisor(n, estimator)
    total = matmul(x.z.mT, y.z).double().square().sum((-2, -1))
    if estimator != "unbiased":
        return Estimate(total / over)
    a, b = x.diagonal, y.diagonal
    ab = (a * b).sum(-1)
    product, less = a.sum(-1) * b.sum(-1) / ((n - 1) * (n - 2)), 2 / (n - 2) * ab
    value = (total - ab + product - less) / over
    # the covariance is computed in the dtype of x
    eps = torch.finfo(x.z.dtype).eps
    return Estimate(value, ab + less >= (total + product) * ((1 - eps) / (1 + eps)) if same else None)


def ratio(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """xy / sqrt(xx yy), or 0 where xx or yy is not positive."""
    undefined = (xx <= 0) | (yy <= 0)
    # replaced before the division, so that gradients contain no NaN
    xx, yy = xx.masked_fill(undefined, 1), yy.masked_fill(undefined, 1)
    return (xy / (xx.sqrt() * yy.sqrt())).masked_fill(undefined, 0)


def whole(value: Tensor, *every: Variable) -> Tensor:
    """Convert (*batch) float64 HSIC of the kernels of z into HSIC of the user's kernels."""
    exponents = [v.exponent for v in every if v.exponent is not None]
    return times_two_to(value, sum(exponents[1:], exponents[0])) if exponents else value
