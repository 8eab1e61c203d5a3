"""Probability that n points lie in one sector, in numpy (closed form) and plain torch (random trials).

A double-double number is the sum of a pair of floats (`Pair`). `Scaled` adds an exponent of two, against overflow.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .noise import MASK, log, philox

Pair = tuple[float, float]
Scaled = tuple[Pair, int]

TWO_PI: Pair = (6.283185307179586, 2.4492935982947064e-16)
LN2 = 0.6931471805599453
LEVELS = 8  # recurrence levels between two updates of the window
LANES = 2**16  # trials per batch


# double-double arithmetic


def two_sum(a: float, b: float) -> Pair:
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def negated(a: Pair) -> Pair:
    return -a[0], -a[1]


def add(a: Pair, b: Pair) -> Pair:
    high, low = two_sum(a[0], b[0]), two_sum(a[1], b[1])
    total = two_sum(high[0], high[1] + low[0])
    return two_sum(total[0], total[1] + low[1])


def split(a: float) -> Pair:
    t = 134217729.0 * a
    high = t - (t - a)
    return high, a - high


def mul(a: Pair, b: Pair) -> Pair:
    p, (a0, a1), (b0, b1) = a[0] * b[0], split(a[0]), split(b[0])
    error = ((a0 * b0 - p) + a0 * b1 + a1 * b0) + a1 * b1
    return two_sum(p, error + (a[0] * b[1] + a[1] * b[0]))


def div(a: Pair, b: Pair) -> Pair:
    q = a[0] / b[0]
    rest = add(a, negated(mul(b, (q, 0.0))))
    more = rest[0] / b[0]
    rest = add(rest, negated(mul(b, (more, 0.0))))
    return add(two_sum(q, more), (rest[0] / b[0], 0.0))


def scaled(a: Pair, exponent: int = 0) -> Scaled:
    value, e = math.frexp(a[0])
    return (value, math.ldexp(a[1], -e)), exponent + e


def power(base: Pair, n: int) -> Scaled:
    (square, e), (result, exponent) = scaled(base), ((1.0, 0.0), 0)
    while True:
        if n & 1:
            result, exponent = scaled(mul(result, square), exponent + e)
        n >>= 1
        if not n:
            return result, exponent
        square, e = scaled(mul(square, square), 2 * e)


def rounded(a: Scaled) -> float:
    return math.ldexp(a[0][0], a[1])


# closed form; csrc/ops/sector.h derives it


def leading_sum(n: int, share: Pair, x: Pair) -> float:
    """Stevens' sum divided by its first term; share = theta / (2 pi)."""
    total = choices = 1.0
    for k in range(2, n + 1):
        rest = add(share, negated(mul(x, (k - 1.0, 0.0))))
        if rest[0] <= 0:
            break
        choices *= -(n - k + 1) / k
        term = choices * rounded(power(div(rest, share), n - 1))
        total += term
        if abs(term) < 1e-18:
            break
    return total


def tilted_mean(slope: float) -> float:
    """Mean of the density proportional to exp(-slope u) on [0, 1]."""
    return 1 / slope - math.exp(-slope) / -math.expm1(-slope)


def slope_at(mean: float) -> float:
    """Return the slope whose `tilted_mean` is `mean` (at most 1/2), by Newton's method."""
    y, least = 1 - 2 * mean, 1e-5
    slope = max(2 * y * (3 - y * y) / (1 - y * y), least)
    for _ in range(4):
        e, d = math.exp(-slope), -math.expm1(-slope)
        slope = max(slope - (tilted_mean(slope) - mean) / (e / (d * d) - 1 / (slope * slope)), least)
    return slope


