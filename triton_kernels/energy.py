"""The accept step of a Metropolis-adjusted Langevin chain, and squared norms of gradients."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schemas import PURPOSES
from . import _launch, _random
from ._random import log_plain, uniform, words_at
from ._tiles import fold, load, place, scalar, store, store_as, width

ACCEPT = PURPOSES.index("accept")
SCALARS = [*_random.SCALARS, "alpha_at", "alpha_bits", "u_at", "u_new_at", "u_out_at"]


@triton.jit
def transition_sum(
    z, z_at, z_new, z_new_at, grad, grad_at, grad_new, grad_new_at, alpha, alpha_at, alpha_bits, sizes, r, segment,
    rows, cols, dtype: tl.constexpr, VEC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    SEGMENT: tl.constexpr,
):  # fmt: skip
    """Sum the log-ratio terms of rows r over one segment: (BLOCK_R,), see csrc/ops/energy.h."""
    if alpha is None:
        size = scalar(alpha_bits, dtype)
    else:
        size = tl.load(alpha + r.to(tl.int64) * alpha_at, mask=r < rows, other=0.0).to(dtype)
    acc = tl.zeros((BLOCK_R, BLOCK_C), dtype)
    for c0 in range(0, SEGMENT, BLOCK_C):
        c = (segment * SEGMENT + c0 + tl.arange(0, BLOCK_C))[None, :]
        inside = (r < rows) & (c < width(cols, c, VEC))
        old = load(z, z_at, sizes, r, c, inside, VEC, dtype)
        new = load(z_new, z_new_at, sizes, r, c, inside, VEC, dtype)
        g = load(grad, grad_at, sizes, r, c, inside, VEC, dtype)
        g_new = load(grad_new, grad_new_at, sizes, r, c, inside, VEC, dtype)
        term = (g + g_new) * (0.5 * (new - old) + 0.25 * size * (g - g_new))
        acc += tl.where(inside, term, 0.0)
    return fold(acc)


@triton.jit
def finite(x):
    # NaN compares false, and inf - inf is NaN
    return (x - x) == 0.0


@triton.jit(do_not_specialize=SCALARS)
def sums_kernel(
    z, z_at, z_new, z_new_at, grad, grad_at, grad_new, grad_new_at, partial, alpha, alpha_at, alpha_bits, sizes, rows,
    cols, segments, INDEX: tl.constexpr, VEC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    SEGMENT: tl.constexpr,
):  # fmt: skip
    row, segment = place(segments, INDEX, BLOCK_R)
    total = transition_sum(
        z, z_at, z_new, z_new_at, grad, grad_at, grad_new, grad_new_at, alpha, alpha_at, alpha_bits, sizes,
        row[:, None], segment, rows, cols, partial.dtype.element_ty, VEC, BLOCK_R, BLOCK_C, SEGMENT,
    )  # fmt: skip
    tl.store(partial + row.to(tl.int64) * segments + segment, total, mask=row < rows)


@triton.jit(do_not_specialize=SCALARS)
def accept_kernel(
    z, z_at, z_new, z_new_at, grad, grad_at, grad_new, grad_new_at, z_out, z_out_at, grad_out, grad_out_at, u, u_at,
    u_new, u_new_at, u_out, u_out_at, accepted, total, alpha, alpha_at, alpha_bits, seed, seed_at, seed_low,
    seed_high, step, step_low, step_high, purpose, sizes, rows, cols, segments,
    F64: tl.constexpr, PER_ROW: tl.constexpr, INDEX: tl.constexpr, VEC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Rows of one segment are summed here, so that the select finds them in the cache; `total` sums longer rows."""
    dtype: tl.constexpr = tl.float64 if F64 else tl.float32
    row, segment = place(segments, INDEX, BLOCK_R)
    r = row[:, None]
    at = row.to(tl.int64)
    if total is None:
        ratio = transition_sum(
            z, z_at, z_new, z_new_at, grad, grad_at, grad_new, grad_new_at, alpha, alpha_at, alpha_bits, sizes, r,
            segment, rows, cols, dtype, VEC, BLOCK_R, BLOCK_C, SEGMENT,
        )  # fmt: skip
    else:
        ratio = tl.load(total + at, mask=row < rows, other=0.0)
    # element `row` of the shared stream, or element 0 of the row's own stream
    k = at * 0 if PER_ROW else at
    w0, w1, w2, w3 = words_at(
        k >> 2, seed, seed_at, seed_low, seed_high, step, step_low, step_high, purpose, row, row < rows
    )  # fmt: skip
    low, high = tl.where((k & 1) == 0, w0, w1), tl.where((k & 1) == 0, w2, w3)
    draw = uniform(tl.where((k & 2) == 0, low, high))
    log_draw = tl.where(draw > 0.0, log_plain(tl.where(draw > 0.0, draw, 1.0)), -float("inf")).to(dtype)
    old = tl.load(u + at * u_at, mask=row < rows, other=0.0).to(dtype)
    new = tl.load(u_new + at * u_new_at, mask=row < rows, other=0.0).to(dtype)
    accepts = (log_draw < old - new + ratio) & finite(new) & finite(ratio)
    first = (row < rows) & (segment == 0)
    store_as(u_out + at * u_out_at, tl.where(accepts, new, old), first)
    tl.store(accepted + at, accepts, mask=first)
    takes = accepts[:, None]
    for c0 in range(0, SEGMENT, BLOCK_C):
        c = (segment * SEGMENT + c0 + tl.arange(0, BLOCK_C))[None, :]
        inside = (r < rows) & (c < width(cols, c, VEC))
        # load only the state that is kept
        p = load(z, z_at, sizes, r, c, inside & ~takes, VEC, dtype)
        q = load(z_new, z_new_at, sizes, r, c, inside & takes, VEC, dtype)
        store(z_out, z_out_at, sizes, r, c, inside, VEC, tl.where(takes, q, p))
        p = load(grad, grad_at, sizes, r, c, inside & ~takes, VEC, dtype)
        q = load(grad_new, grad_new_at, sizes, r, c, inside & takes, VEC, dtype)
        store(grad_out, grad_out_at, sizes, r, c, inside, VEC, tl.where(takes, q, p))


