"""Coupling layers: forward with log-determinant, and backward, over tensors of any dtype and strides."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schemas import PACKINGS, SCALE_MAPS
from . import _launch
from ._math import atan, constant, div, exp, log, neg, sigmoid, softplus, tanh
from ._tiles import compute_type, fold, load, load_pair, place, row_pointers, scalar, store, store_pair, tile_at, zeros

# shift, scale and None; or None, an integer view of interleaved pairs, and the type of its halves
Params = tuple[Tensor | None, Tensor, Any]
ATAN_GAIN = tl.constexpr(0.636)
CLAMP_EPS = tl.constexpr(1e-3)
CLAMP_MAX = tl.constexpr(3.0)
HALVES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def resolve(scale_map: int, arg: float) -> str:
    """Return MAP of the kernels: a name in SCALE_MAPS, or that of its formula with eps > 0."""
    name = SCALE_MAPS[scale_map]
    return f"{name}_eps" if arg > 0 and name in ("sigmoid", "softplus") else name


@triton.jit
def log_scale_slope(s, arg, MAP: tl.constexpr):
    """Log-scale g(s) and dg/ds of one element; `arg` is the constant of the map."""
    if MAP == "exp":
        return s, tl.full(s.shape, 1.0, s.dtype)
    elif MAP == "sigmoid":
        t = neg(s + 2.0)
        return neg(softplus(t)), sigmoid(t)
    elif MAP == "sigmoid_eps":
        p = sigmoid(s + 2.0)
        q = sigmoid(neg(s + 2.0))
        return log(p + arg), div(p * q, p + arg)
    elif MAP == "sigmoid_inv":
        t = neg(s + 2.0)
        return softplus(t), neg(sigmoid(t))
    elif MAP == "softplus":
        # log(softplus(s)) is -inf once softplus underflows
        p, e = softplus(s), exp(s)
        return tl.where(s < -15.0, s - 0.5 * e, log(p)), tl.where(s < -15.0, 1.0 - 0.5 * e, div(sigmoid(s), p))
    elif MAP == "softplus_eps":
        p = softplus(s) + arg
        return log(p), div(sigmoid(s), p)
    elif MAP == "tanh":
        t = tanh(s * div(constant(1.0, s), arg))
        return arg * t, tl.fma(neg(t), t, constant(1.0, s))
    elif MAP == "atan":
        gain = arg * constant(ATAN_GAIN, s)
        return gain * atan(s), div(gain, 1.0 + s * s)
    elif MAP == "softplus_clamp":
        p = softplus(s) + constant(CLAMP_EPS, s)
        clamped = p > CLAMP_MAX
        return log(tl.where(clamped, CLAMP_MAX, p)), tl.where(clamped, 0.0, div(sigmoid(s), p))
    else:
        tl.static_assert(MAP == "softsign")
        d = 1.0 + tl.abs(s) * div(constant(1.0, s), arg)
        return div(s, d), div(constant(1.0, s), d * d)


@triton.jit
def couple(x, shift, e, SHIFT_FIRST: tl.constexpr, INVERSE: tl.constexpr):
    """y of one element; e is exp(g) forward and exp(-g) inverse."""
    if INVERSE:
        return tl.fma(x, e, neg(shift)) if SHIFT_FIRST else (x - shift) * e
    else:
        return (x + shift) * e if SHIFT_FIRST else tl.fma(x, e, shift)


@triton.jit(do_not_specialize=["rows", "cols", "segments"])
def additive_kernel(
    x, shift, mask, y, sizes, rows, cols, segments, INVERSE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    dtype: tl.constexpr = compute_type(x[0])
    row, segment = place(segments, TILE)
    for c0 in range(0, TILE.segment, TILE.cols):
        tile = tile_at(sizes, row, segment * TILE.segment + c0, rows, cols, TILE)
        a = load(x, tile, TILE, dtype)
        t = load(shift, tile, TILE, dtype)
        b = a - t if INVERSE else a + t
        if mask is not None:
            b = tl.where(load(mask, tile, TILE, tl.int1), a, b)
        store(y, tile, TILE, b)


@triton.jit(do_not_specialize=["rows", "cols", "segments"])
def forward_kernel(
    x, shift, scale, mask, y, logdet, arg, sizes, rows, cols, segments,
    PAIR: tl.constexpr, MAP: tl.constexpr, SHIFT_FIRST: tl.constexpr, INVERSE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """PAIR: None, or the type of shift and scale, which interleave in `scale`."""
    dtype: tl.constexpr = compute_type(x[0])
    arg = scalar(arg, dtype)
    row, segment = place(segments, TILE)
    acc = zeros(TILE, dtype)
    for c0 in range(0, TILE.segment, TILE.cols):
        tile = tile_at(sizes, row, segment * TILE.segment + c0, rows, cols, TILE)
        a = load(x, tile, TILE, dtype)
        if PAIR is None:
            t = load(shift, tile, TILE, dtype)
            s = load(scale, tile, TILE, dtype)
        else:
            t, s = load_pair(scale, tile, TILE, PAIR, dtype)
        g, _ = log_scale_slope(s, arg, MAP)
        if INVERSE:
            g = neg(g)
        b = couple(a, t, exp(g), SHIFT_FIRST, INVERSE)
        counts = tile.inside
        if mask is not None:
            passes = load(mask, tile, TILE, tl.int1)
            b = tl.where(passes, a, b)
            counts = tile.inside & (passes == 0)
        store(y, tile, TILE, b)
        acc += tl.where(counts, g, 0.0)
    tl.store(logdet + row.to(tl.int64) * segments + segment, fold(acc), mask=row < rows)


@triton.jit(do_not_specialize=["rows", "cols", "segments"])
def backward_kernel(
    gl, x, gy, shift, scale, mask, gx, gshift, gscale, arg, sizes, rows, cols, segments,
    PAIR: tl.constexpr, MAP: tl.constexpr, SHIFT_FIRST: tl.constexpr, INVERSE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """PAIR: None, or the type of shift and scale, which interleave in `scale`."""
    dtype: tl.constexpr = compute_type(x[0])
    arg = scalar(arg, dtype)
    row, segment = place(segments, TILE)
    dlogdet = tl.full((TILE.rows, 1), 0.0, dtype)
    if gl is not None:
        dlogdet = tl.load(row_pointers(gl, sizes, row), mask=row < rows).to(dtype)[:, None]
    for c0 in range(0, TILE.segment, TILE.cols):
        tile = tile_at(sizes, row, segment * TILE.segment + c0, rows, cols, TILE)
        if PAIR is None:
            s = load(scale, tile, TILE, dtype)
        else:
            t, s = load_pair(scale, tile, TILE, PAIR, dtype)
        g, slope = log_scale_slope(s, arg, MAP)
        # without gy only gl contributes; x and shift are not read, so their NaN or inf reaches no gradient
        dy = zeros(TILE, dtype)
        dx = dy
        moved = dy
        if gy is not None:
            dy = load(gy, tile, TILE, dtype)
            dx = dy * exp(neg(g) if INVERSE else g)
            moved = load(x, tile, TILE, dtype)
            if SHIFT_FIRST != INVERSE:
                if PAIR is None:
                    t = load(shift, tile, TILE, dtype)
                moved = moved - t if INVERSE else moved + t
        dscale = tl.fma(dx, moved, dlogdet)
        if INVERSE:
            dshift = neg(dy) if SHIFT_FIRST else neg(dx)
            dscale = neg(dscale * slope)
        else:
            dshift = dx if SHIFT_FIRST else dy
            dscale = dscale * slope
        if mask is not None:
            passes = load(mask, tile, TILE, tl.int1)
            dx = tl.where(passes, dy, dx)
            dshift = tl.where(passes, 0.0, dshift)
            dscale = tl.where(passes, 0.0, dscale)
        store(gx, tile, TILE, dx)
        if PAIR is None:
            if gshift is not None:
                store(gshift, tile, TILE, dshift)
            store(gscale, tile, TILE, dscale)
        else:
            store_pair(gscale, tile, TILE, PAIR, dshift, dscale)


def additive_coupling(x: Tensor, shift: Tensor, mask: Tensor | None, inverse: bool) -> Tensor:
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    tensors = (x, shift, mask, y)
    space = _launch.collapse(_launch.any_event_dims(tensors), tensors)
    _launch.over_space(
        additive_kernel, space, x, *_launch.views(tensors, space.at), blocks=space.spread, INVERSE=inverse
    )
    return y


def affine_coupling(
    x: Tensor, shift: Tensor, scale: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    return _forward(x, (shift, scale, None), mask, *options)


def _forward(
    x: Tensor,
    params: Params,
    mask: Tensor | None,
    scale_map: int,
    map_arg: float,
    shift_first: bool,
    inverse: bool,
    event_dims: int,
) -> tuple[Tensor, Tensor]:
    shift, scale, pair = params
    y = torch.empty_like(x)
    batch = x.shape[: x.dim() - event_dims]
    sum_dtype = _launch.compute_dtype(x)
    if x.numel() == 0:
        return y, x.new_zeros(batch, dtype=sum_dtype)
    logdet = x.new_empty(batch, dtype=sum_dtype)
    tensors = (x, shift, scale, mask, y)
    space = _launch.collapse(event_dims, tensors)
    segments = space.blocks.segments
    partial = logdet if segments == 1 else x.new_empty((space.rows, segments), dtype=sum_dtype)
    _launch.over_space(
        forward_kernel, space, x, *_launch.views(tensors, space.at), partial, _launch.number(map_arg, sum_dtype),
        blocks=space.spread, PAIR=pair, MAP=resolve(scale_map, map_arg),
        SHIFT_FIRST=shift_first, INVERSE=inverse,
    )  # fmt: skip
    if segments > 1:
        _launch.sum_segments(partial, logdet)
    return y, logdet


def affine_coupling_backward(
    grad_y: Tensor | None,
    grad_logdet: Tensor | None,
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    mask: Tensor | None,
    scale_map: int,
    map_arg: float,
    shift_first: bool,
    inverse: bool,
    event_dims: int,
    shift_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    absent = shift_dtype is None
    grad_shift = x.new_empty(0) if absent else x.new_empty(x.shape, dtype=shift_dtype)
    grad_scale = torch.empty_like(scale)
    grad_x = _backward(
        grad_y, grad_logdet, x, (shift, scale, None), mask, (None if absent else grad_shift, grad_scale, None),
        scale_map, map_arg, shift_first, inverse, event_dims,
    )  # fmt: skip
    return grad_x, grad_shift, grad_scale


def affine_coupling_packed(
    x: Tensor, params: Tensor, mask: Tensor | None, packing: int, dim: int, *options: Any
) -> tuple[Tensor, Tensor]:
    return _forward(x, _unpack(params, packing, dim), mask, *options)


def affine_coupling_packed_backward(
    grad_y: Tensor | None,
    grad_logdet: Tensor | None,
    x: Tensor,
    params: Tensor,
    mask: Tensor | None,
    packing: int,
    dim: int,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    grad_params = torch.empty_like(params)
    both = [_unpack(t, packing, dim) for t in (params, grad_params)]
    if both[0][2] != both[1][2]:
        both = [_unpack(t, packing, dim, pairs=False) for t in (params, grad_params)]
    return _backward(grad_y, grad_logdet, x, both[0], mask, both[1], *options), grad_params


def _backward(
    gy: Tensor | None,
    gl: Tensor | None,
    x: Tensor,
    params: Params,
    mask: Tensor | None,
    grads: Params,
    scale_map: int,
    map_arg: float,
    shift_first: bool,
    inverse: bool,
    event_dims: int,
) -> Tensor:
    """Write the gradients of shift (may be None) and scale into `grads`; return the gradient of x."""
    (shift, scale, pair), (gshift, gscale, _) = params, grads
    gx = torch.empty_like(x)
    if x.numel() == 0:
        return gx
    tensors = (x, gy, shift if shift_first != inverse else None, scale, mask, gx, gshift, gscale)
    space = _launch.collapse(event_dims, tensors, (gl,))
    _launch.over_space(
        backward_kernel, space, x, *_launch.views((gl,), space.row_at), *_launch.views(tensors, space.at),
        _launch.number(map_arg, _launch.compute_dtype(x)), blocks=space.spread, PAIR=pair,
        MAP=resolve(scale_map, map_arg), SHIFT_FIRST=shift_first, INVERSE=inverse,
    )  # fmt: skip
    return gx


def _unpack(params: Tensor, packing: int, dim: int, pairs: bool = True) -> Params:
    """Return views of packed parameters."""
    half = params.shape[dim] // 2
    name = PACKINGS[packing]
    if name == "interleaved":
        if pairs and _neighbours(params, dim):
            whole = torch.int64 if params.element_size() == 4 else torch.int32
            return None, params.movedim(dim, -1).view(whole).movedim(-1, dim), HALVES[params.dtype]
        where = (slice(None),) * dim
        even, odd = (*where, slice(0, None, 2)), (*where, slice(1, None, 2))
        return params[even], params[odd], None
    first, second = params.narrow(dim, 0, half), params.narrow(dim, half, half)
    return (first, second, None) if name == "shift_scale" else (second, first, None)


def _neighbours(params: Tensor, dim: int) -> bool:
    """Whether interleaved pairs can be read as aligned integers."""
    strides = (*params.stride()[:dim], *params.stride()[dim + 1 :], params.storage_offset())
    return (
        params.dtype in HALVES and params.stride(dim) == 1 and params.numel() > 0 and not any(s % 2 for s in strides)
        and params.data_ptr() % (2 * params.element_size()) == 0
    )  # fmt: skip
