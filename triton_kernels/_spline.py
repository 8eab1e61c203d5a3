"""Rational-quadratic splines of a tile of elements, one to a thread: csrc/ops/spline.h operation for operation.

The parameters of an element are loaded as a tile with a dim for them, neighbours by neighbouring threads, and turned
into a tuple of tiles in registers. So softmax, knots and search go bin by bin in the order of the C++ kernels: the same
bits. The two slopes of an element are loaded once its bin is known.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._schemas import SPLINE_VARIANTS
from ._math import constant, div, exp, exp_less, neg, softplus, sqrt
from ._plans import Words
from ._tiles import load, pointers, scalar, static, unpack

LINEAR, CIRCULAR, FREE, MIXED = (tl.constexpr(i) for i in range(4))
ZUKO = tl.constexpr(SPLINE_VARIANTS.index("zuko"))


class Spline(NamedTuple):
    """What is compiled into the kernels."""

    bins: int
    slopes: int  # numbers behind the slopes of an element
    variant: int
    ends: int  # LINEAR: outer slopes 1; CIRCULAR: the last slope is the first; FREE: of their own; MIXED: by feature
    tails: bool  # outside the bounds is the identity; without, nothing is
    features: int
    linear: tuple[int, ...]  # MIXED: a bit per feature, 31 in a word
    by_row: bool  # MIXED: the feature is the row's, not the column's
    inverse: bool
    rolled: bool  # too many bins for registers: loops over chunks of bins compute exponentials again
    chunk: int  # neighbouring parameters of a tile
    span: int  # tiles side by side that make a tile of _launch.cut


class Numbers(NamedTuple):
    """Constants passed by value, see SplineConstants in csrc/ops/spline.h."""

    bound: Words
    scale: Words
    limit: Words
    least: Words
    rest: Words
    min_slope: Words


class Element(NamedTuple):
    """The spline of each element of a tile: pointers to its parameters, and the ends of its domain and range."""

    at: Any
    step: Any
    inside: Any
    low: Any
    length: Any
    high: Any


class Axis(NamedTuple):
    """Widths or heights. `unit` is what the exponential of a logit less `most` is multiplied by, to become a part."""

    most: Any
    total: Any
    unit: Any
    first: Any  # of the parameters


class Bin(NamedTuple):
    x0: Any
    w: Any
    y0: Any
    h: Any
    d0: Any
    d1: Any


class Place(NamedTuple):
    """A place in a bin; terms of y and y'."""

    theta: Any
    s: Any
    rest: Any
    top: Any
    over: Any
    slope: Any


class Slope(NamedTuple):
    """A slope at an end of a bin, and the number behind it, if there is one."""

    index: Any
    given: Any
    number: Any
    value: Any


@triton.constexpr_function
def padded(count):
    """The next power of two."""
    return 1 << (count - 1).bit_length()


@triton.jit
def saturated(v, limit):
    return div(v, 1.0 + div(tl.abs(v), limit))


@triton.jit
def numbers_at(element, first, i0, COUNT: tl.constexpr, SPLINE: tl.constexpr, dtype: tl.constexpr):
    """COUNT numbers from bin i0 on, behind widths (first = 0) or heights (first = bins): a tuple of tiles."""
    j = i0 + tl.arange(0, static(padded(COUNT)))[None, None, :]
    at = element.at[:, :, None] + (j + first) * element.step
    return unpack(tl.load(at, mask=element.inside[:, :, None] & (j < SPLINE.bins)).to(dtype), COUNT)


@triton.jit
def all_numbers(element, first, SPLINE: tl.constexpr, dtype: tl.constexpr):
    numbers = ()
    for i in tl.static_range(0, static(SPLINE.bins), static(SPLINE.chunk)):
        numbers = numbers + numbers_at(element, first, i, static(min(SPLINE.chunk, SPLINE.bins - i)), SPLINE, dtype)
    return numbers


