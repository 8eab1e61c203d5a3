"""Largest gaps of random points on a circle, counted: the trials behind `pyflow.stats.sector_probability_mc`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from .._backend import call, register, runs_reference
from .._schemas import PURPOSES
from ..reference import sector as ref
from ._transforms import one_by_one
from .noise import seed_tensor, step_tensor


def sector_counts(
    thresholds: Tensor, points: int, trials: int, *, seed: int | Tensor | None, step: int | Tensor = 0
) -> Tensor:
    """How many of `trials` sets of random points on a circle have a largest gap that reaches each threshold.

    The gaps between n uniform points are n exponential variables over their sum: a trial keeps one minimum and one
    sum, nothing is sorted, and memory depends on neither points nor trials.

    Args:
        thresholds: float64 of any shape, shares of the circle.
        points: on the circle, at least 1.
        trials: at least 1; all thresholds share them.
        seed: integer or 0-d int64 tensor on the device; None draws one from torch's default generator.
        step: integer in [0, 2**56) or 0-d int64 tensor: another step is further, independent trials.

    Returns:
        int64 of the shape of thresholds.

    Raises:
        TypeError: thresholds that are no float64 tensor, points, trials or a seed that are no integers.
        ValueError: points or trials below 1, a seed that is not 0-d, a step outside the range, another device.

    Notes:
        The same counts on every backend and any number of threads for a seed: logarithms in float32, sums of them in
        integers of 2**-24. Nothing is read by the host. Not differentiable.

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


# what the estimate of the probability shares


def counts_for(op: str, thresholds: Tensor, points: int, trials: int, seed: object, step: object) -> Tensor:
    """The counts, for the public function `op`, which has checked all but seed and step."""
    thresholds = thresholds.detach()
    # the seed last: a call that is refused draws none
    step = step_tensor(op, step, thresholds.device)
    seed = seed_tensor(op, seed, (), thresholds.device, "cpu")
    purpose = PURPOSES.index("monte_carlo")
    if runs_reference("sector_counts", thresholds):
        return ref.sector_counts(thresholds, points, trials, seed, step, purpose=purpose)
    return call("sector_counts", thresholds, points, trials, seed, step, purpose)


def count(op: str, name: str, value: object) -> int:
    """`value` as an integer of at least 1, or a symbol of one while traced."""
    if isinstance(value, torch.SymInt):
        return value
    value = check.at_least(op, name, value, 1)
    if value >= 2**60:
        raise ValueError(f"{op}: {name} must be below 2**60, got {value}")
    return value


# what torch must know of the operator, arguments in the order of its schema


def _reference(thresholds, points, trials, seed, step, purpose):
    return ref.sector_counts(thresholds, points, trials, seed, step, purpose=purpose)


def _fake(thresholds, points, trials, seed, step, purpose):
    return thresholds.new_empty(thresholds.shape, dtype=torch.int64)


def _vmap(info, in_dims, thresholds, points, trials, seed, step, purpose):
    def one(thresholds, seed, step):
        return (torch.ops.pyflow.sector_counts(thresholds, points, trials, seed, step, purpose),)

    dims = (in_dims[0], *in_dims[3:5])
    return one_by_one(info, dims, one, (thresholds, seed, step))[0], 0


register("sector_counts", "sector", reference=_reference, fake=_fake, vmap=_vmap)
