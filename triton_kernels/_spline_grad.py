"""Gradients of rational-quadratic splines of a tile of elements, see _spline.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._math import constant, div, neg, sigmoid
from ._spline import ZUKO, all_numbers, exponentials_at, rates_of, rise_of
from ._tiles import pack, scalar, static, store_as


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
def pulled(i, k, before, own, after):
    """What pulls part i: knots of both ends of bin k move with the parts before it, only the right one with part k."""
    return tl.where(k > i, before, tl.where(k == i, own, after))


@triton.jit
def mean_in(parts, i0, k, both, right, mean):
    for i in tl.static_range(len(parts)):
        mean = tl.fma(parts[i], pulled(i0 + i, k, both, right, 0.0), mean)
    return mean


@triton.jit
def logits_in(parts, raw, i0, k, pulls, factor, numbers, SPLINE: tl.constexpr):
    """Gradients of logits, those of bins from i0 on."""
    rates = rates_of(raw, numbers, SPLINE)
    out = ()
    for i in tl.static_range(len(parts)):
        grad = pulled(i0 + i, k, pulls[0], pulls[1], pulls[2])
        out = out + (parts[i] * factor * grad * rates[i],)
    return out


@triton.jit
def store_logits(g0, g1, k, element, axis, parts, to, numbers, SPLINE: tl.constexpr, dtype: tl.constexpr):
    """Store the gradients of widths or heights, from those of the ends of bin k."""
    # the outer knots are fixed
    right = tl.where(k < SPLINE.bins - 1, g1, 0.0)
    both = tl.where(k > 0, g0, 0.0) + right
    mean = tl.full(k.shape, 0.0, dtype)
    factor = div(scalar(numbers.rest, dtype) * element.length, axis.total)
    if SPLINE.rolled:
        for i in range(0, SPLINE.bins, SPLINE.chunk):
            some, _ = exponentials_at(element, axis.first, i, axis.most, numbers, SPLINE, dtype)
            mean = mean_in(some, i, k, both, right, mean)
        mean = div(mean, axis.total)
        pulls = both - mean, right - mean, 0.0 - mean
        for i in range(0, SPLINE.bins, SPLINE.chunk):
            some, raw = exponentials_at(element, axis.first, i, axis.most, numbers, SPLINE, dtype)
            values = logits_in(some, raw, i, k, pulls, factor, numbers, SPLINE)
            store_chunk(values, i + axis.first, SPLINE.bins + axis.first, to, SPLINE)
    else:
        mean = div(mean_in(parts, 0, k, both, right, mean), axis.total)
        pulls = both - mean, right - mean, 0.0 - mean
        raw = parts
        if SPLINE.variant == ZUKO:
            raw = all_numbers(element, axis.first, SPLINE, dtype)
        store_params(logits_in(parts, raw, 0, k, pulls, factor, numbers, SPLINE), axis.first, to, SPLINE)


class Target(NamedTuple):
    """Where gradients of parameters go, and which elements the spline transforms, see `used_of`."""

    at: Any
    step: Any
    inside: Any
    used: Any
    outside: Any


@triton.jit
def store_chunk(values, first, end, to, SPLINE: tl.constexpr):
    """Store the gradients of neighbouring parameters from `first` to before `end`, a tuple of tiles.

    By selection: no NaN of an element that is not transformed reaches them.
    """
    chosen = ()
    for i in tl.static_range(len(values)):
        value = tl.where(to.used, values[i], 0.0)
        if not SPLINE.tails:
            value = tl.where(to.outside, float("nan"), value)
        chosen = chosen + (value,)
    packed = pack(chosen)
    j = first + tl.arange(0, packed.shape[2])[None, None, :]
    store_as(to.at[:, :, None] + j * to.step, packed, to.inside[:, :, None] & (j < end))


@triton.jit
def store_params(values, first, to, SPLINE: tl.constexpr):
    """Store a tuple of gradients, chunk by chunk."""
    for i in tl.static_range(0, len(values), static(SPLINE.chunk)):
        chunk = ()
        for n in tl.static_range(i, static(min(i + SPLINE.chunk, len(values)))):
            chunk = chunk + (values[n],)
        store_chunk(chunk, first + i, first + len(values), to, SPLINE)


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