@triton.jit
def logits_of(raw, numbers, SPLINE: tl.constexpr):
    """The logits of widths or heights as the softmax takes them."""
    limit, scale = scalar(numbers.limit, raw[0].dtype) * 0.5, scalar(numbers.scale, raw[0].dtype)
    out = ()
    for i in tl.static_range(len(raw)):
        out = out + (saturated(raw[i], limit) if SPLINE.variant == ZUKO else raw[i] * scale,)
    return out


@triton.jit
def rates_of(raw, numbers, SPLINE: tl.constexpr):
    """Derivatives of `logits_of`."""
    limit, scale = scalar(numbers.limit, raw[0].dtype) * 0.5, scalar(numbers.scale, raw[0].dtype)
    out = ()
    for i in tl.static_range(len(raw)):
        if SPLINE.variant == ZUKO:
            rest = 1.0 + div(tl.abs(raw[i]), limit)
            out = out + (div(constant(1.0, rest), rest * rest),)
        else:
            out = out + (scale,)
    return out


@triton.jit
def exponentials(logits, i0, most, SPLINE: tl.constexpr):
    """The exponentials of bins from i0 on, 0 after the last one."""
    out = ()
    for i in tl.static_range(len(logits)):
        e = exp_less(logits[i] - most, 0.0)
        if SPLINE.rolled:
            e = tl.where(i0 + i < SPLINE.bins, e, 0.0)
        out = out + (e,)
    return out


@triton.jit
def exponentials_at(element, first, i0, most, numbers, SPLINE: tl.constexpr, dtype: tl.constexpr):
    raw = numbers_at(element, first, i0, static(SPLINE.chunk), SPLINE, dtype)
    return exponentials(logits_of(raw, numbers, SPLINE), i0, most, SPLINE), raw


@triton.jit
def largest(logits, i0, most, SPLINE: tl.constexpr):
    for i in tl.static_range(len(logits)):
        above = logits[i] > most
        if SPLINE.rolled:
            above = above & (i0 + i < SPLINE.bins)
        most = tl.where(above, logits[i], most)
    return most


@triton.jit
def added(parts, total):
    for i in tl.static_range(len(parts)):
        total = total + parts[i]
    return total


@triton.jit
def axis_of(element, first, numbers, SPLINE: tl.constexpr, dtype: tl.constexpr):
    """The softmax of widths or heights: the axis, and exponentials if they are kept."""
    most = tl.full(element.at.shape, float("-inf"), dtype)
    total = tl.full(element.at.shape, 0.0, dtype)
    parts = ()
    if SPLINE.rolled:
        for i in range(0, SPLINE.bins, SPLINE.chunk):
            raw = numbers_at(element, first, i, static(SPLINE.chunk), SPLINE, dtype)
            most = largest(logits_of(raw, numbers, SPLINE), i, most, SPLINE)
        for i in range(0, SPLINE.bins, SPLINE.chunk):
            some, _ = exponentials_at(element, first, i, most, numbers, SPLINE, dtype)
            total = added(some, total)
    else:
        logits = logits_of(all_numbers(element, first, SPLINE, dtype), numbers, SPLINE)
        most = largest(logits, 0, most, SPLINE)
        parts = exponentials(logits, 0, most, SPLINE)
        total = added(parts, total)
    return Axis(most, total, div(scalar(numbers.rest, dtype), total), first), parts


@triton.jit
def search_in(parts, i0, state, value, element, axis, numbers, SPLINE: tl.constexpr):
    """Go on with a search, in bins from i0 on."""
    k, left, right, total, passed = state
    least = scalar(numbers.least, total.dtype)
    for i in tl.static_range(len(parts)):
        total = total + tl.fma(parts[i], axis.unit, least)
        knot = tl.fma(element.length, total, element.low)
        inner = i0 + i < SPLINE.bins - 1
        # the first knot that is not passed
        right = tl.where(passed & inner, knot, right)
        here = value > knot if SPLINE.variant == ZUKO else value >= knot
        passed = tl.where(inner, here, passed)
        left = tl.where(passed & inner, knot, left)
        k += (passed & inner).to(tl.int32)
    return k, left, right, total, passed


