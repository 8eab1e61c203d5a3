"""demo_op, forward and backward, over tensors of any dtype and strides."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._math import neg, sigmoid, softplus
from ._tiles import compute_type, fold, load, place, row_pointers, scalar, store, tile_at, zeros


@triton.jit(do_not_specialize=["rows", "cols", "segments"])
def forward_kernel(x, y, logdet, scale, log_scale, sizes, rows, cols, segments, TILE: tl.constexpr):
    dtype: tl.constexpr = compute_type(x[0])
    row, segment = place(segments, TILE)
    acc = zeros(TILE, dtype)
    for c0 in range(0, TILE.segment, TILE.cols):
        tile = tile_at(sizes, row, segment * TILE.segment + c0, rows, cols, TILE)
        v = load(x, tile, TILE, dtype)
        store(y, tile, TILE, scalar(scale, dtype) * softplus(v))
        acc += tl.where(tile.inside, scalar(log_scale, dtype) - softplus(neg(v)), 0.0)
    tl.store(logdet + row.to(tl.int64) * segments + segment, fold(acc), mask=row < rows)


@triton.jit(do_not_specialize=["rows", "cols", "segments"])
def backward_kernel(gl, x, gy, gx, scale, sizes, rows, cols, segments, TILE: tl.constexpr):
    dtype: tl.constexpr = compute_type(x[0])
    row, segment = place(segments, TILE)
    of_row = tl.full((TILE.rows, 1), 0.0, dtype)
    if gl is not None:
        of_row = tl.load(row_pointers(gl, sizes, row), mask=row < rows).to(dtype)[:, None]
    for c0 in range(0, TILE.segment, TILE.cols):
        tile = tile_at(sizes, row, segment * TILE.segment + c0, rows, cols, TILE)
        v = load(x, tile, TILE, dtype)
        grad = zeros(TILE, dtype)
        if gy is not None:
            grad = load(gy, tile, TILE, dtype)
        store(gx, tile, TILE, grad * (scalar(scale, dtype) * sigmoid(v)) + of_row * sigmoid(neg(v)))


def demo_op(x: Tensor, scale: float, event_dims: int) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x)
    batch, dtype = x.shape[: x.dim() - event_dims], _launch.compute_dtype(x)
    if x.numel() == 0:
        return y, x.new_zeros(batch, dtype=dtype)
    logdet = x.new_empty(batch, dtype=dtype)
    space = _launch.collapse(event_dims, (x, y))
    segments = space.blocks.segments
    partial = logdet if segments == 1 else x.new_empty((space.rows, segments), dtype=dtype)
    numbers = (_launch.number(value, dtype) for value in (scale, math.log(scale)))
    _launch.over_space(
        forward_kernel, space, x, *_launch.views((x, y), space.at), partial, *numbers, blocks=space.spread
    )
    if segments > 1:
        _launch.sum_segments(partial, logdet)
    return y, logdet


def demo_op_backward(
    grad_y: Tensor | None, grad_logdet: Tensor | None, x: Tensor, scale: float, event_dims: int
) -> Tensor:
    gx = torch.empty_like(x)
    if x.numel() == 0:
        return gx
    tensors = (x, grad_y, gx)
    space = _launch.collapse(event_dims, tensors, (grad_logdet,))
    views = (*_launch.views((grad_logdet,), space.row_at), *_launch.views(tensors, space.at))
    number = _launch.number(scale, _launch.compute_dtype(x))
    _launch.over_space(backward_kernel, space, x, *views, number, blocks=space.spread)
    return gx
