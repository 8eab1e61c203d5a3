"""Spline steps of _program.py: _spline.py, with the number of bins and the variant known to the table alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._math import div, exp, exp_less, log, neg, softplus
from ._program import (
    BINS,
    CLEAR,
    COL_LIST,
    F0,
    F1,
    F2,
    F3,
    F4,
    FORM,
    INVERSE,
    OUT,
    PITCH,
    ROW_LIST,
    ROWS,
    SHIFT,
    SPLINE_COLS,
    TAILS,
    A,
    C,
    N,
    as_number,
    columns_from,
    listed,
    nothing,
    number,
    read,
    word,
    write,
    write_sum,
)
from ._spline import CIRCULAR, LINEAR, ZUKO, Bin, place_at, rise_of, root_of, saturated


class Form(NamedTuple):
    """Of a spline: its constants, see SplineConstants in csrc/ops/spline.h, and numbers of a column."""

    variant: Any
    bins: Any
    scale: Any
    limit: Any
    least: Any
    rest: Any
    min_slope: Any


@triton.jit
def form_of(m, s):
    return Form(
        word(s, FORM), word(s, BINS), number(m, s, F0), number(m, s, F1), number(m, s, F2), number(m, s, F3),
        number(m, s, F4),
    )  # fmt: skip


@triton.jit
def number_at(m, s, i, n, j):
    """Number j, of any shape that broadcasts to (I, ROWS), of columns i."""
    place = tl.load(m.table + word(s, C) + i * word(s, PITCH) + j, mask=i < n, other=0).to(tl.int32)
    return tl.load(m.scratch + place * ROWS + m.r, mask=i < n, other=0.0)


@triton.jit
def logit(raw, form):
    if form.variant == ZUKO:
        value = saturated(raw, form.limit * 0.5)
    else:
        value = raw * form.scale
    return value


@triton.jit
def parts_of(m, s, i, n, first, form):
    """Largest logit of the widths or heights from number `first` on, and what turns exponentials into parts."""
    most = tl.full((i.shape[0], ROWS), float("-inf"), m.scratch.dtype.element_ty)
    for j in range(0, form.bins):
        v = logit(number_at(m, s, i, n, first + j), form)
        most = tl.where(v > most, v, most)
    total = tl.full(most.shape, 0.0, most.dtype)
    for j in range(0, form.bins):
        total += exp_less(logit(number_at(m, s, i, n, first + j), form) - most, 0.0)
    return most, total


@triton.jit
def search(m, s, i, n, first, form, axis, value, low, high):
    """The bin of a value, and its ends. Knots do not decrease; a NaN is left of all."""
    most, unit = axis[0], div(form.rest + axis[1] * 0.0, axis[1])
    sums = tl.full(most.shape, 0.0, most.dtype)
    k = tl.full(most.shape, 0, tl.int32)
    left, right, passed = low + sums, high + sums, k == 0
    for j in range(0, form.bins - 1):
        e = exp_less(logit(number_at(m, s, i, n, first + j), form) - most, 0.0)
        sums = sums + tl.fma(e, unit, form.least + sums * 0.0)
        knot = tl.fma(high - low, sums, low + sums * 0.0)
        # the first knot that is not passed
        right = tl.where(passed, knot, right)
        if form.variant == ZUKO:
            here = value > knot
        else:
            here = value >= knot
        passed = passed & here
        left = tl.where(passed, knot, left)
        k += passed.to(tl.int32)
    return k, left, tl.where(passed, high, right)


@triton.jit
def ends_of(m, s, i, n, first, form, axis, k, low, high):
    """The ends of bin k."""
    most, unit = axis[0], div(form.rest + axis[1] * 0.0, axis[1])
    sums = tl.full(most.shape, 0.0, most.dtype)
    left, right = low + sums, high + sums
    for j in range(0, form.bins - 1):
        e = exp_less(logit(number_at(m, s, i, n, first + j), form) - most, 0.0)
        sums = sums + tl.fma(e, unit, form.least + sums * 0.0)
        knot = tl.fma(high - low, sums, low + sums * 0.0)
        left = tl.where(k > j, knot, left)
        right = tl.where(k == j, knot, right)
    return left, right


@triton.jit
def slope_of(m, s, i, n, index, form):
    """The slope at an index, 1 for -1, and the number behind it."""
    given = index >= 0
    raw = number_at(m, s, i, n, 2 * form.bins + tl.where(given, index, 0))
    if form.variant == ZUKO:
        value = exp(saturated(raw, form.limit))
    else:
        value = form.min_slope + softplus(raw)
    return tl.where(given, value, 1.0), raw


@triton.jit
def slopes_at(m, s, i, n, k, form):
    """Which slopes are those at both ends of bin k, -1 for 1."""
    ends, shift = listed(m, word(s, COL_LIST), i, n), word(s, SHIFT)
    outer = tl.where(ends == LINEAR, -1, 0)
    at0 = tl.where(k == 0, outer, k - shift)
    last = tl.where(ends == LINEAR, -1, tl.where(ends == CIRCULAR, 0, k + 1 - shift))
    return at0, tl.where(k == form.bins - 1, last, k + 1 - shift)


@triton.jit
def domain_of(m, s, i, n):
    bits = tl.load(m.table + word(s, ROW_LIST) + i, mask=i < n, other=0)
    high = as_number(bits, m.scratch.dtype.element_ty)
    return tl.where(word(s, TAILS) != 0, neg(high), 0.0), high


@triton.jit
def used_of(s, value, low, high, form):
    """Which values the spline transforms: zuko's domain does not contain its lower end."""
    if (form.variant == ZUKO) & (word(s, TAILS) != 0):
        above = value > low
    else:
        above = value >= low
    return above & (value <= high)


