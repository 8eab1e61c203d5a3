"""Centring of matrices, H K H: two passes, the second one last matrix first, while it is still in the cache.

Sums are float64; their order depends on the shape of a matrix and its alignment, not on the batch.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._tiles import store_as, width

LINE = 512  # bytes of a row that a warp reads at once
COLUMNS = 4 * LINE  # bytes of a row in one program
WIDTH = 128  # columns of a program of `means_kernel`


@triton.jit
def pointers(view, item, i, c, VEC: tl.constexpr):
    """Pointers to entries of a matrix; the strides of matrices and rows are in units of VEC entries."""
    tensor, at = view
    return tensor + ((item * at[0] + i.to(tl.int64) * at[1]) * VEC + c.to(tl.int64) * at[2])


@triton.jit
def values_at(gram, item, i, c, inside, VEC: tl.constexpr):
    values = tl.load(pointers(gram, item, i, c, VEC), mask=inside, other=0.0)
    if values.dtype != tl.float64:
        values = values.to(tl.float32)
    return values.to(tl.float64)


@triton.jit(do_not_specialize=["n", "blocks", "chunks"])
def sums_kernel(
    gram, row_parts, column_parts, n, blocks, chunks,
    VEC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sums of a block of rows in a chunk of columns; row_parts (batch, chunks, n), column_parts (batch, blocks, n)."""
    chunk = tl.program_id(0) % chunks
    block = tl.program_id(0) // chunks % blocks
    item = (tl.program_id(0) // chunks // blocks).to(tl.int64)
    i = block * BLOCK_R + tl.arange(0, BLOCK_R)
    size = width(n, i, VEC)
    # neighbours in a vector are added first, so that lanes keep one sum each until the end
    total = tl.zeros((BLOCK_R, BLOCK_C // VEC), tl.float64)
    for c0 in range(0, CHUNK, BLOCK_C):
        c = chunk * CHUNK + c0 + tl.arange(0, BLOCK_C)
        inside = (i < size)[:, None] & (c < size)[None, :]
        values = values_at(gram, item, i[:, None], c[None, :], inside, VEC)
        total += tl.sum(tl.reshape(values, (BLOCK_R, BLOCK_C // VEC, VEC)), 2)
        tl.store(column_parts + (item * blocks + block) * size + c, tl.sum(values, 0), mask=c < size)
    tl.store(row_parts + (item * chunks + chunk) * size + i, tl.sum(total, 1), mask=i < size)


@triton.jit
def sum_parts(parts, item, count, n, c, BLOCK: tl.constexpr):
    """Sum parts (batch, count, n) over `count`, for one matrix and columns c."""
    acc = tl.zeros((BLOCK, c.shape[0]), tl.float64)
    for first in range(0, count, BLOCK):
        k = first + tl.arange(0, BLOCK)
        inside = (k < count)[:, None] & (c < n)[None, :]
        acc += tl.load(parts + (item * count + k)[:, None] * n + c[None, :], mask=inside, other=0.0)
    return tl.sum(acc, 0)


@triton.jit(do_not_specialize=["n", "blocks", "chunks", "tiles"])
def means_kernel(
    row_parts, column_parts, row_means, column_means, totals, n, blocks, chunks, tiles, WIDTH: tl.constexpr
):
    """Means of WIDTH rows and of as many columns; totals (batch, tiles) are parts of the mean of all entries."""
    tile = tl.program_id(0) % tiles
    item = (tl.program_id(0) // tiles).to(tl.int64)
    c = tile * WIDTH + tl.arange(0, WIDTH)
    columns = sum_parts(column_parts, item, blocks, n, c, 16) / n
    rows = sum_parts(row_parts, item, chunks, n, c, 4) / n
    tl.store(column_means + item * n + c, columns, mask=c < n)
    tl.store(row_means + item * n + c, rows, mask=c < n)
    tl.store(totals + item * tiles + tile, tl.sum(columns, 0) / n)


@triton.jit(do_not_specialize=["n", "blocks", "chunks", "tiles"])
def subtract_kernel(
    gram, out, row_means, column_means, totals, n, blocks, chunks, tiles,
    VEC: tl.constexpr, BLOCK_R: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Subtract row means and column means, add the mean of all entries."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    chunk = program % chunks
    block = program // chunks % blocks
    item = (program // chunks // blocks).to(tl.int64)
    mean = tl.zeros((32,), tl.float64)
    for t0 in range(0, tiles, 32):
        t = t0 + tl.arange(0, 32)
        mean += tl.load(totals + item * tiles + t, mask=t < tiles, other=0.0)
    mean = tl.sum(mean, 0)
    c = chunk * CHUNK + tl.arange(0, CHUNK)
    size = width(n, c, VEC)
    column = tl.load(column_means + item * size + c, mask=c < size, other=0.0)[None, :]
    for r0 in range(0, ROWS, BLOCK_R):
        i = block * ROWS + r0 + tl.arange(0, BLOCK_R)
        row = tl.load(row_means + item * size + i, mask=i < size, other=0.0)
        inside = (i < size)[:, None] & (c < size)[None, :]
        values = values_at(gram, item, i[:, None], c[None, :], inside, VEC)
        result = values - ((row - mean)[:, None] + column)
        store_as(pointers(out, item, i[:, None], c[None, :], VEC), result, inside)


def center_into(gram: Tensor, out: Tensor) -> None:
    """Write H K H of gram (..., n, n) to `out`, which may be gram."""
    if gram.numel() == 0:
        return
    flat = out if out.dim() == 3 else out.unsqueeze(0) if out.dim() == 2 else None
    if flat is None and out.is_contiguous():
        flat = out.flatten(0, -3)
    if flat is None:
        # leading dims that cannot be merged
        for one, target in zip(gram, out, strict=True):
            center_into(one, target)
        return
    source = gram.reshape(flat.shape) if gram is not out else flat
    batch, n, _ = flat.shape
    bytes_each = source.element_size()
    vec = math.gcd(16 // bytes_each, n, *source.stride()[:2], *flat.stride()[:2])
    views = [(t, (t.stride(0) // vec, t.stride(1) // vec, t.stride(2))) for t in (source, flat)]
    chunk = COLUMNS // bytes_each
    rows = 32 if bytes_each == 2 else 64
    blocks, chunks, tiles = -(-n // rows), -(-n // chunk), -(-n // WIDTH)
    new = lambda *shape: gram.new_empty(shape, dtype=torch.float64)
    row_parts, column_parts, totals = new(batch, chunks, n), new(batch, blocks, n), new(batch, tiles)
    row_means, column_means = new(batch, n), new(batch, n)
    _launch.launch(
        sums_kernel, batch * blocks * chunks, gram.device, views[0], row_parts, column_parts, n // vec, blocks,
        chunks, VEC=vec, BLOCK_R=rows, BLOCK_C=LINE // bytes_each, CHUNK=chunk,
    )  # fmt: skip
    _launch.launch(
        means_kernel, batch * tiles, gram.device, row_parts, column_parts, row_means, column_means, totals, n, blocks,
        chunks, tiles, WIDTH=WIDTH,
    )  # fmt: skip
    _launch.launch(
        subtract_kernel, batch * blocks * chunks, gram.device, *views, row_means, column_means,
        totals, n // vec, blocks, chunks, tiles, VEC=vec, BLOCK_R=8, ROWS=rows, CHUNK=chunk,
    )  # fmt: skip


def center_gram(gram: Tensor) -> Tensor:
    out = torch.empty_like(gram, memory_format=torch.contiguous_format)
    center_into(gram, out)
    return out


def center_gram_(gram: Tensor) -> None:
    center_into(gram, gram)