@triton.jit
def search(value, element, axis, parts, numbers, SPLINE: tl.constexpr, dtype: tl.constexpr):
    """The bin of a value, and its ends. Knots do not decrease; a NaN is left of all."""
    k = tl.full(value.shape, 0, tl.int32)
    total = tl.full(value.shape, 0.0, dtype)
    left, right, passed = element.low + total, element.high + total, k == 0
    if SPLINE.rolled:
        for i in range(0, SPLINE.bins, SPLINE.chunk):
            some, _ = exponentials_at(element, axis.first, i, axis.most, numbers, SPLINE, dtype)
            state = k, left, right, total, passed
            k, left, right, total, passed = search_in(some, i, state, value, element, axis, numbers, SPLINE)
    else:
        state = k, left, right, total, passed
        k, left, right, total, passed = search_in(parts, 0, state, value, element, axis, numbers, SPLINE)
    return k, left, tl.where(passed, element.high, right)


@triton.jit
def ends_in(parts, i0, state, k, element, axis, numbers, SPLINE: tl.constexpr):
    left, right, total = state
    least = scalar(numbers.least, total.dtype)
    for i in tl.static_range(len(parts)):
        total = total + tl.fma(parts[i], axis.unit, least)
        knot = tl.fma(element.length, total, element.low)
        left = tl.where(k > i0 + i, knot, left)
        right = tl.where((k == i0 + i) & (i0 + i < SPLINE.bins - 1), knot, right)
    return left, right, total


@triton.jit
def ends_of(k, element, axis, parts, numbers, SPLINE: tl.constexpr, dtype: tl.constexpr):
    """The ends of bin k."""
    total = tl.full(k.shape, 0.0, dtype)
    left, right = element.low + total, element.high + total
    if SPLINE.rolled:
        for i in range(0, SPLINE.bins, SPLINE.chunk):
            some, _ = exponentials_at(element, axis.first, i, axis.most, numbers, SPLINE, dtype)
            left, right, total = ends_in(some, i, (left, right, total), k, element, axis, numbers, SPLINE)
    else:
        left, right, total = ends_in(parts, 0, (left, right, total), k, element, axis, numbers, SPLINE)
    return left, right


@triton.jit
def slope_of(element, index, given, numbers, SPLINE: tl.constexpr, dtype: tl.constexpr):
    """The slope from the number at `index` where it is given, else 1."""
    at = element.at + (index + 2 * SPLINE.bins) * element.step
    number = tl.load(at, mask=element.inside & given, other=0.0).to(dtype)
    if SPLINE.variant == ZUKO:
        value = exp(saturated(number, scalar(numbers.limit, dtype)))
    else:
        value = scalar(numbers.min_slope, dtype) + softplus(number)
    return Slope(index, given, number, tl.where(given, value, 1.0))


@triton.constexpr_function
def word_at(table, k):
    return table[k]


@triton.jit
def linear_features(tile, SPLINE: tl.constexpr):
    """Whether the tails of each element are linear, for MIXED."""
    feature = (tile.r if SPLINE.by_row else tile.c) % SPLINE.features
    word = tl.full(feature.shape, word_at(SPLINE.linear, 0), tl.int32)
    for i in tl.static_range(1, len(SPLINE.linear)):
        word = tl.where(feature >= 31 * i, word_at(SPLINE.linear, i), word)
    return (word >> (feature % 31).to(tl.int32)) & 1 == 1


@triton.jit
def slopes_of(k, element, tile, numbers, SPLINE: tl.constexpr, dtype: tl.constexpr):
    """The slopes at both ends of bin k."""
    is_first, is_last = k == 0, k == SPLINE.bins - 1
    if SPLINE.ends == LINEAR:
        i0, i1 = k - 1, k
        given0, given1 = k > 0, k < SPLINE.bins - 1
    elif SPLINE.ends == MIXED:
        linear = linear_features(tile, SPLINE)
        i0, i1 = k, tl.where(is_last, 0, k + 1)
        given0, given1 = (is_first & linear) == 0, (is_last & linear) == 0
    else:
        i0, i1 = k, tl.where(is_last, 0, k + 1) if SPLINE.ends == CIRCULAR else k + 1
        given0 = k >= 0
        given1 = given0
    return (
        slope_of(element, i0, given0, numbers, SPLINE, dtype), slope_of(element, i1, given1, numbers, SPLINE, dtype)
    )  # fmt: skip