@triton.jit
def outside_of(s, v):
    """What a spline returns in place of v outside of its domain: v itself with tails, or 0; NaN without."""
    return tl.where(word(s, TAILS) != 0, tl.where(word(s, CLEAR) != 0, 0.0, v), float("nan"))


@triton.jit
def bin_of(m, s, i, n, value, low, high, form):
    """The bin of each value, its number, and of widths and heights the largest logit and the sum of exponentials."""
    wide, tall = parts_of(m, s, i, n, 0, form), parts_of(m, s, i, n, form.bins, form)
    if word(s, INVERSE) != 0:
        k, y0, y1 = search(m, s, i, n, form.bins, form, tall, value, low, high)
        x0, x1 = ends_of(m, s, i, n, 0, form, wide, k, low, high)
    else:
        k, x0, x1 = search(m, s, i, n, 0, form, wide, value, low, high)
        y0, y1 = ends_of(m, s, i, n, form.bins, form, tall, k, low, high)
    at0, at1 = slopes_at(m, s, i, n, k, form)
    d0, raw0 = slope_of(m, s, i, n, at0, form)
    d1, raw1 = slope_of(m, s, i, n, at1, form)
    return Bin(x0, x1 - x0, y0, y1 - y0, d0, d1), k, wide, tall, (at0, at1, raw0, raw1)


@triton.jit
def theta_of(s, value, b):
    ratio = div(b.h, b.w)
    if word(s, INVERSE) != 0:
        theta = root_of(value - b.y0, ratio, b)
    else:
        theta = div(value - b.x0, b.w)
    return theta, ratio


@triton.jit
def spline_step(m, s):
    n, form = word(s, N), form_of(m, s)
    total = nothing(m, SPLINE_COLS)
    for first in range(0, n, SPLINE_COLS):
        i = columns_from(first, SPLINE_COLS)
        value = read(m, word(s, A), i, n)
        low, high = domain_of(m, s, i, n)
        used = used_of(s, value, low, high, form)
        b, _, _, _, _ = bin_of(m, s, i, n, value, low, high, form)
        theta, ratio = theta_of(s, value, b)
        p = place_at(theta, ratio, b)
        g = log(rise_of(p))
        result = b.y0 + b.h * div(p.top, p.over)
        if word(s, INVERSE) != 0:
            result, g = tl.fma(p.theta, b.w, b.x0), neg(g)
        write(m, word(s, OUT), i, n, tl.where(used, result, outside_of(s, value)))
        g = tl.where(used, g, outside_of(s, nothing(m, SPLINE_COLS)))
        total += tl.where(i < n, g, 0.0)
    write_sum(m, s, total)
