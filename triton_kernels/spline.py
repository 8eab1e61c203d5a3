"""Rational-quadratic splines: values and inverse with log-determinant, and backward.

A thread has one element. Its widths and heights are loaded as a tile, neighbours by neighbouring threads, and turned
into a tuple of registers, so that softmax, knots and search go bin by bin in the order of the C++ kernels: the same
bits. Its two slopes are loaded once the bin is known.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schemas import SPLINE_VARIANTS, TAILS
from . import _launch
from ._math import constant, div, exp, exp_less, log, neg, sigmoid, softplus, sqrt
from ._plans import Words
from ._tiles import (
    compute_type,
    fold,
    load,
    pack,
    place,
    pointers,
    row_pointers,
    scalar,
    static,
    store,
    store_as,
    tile_at,
    unpack,
    zeros,
)  # fmt: skip

ELEMENTS = 128  # of a tile: one per thread
CHUNK = tl.constexpr(8)  # neighbouring parameters of a tile
MOST_KEPT = 32  # words of exponentials that a backward keeps in registers; more are computed twice

LINEAR, CIRCULAR, FREE, MIXED = (tl.constexpr(i) for i in range(4))
ZUKO = tl.constexpr(SPLINE_VARIANTS.index("zuko"))


class Spline(NamedTuple):
    """What is compiled into the kernels."""

    bins: int
    padded: int  # power of two, at least bins
    slopes: int  # numbers behind the slopes of an element
    variant: int
    ends: int  # LINEAR: outer slopes 1; CIRCULAR: the last slope is the first; FREE: of their own; MIXED: by feature
    tails: bool  # outside the bounds is the identity; without, nothing is
    features: int
    linear: tuple[int, ...]  # MIXED: a bit per feature, 31 in a word
    by_row: bool  # MIXED: the feature is the row's, not the column's
    inverse: bool
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
def is_kept(spline, dtype):
    """Whether a backward keeps exponentials in registers."""
    words = 2 * spline.bins * (2 if dtype == tl.float64 else 1)
    return spline.variant != ZUKO.value and words <= MOST_KEPT


@triton.jit
def saturated(v, limit):
    return div(v, 1.0 + div(tl.abs(v), limit))


@triton.constexpr_function
def chunk_of(count):
    """How many parameters a tile has when `count` are left."""
    return min(CHUNK.value, 1 << (count - 1).bit_length())


@triton.jit
def numbers_at(element, first, SPLINE: tl.constexpr, dtype: tl.constexpr):
    """The numbers behind widths (first = 0) or heights (first = bins): a tuple of tiles."""
    numbers = ()
    for i in tl.static_range(0, static(SPLINE.bins), CHUNK):
        j = i + tl.arange(0, static(chunk_of(SPLINE.bins - i)))[None, None, :]
        at = element.at[:, :, None] + (j + first) * element.step
        chunk = tl.load(at, mask=element.inside[:, :, None] & (j < SPLINE.bins)).to(dtype)
        numbers = numbers + unpack(chunk, static(min(CHUNK, SPLINE.bins - i)))
    return numbers


@triton.jit
def logits_of(element, first, numbers, SPLINE: tl.constexpr, dtype: tl.constexpr):
    """The logits of widths or heights as the softmax takes them."""
    raw = numbers_at(element, first, SPLINE, dtype)
    logits = ()
    for i in tl.static_range(static(SPLINE.bins)):
        v = raw[i]
        if SPLINE.variant == ZUKO:
            v = saturated(v, scalar(numbers.limit, dtype) * 0.5)
        else:
            v = v * scalar(numbers.scale, dtype)
        logits = logits + (v,)
    return logits


@triton.jit
def exponentials(logits, most):
    out = ()
    for i in tl.static_range(len(logits)):
        out = out + (exp_less(logits[i] - most, 0.0),)
    return out


@triton.jit
def axis_of(element, first, numbers, SPLINE: tl.constexpr, dtype: tl.constexpr):
    """The softmax of widths or heights: the axis, and exponentials."""
    logits = logits_of(element, first, numbers, SPLINE, dtype)
    most = logits[0]
    for i in tl.static_range(1, static(SPLINE.bins)):
        most = tl.where(logits[i] > most, logits[i], most)
    parts = exponentials(logits, most)
    total = parts[0]
    for i in tl.static_range(1, static(SPLINE.bins)):
        total = total + parts[i]
    return Axis(most, total, div(scalar(numbers.rest, dtype), total)), parts


@triton.jit
def right_of(value, knot, VARIANT: tl.constexpr):
    """Whether a value belongs to the bins right of a knot."""
    return value > knot if VARIANT == ZUKO else value >= knot


@triton.jit
def search(value, element, axis, parts, numbers, SPLINE: tl.constexpr, dtype: tl.constexpr):
    """The bin of a value, and its ends. Knots do not decrease; a NaN is left of all."""
    least = scalar(numbers.least, dtype)
    k = tl.full(value.shape, 0, tl.int32)
    total = tl.full(value.shape, 0.0, dtype)
    left, right = element.low + total, element.high + total
    passed = total == 0.0
    for i in tl.static_range(static(SPLINE.bins - 1)):
        total = total + tl.fma(parts[i], axis.unit, least)
        knot = tl.fma(element.length, total, element.low)
        # the first knot that is not passed
        right = tl.where(passed, knot, right)
        passed = right_of(value, knot, SPLINE.variant)
        left = tl.where(passed, knot, left)
        k += passed.to(tl.int32)
    return k, left, tl.where(passed, element.high, right)


@triton.jit
def ends_of(k, element, axis, parts, numbers, SPLINE: tl.constexpr, dtype: tl.constexpr):
    """The ends of bin k."""
    least = scalar(numbers.least, dtype)
    total = tl.full(k.shape, 0.0, dtype)
    left, right = element.low + total, element.high + total
    for i in tl.static_range(static(SPLINE.bins - 1)):
        total = total + tl.fma(parts[i], axis.unit, least)
        knot = tl.fma(element.length, total, element.low)
        left = tl.where(k > i, knot, left)
        right = tl.where(k == i, knot, right)
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
    theta = root_of(value - b.y0, s, b) if INVERSE else div(value - b.x0, b.w)
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
    if bounds is not None:
        high = load(bounds, tile, TILE, dtype)
    else:
        high = scalar(numbers.bound, dtype) if SPLINE.tails else tl.full([], 1.0, dtype)
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
def column_of(segment, trip, SPLINE: tl.constexpr, TILE: tl.constexpr):
    """The first column of a tile: the tiles of a segment are `span` tiles apart."""
    first = segment // SPLINE.span * (TILE.segment * SPLINE.span) + segment % SPLINE.span * TILE.cols
    return first + trip * SPLINE.span


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


@triton.jit(do_not_specialize=["rows", "cols", "segments"])
def forward_kernel(
    x, parameters, bounds, mask, y, logdet, step, numbers, sizes, rows, cols, segments,
    SPLINE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = compute_type(x[0])
    row, segment = place(segments, TILE)
    acc = zeros(TILE, dtype)
    for trip in range(0, TILE.segment, TILE.cols):
        tile = tile_at(sizes, row, column_of(segment, trip, SPLINE, TILE), rows, cols, TILE)
        value = load(x, tile, TILE, dtype)
        element = element_of(parameters, step, bounds, numbers, tile, SPLINE, TILE, dtype)
        used, outside = used_of(value, element, mask, tile, SPLINE, TILE)
        b, _, _, _, _, _ = bin_of(value, element, tile, numbers, SPLINE, dtype)
        p = place_of(value, b, SPLINE.inverse)
        g = log(rise_of(p))
        if SPLINE.inverse:
            result = tl.fma(p.theta, b.w, b.x0)
            g = neg(g)
        else:
            result = b.y0 + b.h * div(p.top, p.over)
        result, g = tl.where(used, result, value), tl.where(used, g, 0.0)
        if not SPLINE.tails:
            result, g = tl.where(outside, float("nan"), result), tl.where(outside, float("nan"), g)
        store(y, tile, TILE, result)
        acc += tl.where(tile.inside, g, 0.0)
    tl.store(logdet + row.to(tl.int64) * segments + segment, fold(acc), mask=row < rows)


class Gradient(NamedTuple):
    """Gradients of x (of y, inverse), of the ends of the bin, and of both slopes."""

    value: Any
    x0: Any
    x1: Any
    y0: Any
    y1: Any
    d0: Any
    d1: Any


@triton.jit
def gradient_of(gy, gl, p, b, INVERSE: tl.constexpr):
    """gy, gl: gradients of the result and of the log-determinant; see spline_gradient in csrc/ops/spline.h."""
    one = constant(1.0, b.w)
    left, turn, q = 1.0 - p.theta, 1.0 - 2.0 * p.theta, b.d0 + b.d1 - 2.0 * p.s
    by_slope, by_over, by_w = div(one, p.slope), div(one, p.over), div(one, b.w)
    rise = rise_of(p)
    # d log(y') / d theta
    of_theta = 2.0 * ((b.d1 * p.theta + p.s * turn - b.d0 * left) * by_slope - q * turn * by_over)
    if INVERSE:
        # x(y) solves y(x) = y: other parameters move x by -dy / y'
        gx = div(gy - gl * of_theta * by_w, rise)
        gy, gl = neg(gx), neg(gl)
    per = gy * b.h * by_over * by_over
    twice = 2.0 * p.rest
    stay = 1.0 - twice
    g_theta = tl.fma(gy * b.w, rise, gl * of_theta)
    of_s = div(2.0 * one, p.s) + twice * by_slope - 2.0 * stay * by_over
    g_s = tl.fma(per, p.theta * p.theta * p.over - p.top * stay, gl * of_s)
    d0 = tl.fma(per * p.rest, p.over - p.top, gl * (left * left * by_slope - twice * by_over))
    d1 = tl.fma(neg(per) * p.rest, p.top, gl * (p.theta * p.theta * by_slope - twice * by_over))
    g_w = neg(g_theta * p.theta + g_s * p.s) * by_w
    g_h = tl.fma(gy, p.top * by_over, g_s * by_w)
    if not INVERSE:
        gx = g_theta * by_w
    return Gradient(gx, neg(g_theta) * by_w - g_w, g_w, gy - g_h, g_h, d0, d1)


@triton.jit
def store_params(values, first, to, step, used, outside, inside, SPLINE: tl.constexpr):
    """Store the gradients of parameters from `first` on, a tuple of tiles.

    By selection: no NaN of an element that is not transformed reaches them.
    """
    for i in tl.static_range(0, len(values), CHUNK):
        chunk = ()
        for n in tl.static_range(i, static(min(i + CHUNK, len(values)))):
            value = tl.where(used, values[n], 0.0)
            if not SPLINE.tails:
                value = tl.where(outside, float("nan"), value)
            chunk = chunk + (value,)
        packed = pack(chunk)
        j = i + tl.arange(0, packed.shape[2])[None, None, :]
        store_as(to[:, :, None] + (j + first) * step, packed, inside[:, :, None] & (j < len(values)))


@triton.jit
def of_logits(g0, g1, k, element, first, axis, parts, numbers, SPLINE: tl.constexpr, dtype: tl.constexpr):
    """Gradients of widths or heights from those of the ends of bin k."""
    if not is_kept(SPLINE, dtype):
        parts = exponentials(logits_of(element, first, numbers, SPLINE, dtype), axis.most)
    # knots 0 and bins are fixed; knot j moves with all parts before it
    right = tl.where(k < SPLINE.bins - 1, g1, 0.0)
    both = tl.where(k > 0, g0, 0.0) + right
    mean = tl.full(k.shape, 0.0, dtype)
    for i in tl.static_range(static(SPLINE.bins)):
        mean = tl.fma(parts[i], tl.where(k > i, both, tl.where(k == i, right, 0.0)), mean)
    mean = div(mean, axis.total)
    factor = div(scalar(numbers.rest, dtype) * element.length, axis.total)
    before, own, after = both - mean, right - mean, 0.0 - mean
    rates = rates_of(element, first, numbers, SPLINE, dtype)
    out = ()
    for i in tl.static_range(static(SPLINE.bins)):
        grad = tl.where(k > i, before, tl.where(k == i, own, after))
        out = out + (parts[i] * factor * grad * rates[i % len(rates)],)
    return out


@triton.jit
def rates_of(element, first, numbers, SPLINE: tl.constexpr, dtype: tl.constexpr):
    """Derivatives of `logits_of`, or the one of all."""
    if SPLINE.variant == ZUKO:
        raw = numbers_at(element, first, SPLINE, dtype)
        rates = ()
        for i in tl.static_range(static(SPLINE.bins)):
            rest = 1.0 + div(tl.abs(raw[i]), scalar(numbers.limit, dtype) * 0.5)
            rates = rates + (div(constant(1.0, rest), rest * rest),)
        return rates
    else:
        return (scalar(numbers.scale, dtype),)


@triton.jit
def of_slope(g, slope, numbers, SPLINE: tl.constexpr, dtype: tl.constexpr):
    """Gradient of the number behind a slope."""
    if SPLINE.variant == ZUKO:
        rest = 1.0 + div(tl.abs(slope.number), scalar(numbers.limit, dtype))
        return g * div(slope.value, rest * rest)
    else:
        return g * sigmoid(slope.number)


@triton.jit
def of_slopes(g0, g1, at0, at1, numbers, SPLINE: tl.constexpr, dtype: tl.constexpr):
    """Gradients of the numbers behind all slopes from those of the two slopes of the bin, which have other numbers."""
    g0, g1 = of_slope(g0, at0, numbers, SPLINE, dtype), of_slope(g1, at1, numbers, SPLINE, dtype)
    out = ()
    for i in tl.static_range(static(SPLINE.slopes)):
        of1 = tl.where(at1.given & (at1.index == i), g1, 0.0)
        out = out + (tl.where(at0.given & (at0.index == i), g0, of1),)
    return out


@triton.jit(do_not_specialize=["rows", "cols", "segments"])
def backward_kernel(
    gl, x, parameters, bounds, mask, gy, gx, gparameters, steps, numbers, sizes, rows, cols, segments,
    SPLINE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = compute_type(x[0])
    row, segment = place(segments, TILE)
    dlogdet = tl.full((TILE.rows, 1), 0.0, dtype)
    if gl is not None:
        dlogdet = tl.load(row_pointers(gl, sizes, row), mask=row < rows).to(dtype)[:, None]
    for trip in range(0, TILE.segment, TILE.cols):
        tile = tile_at(sizes, row, column_of(segment, trip, SPLINE, TILE), rows, cols, TILE)
        value = load(x, tile, TILE, dtype)
        element = element_of(parameters, steps[0], bounds, numbers, tile, SPLINE, TILE, dtype)
        used, outside = used_of(value, element, mask, tile, SPLINE, TILE)
        b, k, wide, tall, at0, at1 = bin_of(value, element, tile, numbers, SPLINE, dtype)
        dy = zeros(TILE, dtype)
        if gy is not None:
            dy = load(gy, tile, TILE, dtype)
        g = gradient_of(dy, dlogdet, place_of(value, b, SPLINE.inverse), b, SPLINE.inverse)
        dx = tl.where(used, g.value, dy)
        if not SPLINE.tails:
            dx = tl.where(outside, float("nan"), dx)
        store(gx, tile, TILE, dx)
        to = pointers(gparameters, tile, TILE.vec)
        of_w = of_logits(g.x0, g.x1, k, element, 0, wide[0], wide[1], numbers, SPLINE, dtype)
        store_params(of_w, 0, to, steps[1], used, outside, tile.inside, SPLINE)
        of_h = of_logits(g.y0, g.y1, k, element, SPLINE.bins, tall[0], tall[1], numbers, SPLINE, dtype)
        store_params(of_h, SPLINE.bins, to, steps[1], used, outside, tile.inside, SPLINE)
        of_d = of_slopes(g.d0, g.d1, at0, at1, numbers, SPLINE, dtype)
        store_params(of_d, 2 * SPLINE.bins, to, steps[1], used, outside, tile.inside, SPLINE)


class Call(NamedTuple):
    """What forward and backward launch with."""

    space: _launch.Space
    blocks: _launch.Blocks
    numbers: Numbers
    spline: Spline


def _call(
    x: Tensor,
    params: Tensor,
    tensors: Sequence[Tensor | None],
    row_tensors: Sequence[Tensor | None],
    bound: float,
    bins: int,
    tails: Sequence[int],
    form: int,
    param_scale: float,
    min_bin: float,
    min_slope: float,
    inverse: bool,
    event_dims: int,
) -> Call:
    dtype = _launch.compute_dtype(x)
    slopes = params.shape[-1] - 2 * bins
    ends = (LINEAR, CIRCULAR, MIXED if tails else FREE)[slopes - bins + 1].value
    features, linear = (x.shape[-1], _words(tuple(tails), x.shape[-1])) if ends == MIXED.value else (1, ())
    # features are counted in C order
    space = _launch.collapse(event_dims, tensors, row_tensors, c_order=ends == MIXED.value)
    blocks, span = _split(space)
    least = 0.0 if form == ZUKO.value else min_bin
    limit = -math.log(min_slope) if form == ZUKO.value else 1.0
    numbers = (bound, param_scale, limit, least, 1.0 - bins * least, min_slope)
    return Call(space, blocks, Numbers(*(_launch.number(v, dtype) for v in numbers)), _spline(
        bins, _launch.power_of_two(bins), slopes, form, ends, bool(tails), features, linear, event_dims == 0, inverse,
        span,
    ))  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _spline(*fields: Any) -> Spline:
    # the same object for the same fields, by which plans know it
    return Spline(*fields)


@functools.lru_cache(maxsize=1024)
def _words(tails: tuple[int, ...], features: int) -> tuple[int, ...]:
    """Return a bit for each feature that is linear, 31 of them in a word."""
    is_linear = [TAILS[tail] == "linear" for tail in tails] * (features // len(tails))
    return tuple(
        sum(bit << i for i, bit in enumerate(is_linear[first : first + 31])) for first in range(0, features, 31)
    )


def _split(space: _launch.Space) -> tuple[_launch.Blocks, int]:
    """Return `space.blocks` in tiles of `ELEMENTS`, and how many of these are a tile of the space side by side.

    Each of them has a program of its own: sums over columns have the order and the bits of `space.blocks`.
    """
    whole = space.blocks
    span = max(1, whole.cols // ELEMENTS)
    cols = whole.cols // span
    rows, segments = ELEMENTS // cols, whole.segments * span
    return _launch.Blocks(rows, cols, whole.segment // span, segments, -(-space.rows // rows) * segments), span


def rq_spline(
    x: Tensor, params: Tensor, bounds: Tensor | None, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x)
    event_dims = options[-1]
    batch = x.shape[: x.dim() - event_dims]
    sum_dtype = _launch.compute_dtype(x)
    if x.numel() == 0:
        return y, x.new_zeros(batch, dtype=sum_dtype)
    logdet = x.new_empty(batch, dtype=sum_dtype)
    tensors = (x, params[..., 0], None if bounds is None else bounds.expand(x.shape), mask, y)
    call = _call(x, params, tensors, (), *options)
    rows, segments = call.space.rows, call.blocks.segments
    partial = logdet if segments == 1 else x.new_empty((rows, segments), dtype=sum_dtype)
    _launch.over_space(
        forward_kernel, call.space, x, *_launch.views(tensors, call.space.at), partial, params.stride(-1),
        call.numbers, blocks=call.blocks, num_warps=4, SPLINE=call.spline,
    )  # fmt: skip
    if segments > 1:
        _launch.sum_segments(partial, logdet)
    return y, logdet


def rq_spline_backward(
    grad_y: Tensor | None,
    grad_logdet: Tensor | None,
    x: Tensor,
    params: Tensor,
    bounds: Tensor | None,
    mask: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    grad_x, grad_params = torch.empty_like(x), torch.empty_like(params)
    if x.numel() == 0:
        return grad_x, grad_params
    bounds = None if bounds is None else bounds.expand(x.shape)
    tensors = (x, params[..., 0], bounds, mask, grad_y, grad_x, grad_params[..., 0])
    call = _call(x, params, tensors, (grad_logdet,), *options)
    _launch.over_space(
        backward_kernel, call.space, x, *_launch.views((grad_logdet,), call.space.row_at),
        *_launch.views(tensors, call.space.at), (params.stride(-1), grad_params.stride(-1)), call.numbers,
        blocks=call.blocks, num_warps=4, SPLINE=call.spline,
    )  # fmt: skip
    return grad_x, grad_params
