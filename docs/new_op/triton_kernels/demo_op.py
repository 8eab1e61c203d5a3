"""demo_op, forward and backward, over tensors of any dtype and strides."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._math import sigmoid, softplus
from ._tiles import compute_type, load, place, scalar, store, tile_at


@triton.jit(do_not_specialize=["rows", "cols", "segments"])
def forward_kernel(x, y, scale, sizes, rows, cols, segments, TILE: tl.constexpr):
    dtype: tl.constexpr = compute_type(x[0])
    row, segment = place(segments, TILE)
    for c0 in range(0, TILE.segment, TILE.cols):
        tile = tile_at(sizes, row, segment * TILE.segment + c0, rows, cols, TILE)
        v = load(x, tile, TILE, dtype)
        store(y, tile, TILE, scalar(scale, dtype) * softplus(v))


@triton.jit(do_not_specialize=["rows", "cols", "segments"])
def backward_kernel(gy, x, gx, scale, sizes, rows, cols, segments, TILE: tl.constexpr):
    dtype: tl.constexpr = compute_type(x[0])
    row, segment = place(segments, TILE)
    for c0 in range(0, TILE.segment, TILE.cols):
        tile = tile_at(sizes, row, segment * TILE.segment + c0, rows, cols, TILE)
        grad = load(gy, tile, TILE, dtype)
        v = load(x, tile, TILE, dtype)
        store(gx, tile, TILE, grad * (scalar(scale, dtype) * sigmoid(v)))


def demo_op(x: Tensor, scale: float) -> Tensor:
    y = torch.empty_like(x)
    if x.numel() > 0:
        _run(forward_kernel, scale, x, y)
    return y


def demo_op_backward(grad: Tensor, x: Tensor, scale: float) -> Tensor:
    gx = torch.empty_like(x)
    if x.numel() > 0:
        _run(backward_kernel, scale, grad, x, gx)
    return gx


def _run(kernel: Any, scale: float, *tensors: Tensor) -> None:
    like = tensors[-1]
    space = _launch.collapse(_launch.any_event_dims(tensors), tensors)
    number = _launch.number(scale, _launch.compute_dtype(like))
    _launch.over_space(kernel, space, like, *_launch.views(tensors, space.at), number, blocks=space.spread)
