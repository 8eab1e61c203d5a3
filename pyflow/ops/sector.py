"""Monte Carlo counts of the largest gap between random points on a circle, for `stats.sector_probability_mc`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._operators import register
from .._schemas import PURPOSES
from ..reference import sector as ref
from .noise import seed_tensor, step_tensor


def sector_counts(
    thresholds: Tensor, points: int, trials: int, *, seed: int | Tensor | None, step: int | Tensor = 0
) -> Tensor:
    """Count the sets of random points on a circle whose largest gap reaches each threshold.

    The gaps between n uniform points are distributed as n exponential variables divided by their sum. A trial keeps
    one minimum and one sum; nothing is sorted, and memory does not depend on points or trials.

    Args:
        thresholds: float64 of any shape, as fractions of the circle.
        points: number of points on the circle, at least 1.
        trials: number of sets, at least 1; all thresholds use the same sets.
        seed: integer or 0-d int64 tensor on the device; None draws one from torch's default generator.
        step: integer in [0, 2**56) or 0-d int64 tensor; another step gives independent trials.

    Returns:
        int64 of the shape of thresholds.

    Raises:
        TypeError: thresholds is not a float64 tensor; points, trials or seed is not an integer.
        ValueError: points or trials below 1, a seed that is not 0-d, a step outside its range, different devices.

    Notes:
        A seed gives the same counts on every backend and with any number of threads: logarithms are float32 and are
        summed as integer multiples of 2**-24. No host sync. Not differentiable.

    Source:
        Holst 1980, On the lengths of the pieces of a stick broken at random; Salmon et al. 2011 (Philox4x32-10).

    Example:
        >>> sector_counts(torch.tensor([0.5], dtype=torch.float64), 4, 10000, seed=0).tolist()
        [5027]
    """
    op = "sector_counts"
    check.float_tensor(op, "thresholds", thresholds)
    if thresholds.dtype != torch.float64:
        raise TypeError(f"{op}: thresholds must be float64, got {check.short(thresholds.dtype)}")
    points, trials = count(op, "points", points), count(op, "trials", trials)
    return counts_for(op, thresholds, points, trials, seed, step)


def counts_for(
    op: str, thresholds: Tensor, points: int, trials: int, seed: int | Tensor | None, step: int | Tensor
) -> Tensor:
    """Return the counts for the public function `op`, which has checked all arguments except seed and step."""
    thresholds = thresholds.detach()
    # the seed is checked last, so that a call that raises does not draw one
    step = step_tensor(op, step, thresholds.device)
    seed = seed_tensor(op, seed, (), thresholds.device, "cpu")
    purpose = PURPOSES.index("monte_carlo")
    return _counts.pick("sector_counts", thresholds)(thresholds, points, trials, seed, step, purpose)


def count(op: str, name: str, value: object) -> int:
    """Return `value` as an integer of at least 1; a symbolic integer of a trace is returned unchecked."""
    if isinstance(value, torch.SymInt):
        symbol: Any = value
        return symbol
    value = check.at_least(op, name, value, 1)
    if value >= 2**60:
        raise ValueError(f"{op}: {name} must be below 2**60, got {value}")
    return value


# registration with torch


def _reference(purpose, **arguments):
    return ref.sector_counts(**arguments, purpose=PURPOSES.index(purpose))


_counts = register(
    "sector_counts", "sector", reference=_reference,
    fake=lambda thresholds, *rest: thresholds.new_empty(thresholds.shape, dtype=torch.int64),
)  # fmt: skip


def warmup(x: Tensor, **other: Any) -> list[Tensor]:
    sector_counts(torch.zeros(1, dtype=torch.float64, device=x.device), 4, 1, seed=0)
    return []
