"""The probability that random points of a disc lie inside one sector: exact, and estimated from trials."""

from __future__ import annotations

import numbers
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .. import _backend, _native
from .. import _checks as check
from ..ops.sector import count, counts_for
from ..reference import sector as ref
from ._inputs import numbers_of, same

# angles below this lose digits in a division
TINY = 2.0**-900


class SectorEstimate(NamedTuple):
    """Estimate of a sector probability; the first three fields have the type and shape of theta.

    Attributes:
        probability: count / trials.
        standard_error: sqrt(p (1 - p) / trials) with p = (count + 1) / (trials + 2), so that it is never 0.
        count: number of trials in which all points were inside a sector.
        trials: number of trials.
    """

    probability: float | np.ndarray | Tensor
    standard_error: float | np.ndarray | Tensor
    count: int | np.ndarray | Tensor  # type: ignore[assignment]  # hides tuple.count
    trials: int

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SectorEstimate):
            return NotImplemented
        return all(same(a, b) for a, b in zip(self, other, strict=True))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.trials)


def sector_probability(
    n: int | ArrayLike | Tensor, theta: float | ArrayLike | Tensor, *, complement: bool = False, log: bool = False
) -> float | np.ndarray | Tensor:
    """Probability that n uniform points of a disc all lie inside some sector of angle theta.

    With x = 1 - theta / 2 pi, P = sum over k >= 1, k x < 1, of (-1)^(k-1) C(n, k) (1 - k x)^(n-1); for theta <= pi
    this is n (theta / 2 pi)^(n-1).

    Args:
        n: number of points, integers of at least 1.
        theta: angle in radians, finite; broadcasts with n.
        complement: return 1 - P.
        log: return the natural logarithm; also valid where the probability is below the smallest float64.

    Returns:
        float64: a float if n and theta are numbers, a tensor (on the same device) if one of them is a tensor, else an
        array.

    Raises:
        TypeError: n that is not integer, theta that is not real.
        ValueError: n below 1, theta not finite, shapes that do not broadcast, tensors on two devices.

    Notes:
        P and 1 - P each have a relative error of at most 1e-12 (largest measured: 5e-14) for n <= 10,000 and values
        above 1e-250, however close to 0 or 1. Where the sum cancels, 1 - P comes from a recurrence of positive terms in
        time n^1.5: half a millisecond at n = 10,000. n = 1 gives 1 for every theta > 0, theta <= 0 gives 0,
        theta >= 2 pi gives 1. Computed on the CPU by one thread; not differentiable.

    Source:
        Stevens 1939, Solution to a geometrical problem in probability; de Boor 1972, On calculating with B-splines.

    Example:
        >>> import math
        >>> round(sector_probability(4, math.pi), 12)  # four ducks, half a pond
        0.5
        >>> sector_probability([50, 100, 400], 6.0, complement=True).round(6).tolist()
        [5.1e-05, 0.307843, 0.999996]
        >>> round(sector_probability(10000, 6.28, complement=True, log=True), 6)
        -69.02574
    """
    op = "sector_probability"
    complement, log = check.flag(op, "complement", complement), check.flag(op, "log", log)
    device = _device(op, n=n, theta=theta)
    points, angle = _points(op, n), _angle(op, theta)
    try:
        points, angle = np.broadcast_arrays(points, angle)
    except ValueError:
        raise ValueError(f"{op}: n and theta must broadcast, got {points.shape} and {angle.shape}") from None
    flat = points.ravel(), angle.ravel()
    if _backend.cpu_missing is None and _backend.current() != "reference":
        values = _native.sector_probability(*flat, complement, log)
    else:
        values = np.array(
            [ref.sector_probability(int(a), float(b), complement, log) for a, b in zip(*flat, strict=True)], float
        )
    if log and not complement:
        # theta / 2 pi would underflow: subtract logarithms instead
        tiny = (flat[1] > 0) & (flat[1] < TINY)
        n_of, theta_of = flat[0][tiny], flat[1][tiny]
        values[tiny] = np.log(n_of) + (n_of - 1) * (np.log(theta_of) - np.log(ref.TWO_PI[0]))
    values = values.reshape(points.shape)
    if device is not None:
        return torch.from_numpy(values).to(device)
    return values.item() if np.isscalar(n) and np.isscalar(theta) else values