def spline(n: int, t: Pair) -> Scaled:
    """g_n(t) by g_m(t) = t g_(m-1)(t) + (m - t) g_(m-1)(t - 1), evaluated on a window around the largest terms."""
    last, slope = int(t[0]), slope_at(t[0] / n)
    at = t[0] - np.arange(last + 1.0)
    g = np.zeros(last + 2)
    g[last] = 1.0
    first, end, exponent, tilt, before = last, last + 1, 0, 0, 0.0
    m = 2
    while m <= n:
        stop, here = min(m + LEVELS, n + 1), m * tilted_mean(slope * m / n)
        width = 9.3 * math.sqrt(min(m / max(12, (slope * m / n) ** 2), (n - m) / 4)) + 16
        first = min(first, max(0, last - int(stop * tilted_mean(slope * stop / n) + width) - 1))
        end = min(end, last - max(0, int(here - width)) + 1)
        window, g[end] = g[first:end], 0.0
        wanted, middle = int(slope * m / n / LN2 + 0.5), last - int(here + 0.5)
        if wanted != tilt:
            window *= np.ldexp(1.0, np.clip((wanted - tilt) * (np.arange(first, end) - middle), -2000, 1000))
            exponent += (wanted - tilt) * middle
            tilt = wanted
        top = math.frexp(window.max())[1]
        window *= math.ldexp(1.0, -top)
        exponent += top
        scale = math.ldexp(1.0, -tilt)
        for level in range(m, stop):
            before = g[0] - scale * g[1]
            window[:] = at[first:end] * window + (level - at[first:end]) * (scale * g[first + 1 : end + 1])
        m = stop
    # first-order correction for the low part t[1]
    return scaled((float(g[0] * (1 + (n - 1) * before / g[0] * t[1])), 0.0), exponent)


def probabilities(n: int, theta: float) -> tuple[Scaled, Scaled]:
    """Return P and 1 - P."""
    zero, one = ((0.0, 0.0), 0), ((1.0, 0.0), 0)
    if theta <= 0:
        return zero, one
    if theta > TWO_PI[0]:
        return one, zero
    x = div(add(two_sum(TWO_PI[0], -theta), (TWO_PI[1], 0.0)), TWO_PI)
    share = div((theta, 0.0), TWO_PI)
    value, exponent = power(share, n - 1)
    first, exponent = scaled(mul(value, (float(n), 0.0)), exponent)
    if rounded((first, exponent)) <= 0.5:
        inside = (first[0] * leading_sum(n, share, x), 0.0), exponent
        return inside, ((1 - rounded(inside), 0.0), 0)
    inverse = div((1.0, 0.0), x)
    rest = add((float(n), 0.0), negated(inverse))
    if rest[0] <= 0:
        return one, zero
    t = min(inverse, rest)
    (g, e), (whole, of_whole) = power(t, n - 1) if t[0] < 1 else spline(n, t), power(inverse, n - 1)
    outside = (g[0] / whole[0], 0.0), e - of_whole
    return ((1 - rounded(outside), 0.0), 0), outside


def sector_probability(n: int, theta: float, complement: bool = False, log: bool = False) -> float:
    """Probability that n random points of a disc lie in one sector of angle theta."""
    inside, outside = probabilities(n, theta)
    asked, other = (outside, inside) if complement else (inside, outside)
    value = rounded(asked)
    if not log:
        return value
    if value > 0.5:
        return math.log1p(-rounded(other))
    return math.log(asked[0][0]) + asked[1] * LN2 if asked[0][0] else -math.inf


# the trials


def positive_uniform(word: Tensor) -> Tensor:
    """Convert words to uniforms in (0, 1]."""
    return (word.float() + 1.0) * 2.0**-32


def fixed_log(u: Tensor) -> Tensor:
    """Return -log(u) as an integer in units of 2**-24."""
    return (-log(u) * 2.0**24).to(torch.int64)


def sector_counts(thresholds: Tensor, points: int, trials: int, seed: Tensor, step: Tensor, *, purpose: int) -> Tensor:
    """Count the trials whose largest gap reaches each threshold. Gaps are exponential variables over their sum."""
    counts = torch.zeros(thresholds.shape, dtype=torch.int64, device=thresholds.device)
    key = seed & MASK, seed >> 32 & MASK
    step = step.to(seed.device)
    steps = step & MASK, (step >> 32 & 0xFFFFFF) | (purpose << 24)
    blocks = -(-points // 4)
    for begin in range(0, trials, LANES):
        trial = torch.arange(begin, min(begin + LANES, trials), device=thresholds.device)
        low, total = torch.full_like(trial, MASK), torch.zeros_like(trial)
        for block in range(blocks):
            counter = trial * blocks + block
            words = philox((counter & MASK, counter >> 32, *steps), key)
            used = words[: points - 4 * block]
            u = [positive_uniform(word) for word in used] + [
                torch.ones((), dtype=torch.float32, device=trial.device)
            ] * (4 - len(used))
            total += fixed_log((u[0] * u[1] * (u[2] * u[3])).clamp(min=2.0**-126))
            for word in used:
                low = torch.minimum(low, word)
        largest, total = fixed_log(positive_uniform(low)).double(), total.double()
        counts += (largest >= thresholds[..., None] * total).sum(-1)
    return counts
