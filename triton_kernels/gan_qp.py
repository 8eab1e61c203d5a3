"""GAN-QP critic: sums of deviations of each sample, then its loss and gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schemas import DISTANCES
from . import _launch
from ._math import div, neg
from ._tiles import fold, load, load_rows, place, row_sums, scalar, store_as, tile_at, zeros

L1 = tl.constexpr(DISTANCES.index("l1"))
L2 = tl.constexpr(DISTANCES.index("l2"))


@triton.jit(do_not_specialize=["rows", "cols", "segments"])
def sums_kernel(
    real, fake, out, sizes, rows, cols, segments, DISTANCE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Sums of |real - fake| or of its square: (rows, segments)."""
    dtype: tl.constexpr = out.dtype.element_ty
    row, segment = place(segments, TILE)
    acc = zeros(TILE, dtype)
    for c0 in range(0, TILE.segment, TILE.cols):
        tile = tile_at(sizes, row, segment * TILE.segment + c0, rows, cols, TILE)
        difference = load(real, tile, TILE, dtype) - load(fake, tile, TILE, dtype)
        if DISTANCE == L1:
            term = tl.abs(difference)
        else:
            tl.static_assert(DISTANCE == L2)
            term = difference * difference
        acc += tl.where(tile.inside, term, 0.0)
    tl.store(out + row.to(tl.int64) * segments + segment, fold(acc), mask=row < rows)


@triton.jit
def mean_distance(sums, r, rows, segments, count, DISTANCE: tl.constexpr, BLOCK_C: tl.constexpr):
    mean = div(row_sums(sums, r, rows, segments, BLOCK_C), scalar(count, sums.dtype.element_ty))
    if DISTANCE == L1:
        return mean
    else:
        return tl.sqrt(mean) if sums.dtype.element_ty == tl.float64 else tl.sqrt_rn(mean)


@triton.jit
def quotient(delta, d, lam2, eps):
    """delta / (2 lam (d + eps)), and whether the divisor is 0."""
    width = scalar(lam2, d.dtype) * (d + scalar(eps, d.dtype))
    return div(delta, width), width == 0.0


@triton.jit(do_not_specialize=["rows", "x_segments", "z_segments"])
def loss_kernel(
    t_real, t_fake, x_sums, x_segments, x_count, z_sums, z_segments, z_count, loss, d, rows, lam2, eps,
    DISTANCE: tl.constexpr, BLOCK_R: tl.constexpr, X_BLOCK: tl.constexpr, Z_BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = loss.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    distance = mean_distance(x_sums, r, rows, x_segments, x_count, DISTANCE, X_BLOCK)
    if z_sums is not None:
        distance += mean_distance(z_sums, r, rows, z_segments, z_count, DISTANCE, Z_BLOCK)
    delta = load_rows(t_real, r, rows).to(dtype) - load_rows(t_fake, r, rows).to(dtype)
    q, still = quotient(delta, distance, lam2, eps)
    tl.store(loss + r, tl.where(still, 0.0, delta * q - delta), mask=r < rows)
    tl.store(d + r, distance, mask=r < rows)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(grad, t_real, t_fake, d, g_real, g_fake, rows, lam2, eps, BLOCK_R: tl.constexpr):
    dtype: tl.constexpr = d[0].dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    delta = load_rows(t_real, r, rows).to(dtype) - load_rows(t_fake, r, rows).to(dtype)
    q, still = quotient(delta, load_rows(d, r, rows), lam2, eps)
    slope = tl.where(still, 0.0, 2.0 * q - 1.0)
    g = load_rows(grad, r, rows).to(dtype) * slope
    store_as(g_real[0] + r * g_real[1], g, r < rows)
    store_as(g_fake[0] + r * g_fake[1], neg(g), r < rows)


def gan_qp_loss(
    t_real: Tensor,
    t_fake: Tensor,
    x_real: Tensor,
    x_fake: Tensor,
    z_real: Tensor | None,
    z_fake: Tensor | None,
    lam: float,
    eps: float,
    distance: int,
) -> tuple[Tensor, Tensor]:
    tensors = (t_real, t_fake, x_real, x_fake, z_real, z_fake)
    dtype = torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    rows = x_real.shape[0]
    loss, d = (x_real.new_empty(rows, dtype=dtype) for _ in range(2))
    if rows == 0:
        return loss, d
    x, x_count = _sums(x_real, x_fake, distance, dtype)
    z, z_count = (None, 1) if z_real is None or z_fake is None else _sums(z_real, z_fake, distance, dtype)
    segments = [1 if sums is None else sums.shape[1] for sums in (x, z)]
    blocks = [min(_launch.TILE, _launch.power_of_two(n)) for n in segments]
    # rows per program: the wider of the two tiles has TILE elements
    block = _launch.TILE // max(blocks)
    numbers = (_launch.number(value, dtype) for value in (x_count, z_count, 2 * lam, eps))
    of_x, of_z, lam2, safe = numbers
    _launch.launch(
        loss_kernel, -(-rows // block), x_real.device, *_of_rows(t_real, t_fake), x, segments[0], of_x, z, segments[1],
        of_z, loss, d, rows, lam2, safe, DISTANCE=distance, BLOCK_R=block, X_BLOCK=blocks[0], Z_BLOCK=blocks[1],
    )  # fmt: skip
    return loss, d


def gan_qp_loss_backward(
    grad: Tensor, t_real: Tensor, t_fake: Tensor, d: Tensor, lam: float, eps: float
) -> tuple[Tensor, Tensor]:
    g_real, g_fake = torch.empty_like(t_real), torch.empty_like(t_fake)
    rows, dtype = t_real.shape[0], d.dtype
    if rows:
        views = _of_rows(grad, t_real, t_fake, d, g_real, g_fake)
        _launch.launch(
            backward_kernel, -(-rows // _launch.TILE), d.device, *views, rows, _launch.number(2 * lam, dtype),
            _launch.number(eps, dtype), BLOCK_R=_launch.TILE,
        )  # fmt: skip
    return g_real, g_fake


def _of_rows(*tensors: Tensor) -> list[tuple[Tensor, int]]:
    """Row views of tensors (rows,)."""
    return [(t, t.stride(0)) for t in tensors]


def _sums(real: Tensor, fake: Tensor, distance: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Return sums of deviations (rows, segments) and the number of elements of a sample."""
    space = _launch.collapse(real.dim() - 1, (real, fake))
    sums = real.new_empty((space.rows, space.blocks.segments), dtype=dtype)
    _launch.over_space(sums_kernel, space, sums, *_launch.views((real, fake), space.at), sums, DISTANCE=distance)
    return sums, space.cols