def sector_probability_mc(
    n: int,
    theta: float | ArrayLike | Tensor,
    trials: int,
    seed: int | Tensor | None = None,
    *,
    step: int | Tensor = 0,
    device: torch.device | str | None = None,
) -> SectorEstimate:
    """Estimate of `sector_probability`: the fraction of trials whose largest gap is at least 2 pi - theta.

    Args:
        n: number of points, at least 1.
        theta: angles in radians, finite; all angles share the trials.
        trials: number of trials, at least 1.
        seed: integer or 0-d int64 tensor on the device; None draws one from torch's default generator.
        step: integer in [0, 2**56) or 0-d int64 tensor; different steps of a seed give independent trials.
        device: device of the trials; defaults to the device of a tensor theta, else the CPU.

    Returns:
        SectorEstimate of numbers for a number theta, of arrays for an array and of tensors for a tensor.

    Raises:
        TypeError: n, trials or seed that are not integers, theta that is not real.
        ValueError: n or trials below 1, theta not finite, a device other than theta's, a step out of range.

    Notes:
        A trial keeps only the smallest of n words and one sum: memory depends on neither n nor trials, and nothing is
        sorted. A seed gives the same counts on every backend, device and number of threads.

    Source:
        Stevens 1939; Holst 1980, On the lengths of the pieces of a stick broken at random.

    Example:
        >>> estimate = sector_probability_mc(4, torch.pi, 100000, seed=0)
        >>> abs(estimate.probability - 0.5) < 4 * estimate.standard_error
        True
    """
    op = "sector_probability_mc"
    n, trials = count(op, "n", n), count(op, "trials", trials)
    if isinstance(theta, Tensor):
        angle = _checked_tensor(op, theta).double()
        if device is not None and torch.empty(0, device=check.device(op, device)).device != angle.device:
            raise ValueError(f"{op}: device must be that of theta, {angle.device}, got {device}")
    else:
        device = torch.device("cpu") if device is None else check.device(op, device)
        if device.type == "meta":
            raise ValueError(f"{op}: device must hold values, got meta")
        angle = torch.from_numpy(np.array(_angle(op, theta))).to(device)
    high, low = ref.TWO_PI
    x = ((high - angle) + low) / high
    # the largest gap is above 0 and at most the circle: 2 never counts, 0 always
    x = torch.where(angle <= 0, 2.0, torch.where(angle > high, 0.0, x))
    found = counts_for(op, x, n, trials, seed, step)
    counts: Tensor | np.ndarray = found if isinstance(theta, Tensor) else found.cpu().numpy()
    wide = counts.astype(float) if isinstance(counts, np.ndarray) else counts.double()
    share, near = wide / trials, (wide + 1) / (trials + 2)
    error = (near * (1 - near) / trials) ** 0.5
    if np.isscalar(theta):
        return SectorEstimate(share.item(), error.item(), int(counts.item()), trials)
    return SectorEstimate(share, error, counts, trials)


def _device(op: str, **values: object) -> torch.device | None:
    """Return the device of the tensors among the values; None without tensors."""
    devices = {value.device for value in values.values() if isinstance(value, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"{op}: n and theta must be on one device, got {' and '.join(sorted(map(str, devices)))}")
    return next(iter(devices), None)


def _array(op: str, name: str, value: object, kind: type, dtype: type, rule: str) -> np.ndarray:
    if not isinstance(value, Tensor):
        return numbers_of(op, name, value, kind, dtype, rule)
    check.tensor(op, name, value)
    if value.is_meta:
        raise ValueError(f"{op}: {name} must have values, got a meta tensor")
    return value.detach().cpu().resolve_neg().numpy()


def _points(op: str, n: object) -> np.ndarray:
    if isinstance(n, Tensor):
        check.integer_tensor(op, "n", n)
    points = _array(op, "n", n, numbers.Integral, np.int64, "be integers")
    if points.size and points.dtype.kind not in "iu":
        raise TypeError(f"{op}: n must be integers, got {_kind(points)}")
    least, most = (points.min(), points.max()) if points.size else (1, 1)
    if least < 1 or most >= 2**53:
        rule = "at least 1" if least < 1 else "below 2**53"
        raise ValueError(f"{op}: n must be {rule}, got {least if least < 1 else most}")
    return points.astype(np.int64)


def _angle(op: str, theta: object) -> np.ndarray:
    if isinstance(theta, Tensor):
        theta = _checked_tensor(op, theta, values=False).double()
    angle = _array(op, "theta", theta, numbers.Real, np.float64, "be real numbers")
    if angle.dtype.kind not in "iuf":
        raise TypeError(f"{op}: theta must be real numbers, got {_kind(angle)}")
    angle = angle.astype(np.float64)
    wrong = angle[~np.isfinite(angle)]
    if wrong.size:
        raise ValueError(f"{op}: theta must be finite, got {wrong[0]}")
    return angle


def _checked_tensor(op: str, theta: Tensor, values: bool = True) -> Tensor:
    check.tensor(op, "theta", theta)
    if theta.is_complex() or theta.dtype == torch.bool:
        raise TypeError(f"{op}: theta must be real numbers, got {check.short(theta.dtype)}")
    if values and check.values_are_checked(theta) and not bool(theta.isfinite().all()):
        raise ValueError(f"{op}: theta must be finite, got {theta[~theta.isfinite()][0].item()}")
    return theta.detach()


def _kind(array: np.ndarray) -> str:
    return type(array.item()).__name__ if array.dtype.kind == "O" and array.ndim == 0 else str(array.dtype)
