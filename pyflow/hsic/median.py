"""The median distance between rows: the bandwidth where the user names none."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from ..ops.noise import uniform
from .powers import levelled, times_two_to

MEDIAN_ROWS = 1000
# Median distances below the first number may come from squares that underflow, if there are entries below the second:
# others are equal or differ by more.
UNDERFLOW = {torch.float32: (2.0**-50, 2.0**-25), torch.float64: (2.0**-480, 2.0**-426)}


def median_distance(x: Tensor, p: float = 2.0) -> Tensor:
    """Return the median distance between rows (as numpy.median), or their mean if it is 0, or 1 if both are 0.

    Args:
        x: (..., n, d); above 1,000 rows, 1,000 fixed random rows are used, the same for every batch item.
        p: 2 for Euclidean distances, 1 for sums of absolute differences.

    Returns:
        (...) of x's dtype.
    """
    n = x.shape[-2]
    if n < 2:
        return x.new_ones(x.shape[:-2])
    if n > MEDIAN_ROWS:
        rows = uniform((n,), seed=0, device=x.device).topk(MEDIAN_ROWS).indices
        x = x.index_select(-2, rows)
    flat = [_median_distance(one, p) for one in x.reshape(-1, *x.shape[-2:])]
    return torch.stack(flat).reshape(x.shape[:-2]) if flat else x.new_ones(x.shape[:-2])


def _median_distance(x: Tensor, p: float) -> Tensor:
    distances = torch.pdist(x, p)
    count = len(distances)
    upper = distances.kthvalue(count // 2 + 1).values
    if count % 2 == 0:
        below = distances < upper
        largest_below = torch.where(below, distances, 0.0).amax()
        lower = torch.where(below.sum() == count // 2, largest_below, upper)
        upper = (lower + upper) / 2
    if check.values_are_checked(x) and upper.item() < UNDERFLOW[x.dtype][0]:
        size = x.abs()
        if bool(((size > 0) & (size < UNDERFLOW[x.dtype][1])).any()):
            upper = _small_median(x, p)
    mean = distances.mean()
    return torch.where(upper > 0, upper, torch.where(mean > 0, mean, torch.ones_like(mean)))


def _small_median(x: Tensor, p: float) -> Tensor:
    """Return the median distance of rows whose squared distances underflow next to the largest row."""
    rows, exponent = levelled(x)
    distances = torch.pdist(rows, p)
    count = len(distances)
    middle = distances.sort().values[(count - 1) // 2 : count // 2 + 1].mean()
    return times_two_to(middle, exponent).to(x.dtype)