@triton.jit(do_not_specialize=["rows", "cols", "segments"])
def squares_kernel(
    x, x_at, partial, sizes, rows, cols, segments, INDEX: tl.constexpr, VEC: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    row, segment = place(segments, INDEX, BLOCK_R)
    r = row[:, None]
    dtype: tl.constexpr = partial.dtype.element_ty
    acc = tl.zeros((BLOCK_R, BLOCK_C), dtype)
    for c0 in range(0, SEGMENT, BLOCK_C):
        c = (segment * SEGMENT + c0 + tl.arange(0, BLOCK_C))[None, :]
        inside = (r < rows) & (c < width(cols, c, VEC))
        v = load(x, x_at, sizes, r, c, inside, VEC, dtype)
        acc += tl.where(inside, v * v, 0.0)
    tl.store(partial + row.to(tl.int64) * segments + segment, fold(acc), mask=row < rows)


def _rows(name: str, value: Tensor) -> dict[str, Any]:
    return {name: value, f"{name}_at": value.stride(0)}


def _alpha(alpha: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    if _random.by_value(alpha):
        return {"alpha": None, "alpha_at": 0, "alpha_bits": _launch.bits(alpha.item(), dtype)}
    return {"alpha": alpha, "alpha_at": alpha.stride(0) if alpha.dim() else 0, "alpha_bits": 0}


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
    arguments = _launch.with_strides(tensors, space.at)
    size, total = _alpha(alpha, dtype), None
    segments = space.blocks.segments
    if segments > 1:
        partial = z.new_empty((space.rows, segments), dtype=dtype)
        _launch.over_space(sums_kernel, space, like, *arguments[:8], partial, **size)
        total = z.new_empty(space.rows, dtype=dtype)
        _launch.sum_segments(partial, total)
    _launch.over_space(
        accept_kernel, space, like, *arguments, **_rows("u", u), **_rows("u_new", u_new), **_rows("u_out", u_out),
        accepted=accepted, total=total, **size, **_random.stream(seed, step, ACCEPT), F64=f64,
        num_warps=8,  # six tensors: lowers register pressure
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
    _launch.over_space(squares_kernel, space, grad, grad, space.at[0], partial)
    if segments > 1:
        _launch.sum_segments(partial, out)
    return out
