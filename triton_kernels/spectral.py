"""Spectral normalisation: power iteration with one pass over W per round, division by sigma, gradient.

Each layer takes one launch per pass. A table of pointers would allow one launch for all layers, but it must be copied
from the host on every call, so a CUDA graph would replay stale addresses; and Triton knows neither alignment nor dtype
behind such pointers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.spectral import FLOOR
from . import _launch
from ._math import constant, div
from ._tiles import fold, fold_rows, store_as

ROWS = 16  # rows of W per program
COLS = 128  # columns of W per loop iteration
FLAT = 1024  # elements of a vector per loop iteration
SMALLEST = tl.constexpr(FLOOR)


@triton.jit
def vanishes(norm):
    return tl.abs(norm) <= constant(SMALLEST, norm)


@triton.jit
def root(x):
    """Correctly rounded square root."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def total(v):
    """The sum of a vector, in a fixed order."""
    return tl.sum(fold(tl.reshape(v, (1, v.shape[0]))), axis=0)


@triton.jit
def product_kernel(w, v, y, partial, rows, cols, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """y = W v for one block of rows, and the block's part of W' y: partial (row blocks, cols)."""
    dtype: tl.constexpr = tl.float64 if w.dtype.element_ty == tl.float64 else tl.float32
    block = tl.program_id(0).to(tl.int64)
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    start = w + (r * cols)[:, None]
    acc = tl.zeros((BLOCK_R, BLOCK_C), dtype)
    for c0 in range(0, cols, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        inside = (r < rows)[:, None] & (c < cols)[None, :]
        along = tl.load(v + c, mask=c < cols, other=0.0).to(dtype)[None, :]
        acc = tl.fma(tl.load(start + c[None, :], mask=inside, other=0.0).to(dtype), along + tl.zeros_like(acc), acc)
    product = fold(acc)
    tl.store(y + r, product, mask=r < rows)
    for c0 in range(0, cols, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        inside = (r < rows)[:, None] & (c < cols)[None, :]
        terms = tl.load(start + c[None, :], mask=inside, other=0.0).to(dtype) * product[:, None]
        tl.store(partial + block * cols + c, fold_rows(terms), mask=c < cols)


@triton.jit
def reduce_kernel(partial, z, blocks, cols, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum partial (row blocks, cols) to z (cols,)."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_R, BLOCK_C), partial.dtype.element_ty)
    for first in range(0, blocks, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        inside = (r < blocks)[:, None] & (c < cols)[None, :]
        acc += tl.load(partial + (r.to(tl.int64) * cols)[:, None] + c[None, :], mask=inside, other=0.0)
    tl.store(z + c, fold_rows(acc), mask=c < cols)


@triton.jit
def finish_kernel(
    y, z, u, v, u_out, v_out, sigma, rows, cols,
    VECTOR: tl.constexpr, ITERATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Norms of W v and W' u, then new u and v (unchanged where a norm vanishes) and sigma."""
    dtype: tl.constexpr = sigma.dtype.element_ty
    acc = tl.zeros((BLOCK,), dtype)
    one = tl.sum(acc, axis=0) + 1.0
    if ITERATES:
        left = one
        if not VECTOR:
            for r0 in range(0, rows, BLOCK):
                r = r0 + tl.arange(0, BLOCK)
                part = tl.load(y + r, mask=r < rows, other=0.0).to(dtype)
                acc = tl.fma(part, part, acc)
            left = root(total(acc))
        # do not divide by a vanishing norm
        by_left = tl.where(vanishes(left), one, left)
        acc = tl.zeros((BLOCK,), dtype)
        for c0 in range(0, cols, BLOCK):
            c = c0 + tl.arange(0, BLOCK)
            part = div(tl.load(z + c, mask=c < cols, other=0.0).to(dtype), by_left)
            acc = tl.fma(part, part, acc)
        right = root(total(acc))
        stalls = vanishes(left) | vanishes(right)
        by_right = tl.where(vanishes(right), one, right)
        value = tl.where(vanishes(left), 0.0, right)
        if not VECTOR:
            for r0 in range(0, rows, BLOCK):
                r = r0 + tl.arange(0, BLOCK)
                new = div(tl.load(y + r, mask=r < rows, other=0.0).to(dtype), by_left)
                old = tl.load(u + r, mask=r < rows, other=0.0).to(dtype)
                store_as(u_out + r, tl.where(stalls, old, new), r < rows)
            for c0 in range(0, cols, BLOCK):
                c = c0 + tl.arange(0, BLOCK)
                new = div(div(tl.load(z + c, mask=c < cols, other=0.0).to(dtype), by_left), by_right)
                old = tl.load(v + c, mask=c < cols, other=0.0).to(dtype)
                store_as(v_out + c, tl.where(stalls, old, new), c < cols)
    else:
        for r0 in range(0, rows, BLOCK):
            r = r0 + tl.arange(0, BLOCK)
            part = tl.load(y + r, mask=r < rows, other=0.0).to(dtype)
            acc = tl.fma(part, tl.load(u + r, mask=r < rows, other=0.0).to(dtype), acc)
        value = total(acc)
    tl.store(sigma, tl.where(vanishes(value), constant(SMALLEST, value), value))


@triton.jit
def scale_kernel(w, out, sigma, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = sigma.dtype.element_ty
    value = tl.load(w + i, mask=i < count, other=0.0).to(dtype)
    store_as(out + i, div(value, tl.load(sigma)), i < count)


@triton.jit
def dot_kernel(grad, w, partial, count, BLOCK: tl.constexpr):
    """One block's part of sum(grad * W)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = partial.dtype.element_ty
    a = tl.load(grad + i, mask=i < count, other=0.0).to(dtype)
    tl.store(partial + tl.program_id(0), total(a * tl.load(w + i, mask=i < count, other=0.0).to(dtype)))


@triton.jit
def slope_kernel(partial, grad_sigma, sigma, slope, blocks, BLOCK: tl.constexpr):
    """grad_sigma - sum(grad * W) / sigma^2; 0 where sigma is at its floor."""
    acc = tl.zeros((BLOCK,), slope.dtype.element_ty)
    for first in range(0, blocks, BLOCK):
        i = first + tl.arange(0, BLOCK)
        acc += tl.load(partial + i, mask=i < blocks, other=0.0)
    s = tl.load(sigma)
    value = tl.load(grad_sigma).to(s.dtype) - div(div(total(acc), s), s)
    tl.store(slope, tl.where(vanishes(s), 0.0, value))


@triton.jit
def gradient_kernel(
    grad, w, u, v, sigma, slope, out, count, cols, VECTOR: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """grad / sigma + slope u v'; for a vector, u v' is W / sigma."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(sigma)
    inside = i < count
    g = div(tl.load(grad + i, mask=inside, other=0.0).to(s.dtype), s)
    if VECTOR:
        outer = div(tl.load(w + i, mask=inside, other=0.0).to(s.dtype), s)
    else:
        left = tl.load(u + i // cols, mask=inside, other=0.0).to(s.dtype)
        outer = left * tl.load(v + i % cols, mask=inside, other=0.0).to(s.dtype)
    store_as(out + i, tl.fma(tl.load(slope) + tl.zeros_like(g), outer, g), inside)


def spectral_normalize(weights: list[Tensor], u: list[Tensor], v: list[Tensor], n_iter: int) -> list[Tensor]:
    lists = [_normalized(*layer, n_iter) for layer in zip(weights, u, v, strict=True)]
    return [tensor for tensors in zip(*lists, strict=True) for tensor in tensors]


def _normalized(weight: Tensor, u: Tensor, v: Tensor, n_iter: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (weight, u, v, sigma) of one layer."""
    w, dtype, device = weight.contiguous(), _launch.compute_dtype(weight), weight.device
    vector = w.dim() == 1
    rows, cols = (1, w.numel()) if vector else (w.shape[0], w[0].numel())
    sigma = w.new_empty((), dtype=dtype)
    u, v, new_u, new_v = u.contiguous(), v.contiguous(), u.clone(), v.clone()
    if vector:
        _launch.launch(
            finish_kernel, 1, device, w, w, u, v, new_u, new_v, sigma, rows, cols,
            VECTOR=True, ITERATES=True, BLOCK=FLAT,
        )  # fmt: skip
    else:
        blocks = -(-rows // ROWS)
        y, z = w.new_empty(rows, dtype=dtype), w.new_empty(cols, dtype=dtype)
        partial = w.new_empty((blocks, cols), dtype=dtype)
        # between rounds u and v stay in the compute dtype
        left, right = u, v
        for i in range(max(n_iter, 1)):
            last = i + 1 >= n_iter
            to = (new_u, new_v) if last else (u.new_empty(rows, dtype=dtype), v.new_empty(cols, dtype=dtype))
            _launch.launch(product_kernel, blocks, device, w, right, y, partial, rows, cols, BLOCK_R=ROWS, BLOCK_C=COLS)
            if n_iter:
                _launch.launch(
                    reduce_kernel, -(-cols // COLS), device, partial, z, blocks, cols, BLOCK_R=ROWS, BLOCK_C=COLS
                )
            _launch.launch(
                finish_kernel, 1, device, y, z, left, right, *to, sigma, rows, cols,
                VECTOR=False, ITERATES=n_iter > 0, BLOCK=FLAT,
            )  # fmt: skip
            left, right = to
    out = torch.empty_like(w)
    if w.numel():
        _launch.launch(scale_kernel, -(-w.numel() // FLAT), device, w, out, sigma, w.numel(), BLOCK=FLAT)
    return _as(weight, out), new_u, new_v, sigma


def spectral_normalize_backward(
    grads: list[Tensor],
    grad_sigmas: list[Tensor],
    weights: list[Tensor],
    u: list[Tensor],
    v: list[Tensor],
    sigmas: list[Tensor],
) -> list[Tensor]:
    return [_gradient(*layer) for layer in zip(grads, grad_sigmas, weights, u, v, sigmas, strict=True)]


def _gradient(grad: Tensor, grad_sigma: Tensor, weight: Tensor, u: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    w, g = weight.contiguous(), grad.contiguous()
    out = torch.empty_like(w)
    if not w.numel():
        return _as(weight, out)
    blocks = -(-w.numel() // FLAT)
    partial, slope = sigma.new_empty(blocks), sigma.new_empty(())
    _launch.launch(dot_kernel, blocks, w.device, g, w, partial, w.numel(), BLOCK=FLAT)
    _launch.launch(slope_kernel, 1, w.device, partial, grad_sigma, sigma, slope, blocks, BLOCK=FLAT)
    _launch.launch(
        gradient_kernel, blocks, w.device, g, w, u.contiguous(), v.contiguous(), sigma, slope, out, w.numel(),
        w.numel() // w.shape[0], VECTOR=w.dim() == 1, BLOCK=FLAT,
    )  # fmt: skip
    return _as(weight, out)


def _as(like: Tensor, values: Tensor) -> Tensor:
    """Return the values with the strides of empty_like(like)."""
    return values if like.is_contiguous() else torch.empty_like(like).copy_(values)
