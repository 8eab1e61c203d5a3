"""The accept step of a Metropolis-adjusted Langevin chain, and squared norms of gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schemas import PURPOSES
from . import _launch, _random
from ._random import log_plain, per_row, uniform, words_at
from ._tiles import fold, load, load_rows, only, place, row_value, store, store_as, tile_at, zeros

ACCEPT = PURPOSES.index("accept")


@triton.jit
def transition_sum(
    z, z_new, grad, grad_new, alpha, sizes, row, segment, rows, cols, TILE: tl.constexpr, dtype: tl.constexpr
):
    """Sum the log-ratio terms of rows `row` over one segment: (R,), see csrc/ops/energy.h."""
    size = row_value(alpha, row[:, None], rows, dtype)
    acc = zeros(TILE, dtype)
    for c0 in range(0, TILE.segment, TILE.cols):
        tile = tile_at(sizes, row, segment * TILE.segment + c0, rows, cols, TILE)
        old = load(z, tile, TILE, dtype)
        new = load(z_new, tile, TILE, dtype)
        g = load(grad, tile, TILE, dtype)
        g_new = load(grad_new, tile, TILE, dtype)
        term = (g + g_new) * (0.5 * (new - old) + 0.25 * size * (g - g_new))
        acc += tl.where(tile.inside, term, 0.0)
    return fold(acc)


@triton.jit
def finite(x):
    # NaN compares false, and inf - inf is NaN
    return (x - x) == 0.0


@triton.jit(do_not_specialize=["rows", "cols", "segments"])
def sums_kernel(z, z_new, grad, grad_new, partial, alpha, sizes, rows, cols, segments, TILE: tl.constexpr):
    row, segment = place(segments, TILE)
    dtype: tl.constexpr = partial.dtype.element_ty
    total = transition_sum(z, z_new, grad, grad_new, alpha, sizes, row, segment, rows, cols, TILE, dtype)
    tl.store(partial + row.to(tl.int64) * segments + segment, total, mask=row < rows)


@triton.jit
def keep(old, new, out, tile, takes, TILE: tl.constexpr, dtype: tl.constexpr):
    """Copy the rows that are kept or taken; load only these."""
    p = load(old, only(tile, ~takes), TILE, dtype)
    q = load(new, only(tile, takes), TILE, dtype)
    store(out, tile, TILE, tl.where(takes, q, p))


@triton.jit(do_not_specialize=["rows", "cols", "segments"])
def accept_kernel(
    z, z_new, grad, grad_new, z_out, grad_out, u, u_new, u_out, accepted, total, alpha, stream, sizes, rows, cols,
    segments, F64: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rows of one segment are summed here, so that the select finds them in the cache; `total` sums longer rows."""
    dtype: tl.constexpr = tl.float64 if F64 else tl.float32
    row, segment = place(segments, TILE)
    at = row.to(tl.int64)
    if total is None:
        ratio = transition_sum(z, z_new, grad, grad_new, alpha, sizes, row, segment, rows, cols, TILE, dtype)
    else:
        ratio = tl.load(total + at, mask=row < rows, other=0.0)
    # element `row` of the shared stream, or element 0 of the row's own stream
    k = at * 0 if per_row(stream.seed) else at
    w0, w1, w2, w3 = words_at(k >> 2, stream, row, rows)
    low, high = tl.where((k & 1) == 0, w0, w1), tl.where((k & 1) == 0, w2, w3)
    draw = uniform(tl.where((k & 2) == 0, low, high))
    log_draw = tl.where(draw > 0.0, log_plain(tl.where(draw > 0.0, draw, 1.0)), -float("inf")).to(dtype)
    old = load_rows(u, row, rows).to(dtype)
    new = load_rows(u_new, row, rows).to(dtype)
    accepts = (log_draw < old - new + ratio) & finite(new) & finite(ratio)
    first = (row < rows) & (segment == 0)
    store_as(u_out[0] + at * u_out[1], tl.where(accepts, new, old), first)
    tl.store(accepted + at, accepts, mask=first)
    takes = accepts[:, None]
    for c0 in range(0, TILE.segment, TILE.cols):
        tile = tile_at(sizes, row, segment * TILE.segment + c0, rows, cols, TILE)
        keep(z, z_new, z_out, tile, takes, TILE, dtype)
        keep(grad, grad_new, grad_out, tile, takes, TILE, dtype)


@triton.jit(do_not_specialize=["rows", "cols", "segments"])
def squares_kernel(x, partial, sizes, rows, cols, segments, TILE: tl.constexpr):
    row, segment = place(segments, TILE)
    dtype: tl.constexpr = partial.dtype.element_ty
    acc = zeros(TILE, dtype)
    for c0 in range(0, TILE.segment, TILE.cols):
        tile = tile_at(sizes, row, segment * TILE.segment + c0, rows, cols, TILE)
        v = load(x, tile, TILE, dtype)
        acc += tl.where(tile.inside, v * v, 0.0)
    tl.store(partial + row.to(tl.int64) * segments + segment, fold(acc), mask=row < rows)


def mala_accept(
    z: Tensor,
    z_new: Tensor,
    u: Tensor,
    u_new: Tensor,
    grad: Tensor,
    grad_new: Tensor,
    alpha: Tensor,
    seed: Tensor,
    step: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z_out, u_out, grad_out = (torch.empty_like(t) for t in (z, u, grad))
    accepted = z.new_empty(z.shape[:1], dtype=torch.bool)
    if z.shape[0] == 0:
        return z_out, u_out, grad_out, accepted
    f64 = any(t.dtype == torch.float64 for t in (z, z_new, u, u_new, grad, grad_new))
    dtype = torch.float64 if f64 else torch.float32
    like = z.new_empty(0, dtype=dtype)
    tensors = [z, z_new, grad, grad_new, z_out, grad_out]
    if z.numel() == 0:
        # samples without elements: only the energies decide
        tensors = [t.new_zeros(t.shape[0], 1) for t in tensors]
    space = _launch.collapse(tensors[0].dim() - 1, tensors)
    views, total = _launch.views(tensors, space.at), None
    size = _launch.row_view(alpha, dtype)
    segments = space.blocks.segments
    if segments > 1:
        partial = z.new_empty((space.rows, segments), dtype=dtype)
        _launch.over_space(sums_kernel, space, like, *views[:4], partial, size)
        total = z.new_empty(space.rows, dtype=dtype)
        _launch.sum_segments(partial, total)
    energies = [(t, t.stride(0)) for t in (u, u_new, u_out)]
    _launch.over_space(
        accept_kernel, space, like, *views, *energies, accepted, total, size, _random.stream(seed, step, ACCEPT),
        F64=f64, num_warps=8,  # six tensors: lowers register pressure
    )  # fmt: skip
    return z_out, u_out, grad_out, accepted


def grad_norm_penalty(grad: Tensor) -> Tensor:
    dtype = _launch.compute_dtype(grad)
    if grad.numel() == 0:
        return grad.new_zeros(grad.shape[:1], dtype=dtype)
    space = _launch.collapse(grad.dim() - 1, (grad,))
    segments = space.blocks.segments
    out = grad.new_empty(grad.shape[:1], dtype=dtype)
    partial = out if segments == 1 else grad.new_empty((space.rows, segments), dtype=dtype)
    _launch.over_space(squares_kernel, space, grad, (grad, space.at[0]), partial)
    if segments > 1:
        _launch.sum_segments(partial, out)
    return out