@triton.jit
def root_of(u, s, b):
    """theta at the height u above y0, see spline_root in csrc/ops/spline.h."""
    q = b.d0 + b.d1 - 2.0 * s
    qa, qb, qc = tl.fma(u, q, b.h * (s - b.d0)), tl.fma(neg(u), q, b.h * b.d0), neg(s) * u
    square = tl.fma(qb, qb, -4.0 * qa * qc)
    r = sqrt(tl.where(square < 0.0, 0.0, square))
    falls = qb >= 0.0
    under = tl.where(falls, neg(qb) - r, 2.0 * qa)
    theta = div(tl.where(falls, 2.0 * qc, r - qb), tl.where(under == 0.0, -1.0, under))
    return tl.where(theta < 0.0, 0.0, tl.where(theta > 1.0, 1.0, theta))


@triton.jit
def place_of(value, b, INVERSE: tl.constexpr):
    s = div(b.h, b.w)
    return place_at(root_of(value - b.y0, s, b) if INVERSE else div(value - b.x0, b.w), s, b)


@triton.jit
def place_at(theta, s, b):
    left, q = 1.0 - theta, b.d0 + b.d1 - 2.0 * s
    rest = theta * left
    top = tl.fma(s * theta, theta, b.d0 * rest)
    slope = tl.fma(b.d1 * theta, theta, tl.fma(b.d0 * left, left, 2.0 * s * rest))
    return Place(theta, s, rest, top, tl.fma(q, rest, s), slope)


@triton.jit
def rise_of(p):
    ratio = div(p.s, p.over)
    return p.slope * ratio * ratio


@triton.jit
def element_of(parameters, step, bounds, numbers, tile, SPLINE: tl.constexpr, TILE: tl.constexpr, dtype: tl.constexpr):
    at = pointers(parameters, tile, TILE.vec)
    if not SPLINE.tails:
        high = tl.full([], 1.0, dtype)
    elif bounds is None:
        high = scalar(numbers.bound, dtype)
    else:
        high = load(bounds, tile, TILE, dtype)
    low = neg(high) if SPLINE.tails else high * 0.0
    return Element(at, step, tile.inside, low, high - low, high)


@triton.jit
def used_of(value, element, mask, tile, SPLINE: tl.constexpr, TILE: tl.constexpr):
    """Which elements the spline transforms, and which have no result."""
    # zuko's domain does not contain its lower end
    above = value > element.low if SPLINE.variant == ZUKO and SPLINE.tails else value >= element.low
    used, unmasked = above & (value <= element.high), tile.inside
    if mask is not None:
        unmasked = load(mask, tile, TILE, tl.int1) == 0
    outside = (used == 0) & unmasked
    return used & unmasked, outside


@triton.jit
def bin_of(value, element, tile, numbers, SPLINE: tl.constexpr, dtype: tl.constexpr):
    """The bin of each value, its number, widths, heights, and slopes at its ends."""
    first: tl.constexpr = SPLINE.bins if SPLINE.inverse else 0
    searched, parts = axis_of(element, first, numbers, SPLINE, dtype)
    k, from0, from1 = search(value, element, searched, parts, numbers, SPLINE, dtype)
    other, other_parts = axis_of(element, SPLINE.bins - first, numbers, SPLINE, dtype)
    to0, to1 = ends_of(k, element, other, other_parts, numbers, SPLINE, dtype)
    at0, at1 = slopes_of(k, element, tile, numbers, SPLINE, dtype)
    if SPLINE.inverse:
        b = Bin(to0, to1 - to0, from0, from1 - from0, at0.value, at1.value)
        return b, k, (other, other_parts), (searched, parts), at0, at1
    else:
        b = Bin(from0, from1 - from0, to0, to1 - to0, at0.value, at1.value)
        return b, k, (searched, parts), (other, other_parts), at0, at1
