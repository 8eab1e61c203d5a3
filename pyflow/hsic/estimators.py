"""Estimates of HSIC from sums over the tiles of kernel matrices, and what they are divided or multiplied by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from .._operators import OPERATORS
from .._schemas import HSIC_KERNELS
from ..reference import matmul
from . import offset
from .kernels import UNIT_DIAGONAL, Variable
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


class Estimates(NamedTuple):
    """HSIC of every pair of variables, and for variables with themselves how reliable it is."""

    value: Tensor  # (*batch, P) float64
    lost: Sequence[Tensor | None]  # (*batch) bool per pair: the value may be pure rounding error; None: it is not
    added: Sequence[Tensor | None]  # sum of the absolute values of the terms


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
    value, every_lost, _ = estimates(of)
    zeros = [
        [zero for zero in (lost, *(of.every[m].constant for m in {*pair})) if zero is not None]
        for pair, lost in zip(of.pairs, every_lost, strict=True)
    ]
    if not any(zeros):
        return value
    result = list(value.unbind(-1))
    for p, of_pair in enumerate(zeros):
        for zero in of_pair:
            result[p] = torch.where(zero, 0.0, result[p])
    return torch.stack(result, -1)


def estimates(of: Pairs, *, with_added: bool = False) -> Estimates:
    """Return the estimates of every pair of variables, for the kernels of z.

    `added` is None if the covariance form is used (linear kernels).
    """
    op, every, pairs, estimator, allow_tf32, sums = of
    n = every[0].z.shape[-2]
    none: list[Tensor | None] = [None] * len(pairs)
    if all(v.linear for v in every):
        used = [every[m] for pair in pairs for m in pair]
        widths = [(a.z.shape[-1], b.z.shape[-1]) for a, b in zip(used[::2], used[1::2], strict=True)]
        if sum(a * b for a, b in widths) < n * sum(v.z.shape[-1] for v in every) / 2:
            found = [_of_covariance(every[a], every[b], estimator, a == b) for a, b in pairs]
            return Estimates(torch.stack([value for value, _ in found], -1), [lost for _, lost in found], none)
    more, less = _terms(op, every, pairs, estimator, *sums(op, every, pairs, allow_tf32))
    more, less = _without_offsets(of, more, less)
    over = divisor(n, estimator)
    own = [(p, every[a]) for p, (a, b) in enumerate(pairs) if a == b]
    every_lost, added = list(none), list(none)
    for p, v in own:
        every_lost[p] = _lost(v, more[..., p], less[..., p], over)
        added[p] = (more[..., p] + less[..., p]) / over if with_added else None
    return Estimates((more - less) / over, every_lost, added)


def _terms(
    op: str, every: Sequence[Variable], pairs: Sequence[tuple[int, int]], estimator: str, rows: Tensor, cross: Tensor,
    shift: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (more, less) (*batch, P) from the sums, with HSIC = (more - less) / divisor."""
    batch, flat = rows.shape[:-2], [m for pair in pairs for m in pair]
    if all(HSIC_KERNELS[v.kernel] in UNIT_DIAGONAL for v in every):
        diagonals = every[0].diagonal.unsqueeze(-2).expand(rows.shape)
    else:
        diagonals = torch.stack([v.diagonal for v in every], -2)
    sums = (t.reshape(-1, *t.shape[len(batch) :]) for t in (rows, cross, shift, diagonals))
    more, less, _ = OPERATORS["hsic_terms"].pick(op, rows)(*sums, flat, estimator == "unbiased")
    return more.reshape(*batch, len(pairs)), less.reshape(*batch, len(pairs))


def _without_offsets(of: Pairs, more: Tensor, less: Tensor) -> tuple[Tensor, Tensor]:
    """Replace the terms of polynomial kernels whose rows are far from 0 by those of smaller entries."""
    every_far = [offset.far_from_zero(v) for v in of.every]
    if all(far is None for far in every_far):
        return more, less
    # items are computed alone, so that an item's bits do not depend on its batch
    items = [[False] * more[..., 0].numel() if far is None else far.flatten().tolist() for far in every_far]
    made = [[list(column) for column in t.reshape(-1, len(of.pairs)).unbind(0)] for t in (more, less)]
    for p, (a, b) in enumerate(of.pairs):
        for i, far in enumerate(zip(items[a], items[b], strict=True)):
            if any(far):
                v, w = offset.item(of.every[a], i), offset.item(of.every[b], i)
                made[0][i][p], made[1][i][p] = offset.terms(v, w, of.estimator == "unbiased", far)
    more, less = (torch.stack([torch.stack(row) for row in t]).reshape(more.shape) for t in made)
    return more, less


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


def _of_covariance(x: Variable, y: Variable, estimator: str, same: bool) -> tuple[Tensor, Tensor | None]:
    """Return HSIC of linear kernels from the squared entries of the covariance matrix, and whether it may be lost."""
    n = x.z.shape[-2]
    over = divisor(n, estimator)
    if estimator != "unbiased":
        return matmul(x.z.mT, y.z).double().square().sum((-2, -1)) / over, None
    # what is subtracted below may be nearly all of the covariance, and needs columns that sum to 0
    of_x, of_y = _centred(x.z), _centred(y.z)
    total = matmul(of_x.mT, of_y).square().sum((-2, -1))
    a, b = of_x.square().sum(-1), of_y.square().sum(-1)
    ab = (a * b).sum(-1)
    product, less = a.sum(-1) * b.sum(-1) / ((n - 1) * (n - 2)), 2 / (n - 2) * ab
    value = (total - ab + product - less) / over
    eps = chain(n)
    return value, ab + less >= (total + product) * ((1 - eps) / (1 + eps)) if same else None


def _centred(z: Tensor) -> Tensor:
    z = z.double()
    return z - z.mean(-2, keepdim=True)


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
