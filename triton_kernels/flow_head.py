"""Flow head: log-density of the prior at z = h exp(log_scale), forward and backward."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schemas import PRIORS
from . import _launch
from ._math import constant, exp, log1p01, neg, tanh
from ._tiles import (
    column_pointers,
    compute_type,
    fold,
    fold_rows,
    load,
    place,
    row_pointers,
    scalar,
    store,
    store_as,
    tile_at,
    width,
    zeros,
)

GAUSSIAN = tl.constexpr(PRIORS.index("gaussian"))
LOGISTIC = tl.constexpr(PRIORS.index("logistic"))


@triton.jit
def log_density(z, PRIOR: tl.constexpr):
    """Log-density of the prior without its constant."""
    if PRIOR == GAUSSIAN:
        return -0.5 * z * z
    else:
        tl.static_assert(PRIOR == LOGISTIC)
        a = tl.abs(z)
        return neg(tl.fma(constant(2.0, z), log1p01(exp(neg(a))), a))


@triton.jit
def score(z, PRIOR: tl.constexpr):
    if PRIOR == GAUSSIAN:
        return neg(z)
    else:
        tl.static_assert(PRIOR == LOGISTIC)
        return neg(tanh(0.5 * z))


@triton.jit(do_not_specialize=["rows", "cols", "segments"])
def forward_kernel(
    h, log_scale, out, offset, sizes, rows, cols, segments, PRIOR: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    dtype: tl.constexpr = compute_type(h[0])
    row, segment = place(segments, TILE)
    acc = zeros(TILE, dtype)
    for c0 in range(0, TILE.segment, TILE.cols):
        tile = tile_at(sizes, row, segment * TILE.segment + c0, rows, cols, TILE)
        z = load(h, tile, TILE, dtype)
        if log_scale is not None:
            at = column_pointers(log_scale, sizes, tile.c, TILE.vec)
            s = tl.load(at, mask=tile.c < width(cols, tile.c, TILE.vec)).to(dtype)
            term = log_density(z * exp(s), PRIOR) + s
        else:
            term = log_density(z, PRIOR)
        acc += tl.where(tile.inside, term, 0.0)
    total = fold(acc) + tl.where(segment == 0, scalar(offset, dtype), 0.0)
    tl.store(out + row.to(tl.int64) * segments + segment, total, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "cols", "segments", "block_rows"])
def backward_kernel(
    grad, h, log_scale, gh, partial, block_rows, sizes, rows, cols, segments,
    PRIOR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One block of rows x TILE.cols columns; its part of grad_log_scale goes to partial (row blocks, columns)."""
    dtype: tl.constexpr = compute_type(h[0])
    program = tl.program_id(0)
    block = (program // segments).to(TILE.index)
    first = (program % segments).to(TILE.index) * TILE.cols
    col = first + tl.arange(0, TILE.cols)
    c = col[None, :]
    e = tl.full((1, TILE.cols), 1.0, dtype)
    if log_scale is not None:
        at = column_pointers(log_scale, sizes, c, TILE.vec)
        e = exp(tl.load(at, mask=c < width(cols, c, TILE.vec)).to(dtype))
    acc = zeros(TILE, dtype)
    for r0 in range(0, block_rows, TILE.rows):
        row = block * block_rows + r0 + tl.arange(0, TILE.rows)
        tile = tile_at(sizes, row, first, rows, cols, TILE)
        g = tl.load(row_pointers(grad, sizes, row), mask=row < rows).to(dtype)[:, None]
        z = load(h, tile, TILE, dtype) * e
        d = score(z, PRIOR)
        store(gh, tile, TILE, g * e * d)
        if log_scale is not None:
            acc = tl.where(tile.inside, tl.fma(g, tl.fma(d, z, constant(1.0, z)), acc), acc)
    if log_scale is not None:
        at = partial + block.to(tl.int64) * cols * TILE.vec + col
        tl.store(at, fold_rows(acc), mask=col < width(cols, col, TILE.vec))


@triton.jit(do_not_specialize=["blocks", "cols"])
def sum_blocks(
    partial, out, sizes, blocks, cols, VEC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Sum partial (blocks, columns) to out (columns,)."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_R, BLOCK_C), partial.dtype.element_ty)
    for first in range(0, blocks, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        inside = (r < blocks)[:, None] & (c < width(cols, c, VEC))[None, :]
        acc += tl.load(partial + (r.to(tl.int64) * cols * VEC)[:, None] + c[None, :], mask=inside, other=0.0)
    store_as(column_pointers(out, sizes, c, VEC), fold_rows(acc), c < width(cols, c, VEC))


def flow_log_prob(h: Tensor, log_scale: Tensor | None, prior: int) -> Tensor:
    dtype = _launch.compute_dtype(h)
    if h.numel() == 0:
        return h.new_zeros(h.shape[:1], dtype=dtype)
    out = h.new_empty(h.shape[:1], dtype=dtype)
    tensors = (h, _rows_of(log_scale, h))
    space = _launch.collapse(h.dim() - 1, tensors)
    segments = space.blocks.segments
    partial = out if segments == 1 else h.new_empty((space.rows, segments), dtype=dtype)
    offset = -0.5 * math.log(2 * math.pi) * space.cols if prior == GAUSSIAN.value else 0.0
    _launch.over_space(
        forward_kernel, space, h, *_launch.views(tensors, space.at), partial, _launch.number(offset, dtype),
        PRIOR=prior,
    )  # fmt: skip
    if segments > 1:
        _launch.sum_segments(partial, out)
    return out


def flow_log_prob_backward(grad: Tensor, h: Tensor, log_scale: Tensor | None, prior: int) -> tuple[Tensor, Tensor]:
    gh = torch.empty_like(h)
    glog_scale = h.new_empty(0) if log_scale is None else torch.empty_like(log_scale)
    if h.numel() == 0:
        return gh, glog_scale.zero_()
    tensors = (h, _rows_of(log_scale, h), gh, None if log_scale is None else _rows_of(glog_scale, h))
    space = _launch.collapse(h.dim() - 1, tensors, (grad,))
    blocks = space.blocks
    # at most 512 partial sums per column, each of at least 32 rows
    block_rows = max(blocks.rows, 32, _launch.power_of_two(-(-space.rows // 512)))
    count = -(-space.rows // block_rows)
    partial = None if log_scale is None else h.new_empty((count, space.cols), dtype=_launch.compute_dtype(h))
    _launch.over_space(
        backward_kernel, space, h, (grad, space.row_at[0]), *_launch.views(tensors[:3], space.at), partial,
        blocks=blocks.by_rows(space, block_rows), block_rows=block_rows, PRIOR=prior,
    )  # fmt: skip
    if log_scale is not None:
        _launch.launch(
            sum_blocks, -(-space.cols // 64), h.device, partial, (glog_scale, space.at[3]), space.sizes, count,
            space.cols // space.vec, VEC=space.vec, BLOCK_R=16, BLOCK_C=64,
        )  # fmt: skip
    return gh, glog_scale


def _rows_of(log_scale: Tensor | None, h: Tensor) -> Tensor | None:
    """Expand log_scale to the shape of h, without a copy."""
    return None if log_scale is None else log_scale.expand(h.shape)
