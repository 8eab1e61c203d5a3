"""Finite scalar quantisation: which channels, constants and tiles the kernels in _fsq are launched with."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._schemas import FSQ_VARIANTS
from ..reference import fsq as ref
from . import _launch
from ._fsq import (
    Channels,
    Digits,
    Divisors,
    Magic,
    Tile,
    backward_kernel,
    decode_kernel,
    forward_kernel,
    residual_backward_kernel,
    residual_kernel,
)

MOST_CHANNELS = 64  # per launch
MANY_TILES = 4096  # from this count on, a program handles several tiles and computes its constants once


def fsq(z: Tensor, levels: Sequence[int], variant: int, return_indices: bool) -> tuple[Tensor, Tensor]:
    codes = torch.empty_like(z)
    if return_indices:
        indices = z.new_empty(z.shape[1:], dtype=ref.index_dtype(levels))
        _over(
            forward_kernel, levels, variant, (z, codes, indices.expand(z.shape)), DIGITS=_digits(tuple(levels))
        )  # fmt: skip
        return codes, indices
    for part, views in _parts(levels, z, codes):
        _over(forward_kernel, part, variant, (*views, None), DIGITS=None)
    return codes, z.new_empty(0, dtype=torch.int32)


def fsq_backward(grad: Tensor, z: Tensor, levels: Sequence[int], variant: int) -> Tensor:
    gz = torch.empty_like(z)
    for part, views in _parts(levels, z, grad, gz):
        _over(backward_kernel, part, variant, views)
    return gz


def fsq_decode(indices: Tensor, levels: Sequence[int], variant: int, dim: int, dtype: torch.dtype) -> Tensor:
    shape = list(indices.shape)
    shape.insert(dim, len(levels))
    codes = indices.new_empty(shape, dtype=dtype)
    front = codes.movedim(dim, 0)
    _over(decode_kernel, levels, variant, (front, indices.expand(front.shape)), DIGITS=_digits(tuple(levels)))
    return codes


def residual_fsq(
    x: Tensor, levels: Sequence[int], variant: int, stages: int, active: Tensor | None
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x)
    dtype = ref.index_dtype(levels) if active is None else torch.int64
    indices = x.new_empty((*x.shape[1:], stages), dtype=dtype)
    _over(
        residual_kernel, levels, variant, (x, out, indices[..., 0].expand(x.shape)), active, most_steps=1,
        SCALES=_scales(tuple(levels), stages), DIGITS=_digits(tuple(levels)),
    )  # fmt: skip
    return out, indices


def residual_fsq_backward(
    grad: Tensor, x: Tensor, levels: Sequence[int], variant: int, stages: int, active: Tensor | None
) -> Tensor:
    gx = torch.empty_like(x)
    _over(
        residual_backward_kernel, levels, variant, (x, grad, gx), active, most_steps=1,
        SCALES=_scales(tuple(levels), stages),
    )  # fmt: skip
    return gx


def _parts(levels: Sequence[int], *tensors: Tensor) -> Iterator[tuple[Sequence[int], tuple[Tensor, ...]]]:
    """Split a call without indices, where channels are independent.

    Channels of equal levels become positions of a single channel; others come in groups of MOST_CHANNELS.
    """
    if min(levels) == max(levels):
        yield levels[:1], tuple(t.unsqueeze(0) for t in tensors)
        return
    for start in range(0, len(levels), MOST_CHANNELS):
        part = levels[start : start + MOST_CHANNELS]
        yield part, tuple(t.narrow(0, start, len(part)) for t in tensors)


def _over(
    kernel: Any,
    levels: Sequence[int],
    variant: int,
    views: Sequence[Tensor | None],
    *more: object,
    most_steps: int = 4,
    **constants: object,
) -> None:
    """Launch a kernel over views of one shape, (channels, positions...); the first sets dtype and device."""
    lead: Any = views[0]
    if lead.numel() == 0:
        return
    f64 = lead.dtype == torch.float64
    space = _launch.collapse(lead.dim() - 1, views)
    floats = tuple([t is not None and t.is_floating_point() for t in views])
    tile = _tile(space, floats, lead.element_size(), most_steps)
    _launch.launch(
        kernel, -(-space.cols // (tile.positions * tile.steps)), lead.device, *_launch.views(views, space.at),
        *more, num_warps=_warps(tile, lead.dtype), sizes=space.sizes, cols=space.cols // tile.vec,
        CHANNELS=_channels(tuple(levels), variant, f64), VARIANT=variant, TILE=tile, **constants,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _tile(space: _launch.Space, floats: tuple[bool, ...], bytes_each: int, most_steps: int) -> Tile:
    at: Any = [a for a, is_float in zip(space.at, floats, strict=True) if is_float]
    d, elements, vec = space.rows, _launch.TILE, space.vec
    (row_strides, col_strides) = at[0]
    inner = d > 1 and row_strides[0] * vec < col_strides[-1]
    if inner and d & (d - 1) and bytes_each == 4:
        elements //= 2  # on an H200, five channels last took 0.86 times the time of whole tiles with eight warps
    positions = elements // d // 8 * 8
    dense = inner and vec == 1 and all(strides == ((1,), (d,)) for strides in at)
    runs = not inner and vec > 1 and all(col_strides[-1] == 1 for _, col_strides in at)
    if dense:
        vec = math.gcd(8, space.cols)
    tiles = -(-space.cols // positions)
    return Tile(
        d, positions, elements, (_launch.power_of_two(d), _launch.power_of_two(positions)), inner, dense,
        runs, vec, steps=most_steps if tiles >= MANY_TILES else 1, wide=d * space.cols > 2**31 - 2 * _launch.SEGMENT,
    )  # fmt: skip


def _warps(tile: Tile, dtype: torch.dtype) -> int:
    if dtype == torch.float64:
        return 8  # half the elements per thread, to lower register pressure
    # on an H200, four channels first took 0.68 times the time of four warps
    return 2 if tile.runs and tile.channels > 1 else 4


@functools.lru_cache(maxsize=256)
def _channels(levels: tuple[int, ...], variant: int, f64: bool) -> Channels:
    c = ref.constants(levels, FSQ_VARIANTS[variant])
    real = float if f64 else np.float32
    gain = tuple(float(real(h) / real(w)) for h, w in zip(c.half, c.width, strict=True))
    return Channels(
        tuple(c.shift), tuple(c.half), tuple(c.offset), _divisors(c.width), _divisors(c.top), tuple(c.step), gain
    )


@functools.lru_cache(maxsize=256)
def _scales(levels: tuple[int, ...], stages: int) -> tuple[Divisors, ...]:
    return tuple(_divisors(scale) for scale in ref.scales(levels, stages))


def _divisors(values: Sequence[float]) -> Divisors:
    values = tuple(float(v) for v in values)
    exact = all(v >= 2.0**-126 and math.frexp(v)[0] == 0.5 for v in values)
    return Divisors(values, tuple(1.0 / v for v in values) if exact else ())


@functools.lru_cache(maxsize=256)
def _digits(levels: tuple[int, ...]) -> Digits:
    size = math.prod(levels)
    wide = size > 2**31
    basis = tuple(ref.basis(levels))
    return Digits(size - 1, wide, basis, levels, _magic(basis, wide), _magic(levels, wide))


def _magic(divisors: Sequence[int], wide: bool) -> Magic:
    shifts = tuple((n - 1).bit_length() for n in divisors)
    bits = 63 if wide else 31
    return Magic(tuple(-(-(1 << bits + s) // n) for n, s in zip(divisors, shifts, strict=True)), shifts)
