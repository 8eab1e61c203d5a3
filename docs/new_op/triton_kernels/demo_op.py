"""demo_op, forward and backward, over tensors of any dtype and strides."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._math import sigmoid, softplus
from ._tiles import load, place, scalar, store, width

SCALARS = ["scale", "rows", "cols", "segments"]


@triton.jit(do_not_specialize=SCALARS)
def forward_kernel(
    x, x_at, y, y_at, scale, sizes, rows, cols, segments, INDEX: tl.constexpr, VEC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    row, segment = place(segments, INDEX, BLOCK_R)
    r = row[:, None]
    factor = scalar(scale, dtype)
    for c0 in range(0, SEGMENT, BLOCK_C):
        c = (segment * SEGMENT + c0 + tl.arange(0, BLOCK_C))[None, :]
        inside = (r < rows) & (c < width(cols, c, VEC))
        v = load(x, x_at, sizes, r, c, inside, VEC, dtype)
        store(y, y_at, sizes, r, c, inside, VEC, factor * softplus(v))


@triton.jit(do_not_specialize=SCALARS)
def backward_kernel(
    gy, gy_at, x, x_at, gx, gx_at, scale, sizes, rows, cols, segments, INDEX: tl.constexpr, VEC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    row, segment = place(segments, INDEX, BLOCK_R)
    r = row[:, None]
    factor = scalar(scale, dtype)
    for c0 in range(0, SEGMENT, BLOCK_C):
        c = (segment * SEGMENT + c0 + tl.arange(0, BLOCK_C))[None, :]
        inside = (r < rows) & (c < width(cols, c, VEC))
        grad = load(gy, gy_at, sizes, r, c, inside, VEC, dtype)
        v = load(x, x_at, sizes, r, c, inside, VEC, dtype)
        store(gx, gx_at, sizes, r, c, inside, VEC, grad * (factor * sigmoid(v)))


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
    bits = _launch.bits(scale, _launch.compute_dtype(like))
    _launch.over_space(kernel, space, like, *_launch.with_strides(tensors, space.at), bits, blocks=space.spread)
