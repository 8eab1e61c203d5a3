"""Rational-quadratic splines: values and inverse with log-determinant, and backward; elements are in _spline.py."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schemas import TAILS
from . import _launch
from ._math import div, log, neg
from ._spline import (
    CIRCULAR,
    FREE,
    LINEAR,
    MIXED,
    ZUKO,
    Numbers,
    Spline,
    bin_of,
    element_of,
    place_of,
    rise_of,
    used_of,
)  # fmt: skip
from ._spline_grad import Target, gradient_of, of_slopes, store_logits, store_params
from ._tiles import compute_type, fold, load, place, pointers, row_pointers, store, tile_at, zeros

ELEMENTS = 64  # of a tile: one per thread of two warps; on an H200 0.9 times the time of 128 in a backward
MOST_KEPT = 16  # words of the exponentials of an axis that stay in registers


@triton.jit
def column_of(segment, trip, SPLINE: tl.constexpr, TILE: tl.constexpr):
    """The first column of a tile: the tiles of a segment are `span` tiles apart."""
    first = segment // SPLINE.span * (TILE.segment * SPLINE.span) + segment % SPLINE.span * TILE.cols
    return first + trip * SPLINE.span


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
        to = Target(pointers(gparameters, tile, TILE.vec), steps[1], tile.inside, used, outside)
        store_logits(g.x0, g.x1, k, element, wide[0], wide[1], to, numbers, SPLINE, dtype)
        store_logits(g.y0, g.y1, k, element, tall[0], tall[1], to, numbers, SPLINE, dtype)
        store_params(of_slopes(g.d0, g.d1, at0, at1, numbers, SPLINE, dtype), 2 * SPLINE.bins, to, SPLINE)


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
    again: bool,
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
    # a backward of zuko needs the numbers again
    words = bins * (2 if dtype == torch.float64 else 1) * (2 if again and form == ZUKO.value else 1)
    rolled = words > MOST_KEPT
    # divisions and float64 take more registers
    chunk = 8 if not rolled else 2 if dtype == torch.float64 or form == ZUKO.value else 4
    numbers = (bound, param_scale, limit, least, 1.0 - bins * least, min_slope)
    return Call(space, blocks, Numbers(*(_launch.number(v, dtype) for v in numbers)), _spline(
        bins, slopes, form, ends, bool(tails), features, linear, event_dims == 0, inverse,
        rolled, chunk, span,
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
    call = _call(x, params, tensors, (), False, *options)
    rows, segments = call.space.rows, call.blocks.segments
    partial = logdet if segments == 1 else x.new_empty((rows, segments), dtype=sum_dtype)
    _launch.over_space(
        forward_kernel, call.space, x, *_launch.views(tensors, call.space.at), partial, params.stride(-1),
        call.numbers, blocks=call.blocks, num_warps=2, SPLINE=call.spline,
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
    call = _call(x, params, tensors, (grad_logdet,), True, *options)
    _launch.over_space(
        backward_kernel, call.space, x, *_launch.views((grad_logdet,), call.space.row_at),
        *_launch.views(tensors, call.space.at), (params.stride(-1), grad_params.stride(-1)), call.numbers,
        blocks=call.blocks, num_warps=2, SPLINE=call.spline,
    )  # fmt: skip
    return grad_x, grad_params
