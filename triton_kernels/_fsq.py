"""Kernels of finite scalar quantisation: codes and indices in one pass, backward, decode, and the residual stages.

A program handles a tile of positions with all their channels. Tile elements are numbered so that neighbours in memory
are neighbours in the tile: channels run fastest where they are contiguous, else positions. There is no fma, so that
codes and indices equal the C++ kernels bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .._schemas import FSQ_VARIANTS
from ._math import constant, div, div_normal, exp_unfused, floor, neg, round_even, tanh_unfused
from ._tiles import col_offset, column_pointers, compute_type, row_offset, static, store_as, width

SIGMOID = tl.constexpr(FSQ_VARIANTS.index("sigmoid"))
SYMMETRIC = tl.constexpr(FSQ_VARIANTS.index("symmetric"))
HARD = tl.constexpr(FSQ_VARIANTS.index("hard"))
SYMMETRIC_HARD = tl.constexpr(FSQ_VARIANTS.index("symmetric_hard"))
BOUNDED = tl.constexpr(FSQ_VARIANTS.index("bounded"))


class Divisors(NamedTuple):
    values: tuple[float, ...]
    reciprocals: tuple[float, ...]  # empty unless all are exact


class Channels(NamedTuple):
    """Per-channel constants, compiled into the kernels because a float launch argument may be rounded."""

    shift: tuple[float, ...]
    half: tuple[float, ...]
    offset: tuple[float, ...]
    width: Divisors
    top: Divisors
    step: tuple[float, ...]
    gain: tuple[float, ...]  # half / width


class Magic(NamedTuple):
    """Division by multiplication: floor(n / divisor) = (2 n * factor >> bits of n) >> shift, top bit of n clear."""

    factor: tuple[int, ...]
    shift: tuple[int, ...]


class Digits(NamedTuple):
    """Constants that combine digits into an index and split an index into digits."""

    last: int  # the largest index
    wide: bool  # indices need 64 bits
    basis: tuple[int, ...]
    levels: tuple[int, ...]
    by_basis: Magic
    by_levels: Magic


class Tile(NamedTuple):
    channels: int
    positions: int  # a multiple of 8, so that tiles start on whole vectors
    elements: int  # power of two, at least positions * channels
    padded: tuple[int, int]  # the next powers of two of channels and positions
    inner: bool  # channels run fastest, else positions
    dense: bool  # all tensors are contiguous in that order
    runs: bool  # positions run fastest, and `vec` of them are contiguous
    vec: int
    steps: int  # tiles per program
    wide: bool  # element numbers need 64 bits


@triton.constexpr_function
def entry(table, k):
    return table[k]


@triton.jit
def pick(values: tl.constexpr, c, dtype: tl.constexpr):
    """values[c]; a scalar if all values are equal."""
    out = tl.full([], values[0], dtype)
    for k in tl.static_range(1, len(values)):
        if values[k] != values[k - 1]:
            out = tl.where(c >= k, tl.full([], values[k], dtype), out)
    return out


@triton.jit
def divide(x, values: tl.constexpr, reciprocals: tl.constexpr, c, DIGIT: tl.constexpr = False):
    """x / values[c], IEEE; by multiplication where the reciprocals are exact. DIGIT: see `div_normal`."""
    if len(reciprocals) > 0:
        return x * pick(reciprocals, c, x.dtype)
    elif DIGIT:
        return div_normal(x, pick(values, c, x.dtype))
    else:
        return div(x, pick(values, c, x.dtype))


@triton.jit
def clamp(x, low, high):
    """Clamp x to [low, high]; NaN stays NaN."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def squash(x, VARIANT: tl.constexpr):
    if VARIANT == HARD or VARIANT == SYMMETRIC_HARD or VARIANT == BOUNDED:
        return clamp(x, constant(-1.0, x), constant(1.0, x))
    else:
        return tanh_unfused(x)


@triton.jit
def digit_of(z, c, CHANNELS: tl.constexpr, VARIANT: tl.constexpr):
    """Digit of z: 0 to top, or NaN."""
    dtype: tl.constexpr = z.dtype
    top = pick(static(CHANNELS.top.values), c, dtype)
    if VARIANT == SIGMOID:
        digit = round_even(top * div(constant(1.0, z), 1.0 + exp_unfused(neg(z))))
    elif VARIANT == SYMMETRIC or VARIANT == SYMMETRIC_HARD:
        digit = floor(top * (squash(z, VARIANT) + 1.0) * 0.5 + 0.5)
    else:
        u = squash(z + pick(static(CHANNELS.shift), c, dtype), VARIANT)
        bound = u * pick(static(CHANNELS.half), c, dtype) - pick(static(CHANNELS.offset), c, dtype)
        digit = round_even(bound) + pick(static(CHANNELS.width.values), c, dtype)
    return clamp(digit, constant(0.0, z), top)


@triton.jit
def code_of(digit, c, CHANNELS: tl.constexpr, VARIANT: tl.constexpr):
    if VARIANT == SIGMOID:
        return divide(digit, static(CHANNELS.top.values), static(CHANNELS.top.reciprocals), c, True)
    elif VARIANT == SYMMETRIC or VARIANT == SYMMETRIC_HARD:
        return digit * pick(static(CHANNELS.step), c, digit.dtype) - 1.0
    else:
        digit = digit - pick(static(CHANNELS.width.values), c, digit.dtype)
        return divide(digit, static(CHANNELS.width.values), static(CHANNELS.width.reciprocals), c, True)


@triton.jit
def slope_of(z, c, CHANNELS: tl.constexpr, VARIANT: tl.constexpr):
    """Derivative of the code before rounding with respect to z."""
    shifted: tl.constexpr = VARIANT != SIGMOID and VARIANT != SYMMETRIC and VARIANT != SYMMETRIC_HARD
    if shifted:
        u = z + pick(static(CHANNELS.shift), c, z.dtype)
        gain = pick(static(CHANNELS.gain), c, z.dtype)
    else:
        u = z
        gain = constant(1.0, z)
    if VARIANT == HARD or VARIANT == SYMMETRIC_HARD or VARIANT == BOUNDED:
        return tl.where((u >= -1.0) & (u <= 1.0), gain, constant(0.0, z))
    else:
        k: tl.constexpr = 1.0 if VARIANT == SIGMOID else 2.0
        e = exp_unfused(tl.abs(u) * -k)
        slope = div_normal(e * (k * k), (1.0 + e) * (1.0 + e))
        return gain * slope if shifted else slope


@triton.jit
def gradient(grad, slope, VARIANT: tl.constexpr):
    """grad * slope; 0 for a clamped value, even if grad is infinite."""
    if VARIANT == HARD or VARIANT == SYMMETRIC_HARD or VARIANT == BOUNDED:
        return tl.where(slope == 0.0, 0.0, grad * slope)
    else:
        return grad * slope


@triton.jit
def channel_of(i, TILE: tl.constexpr):
    return i % TILE.channels if TILE.inner else i // TILE.positions


@triton.jit
def position_of(i, TILE: tl.constexpr):
    return i // TILE.channels if TILE.inner else i % TILE.positions


@triton.jit
def first_position(step, TILE: tl.constexpr):
    program = tl.program_id(0)
    if TILE.wide:
        program = program.to(tl.int64)
    return (program * TILE.steps + step) * TILE.positions


@triton.jit
def is_inside(i, first, cols, TILE: tl.constexpr):
    real = i < TILE.positions * TILE.channels
    if TILE.dense:
        return real & (first * TILE.channels + i < width(cols, first, TILE.vec) * TILE.channels)
    else:
        return real & (first + position_of(i, TILE) < width(cols, first, TILE.vec))


@triton.jit
def elements(view, sizes, i, first, TILE: tl.constexpr):
    """Pointers to a tile's elements."""
    tensor, at = view
    if TILE.dense:
        return tensor + first.to(tl.int64) * TILE.channels + i
    else:
        c = channel_of(i, TILE)
        p = first + position_of(i, TILE)
        vec: tl.constexpr = TILE.vec
        offset = row_offset(c, sizes[0], at[0]) * vec + col_offset(p, sizes[1], at[1], vec)
        if TILE.runs:
            # the compiler cannot derive this through two remainders
            offset = tl.max_contiguous(tl.multiple_of(offset, vec), vec)
        return tensor + offset


@triton.jit
def number(digit, c, DIGITS: tl.constexpr, TILE: tl.constexpr):
    """The indices of a tile's positions, -1 where a digit is NaN."""
    dtype: tl.constexpr = tl.int64 if DIGITS.wide else tl.int32
    known = digit == digit
    weight = tl.where(known, digit, 0.0).to(tl.int32).to(dtype) * pick(static(DIGITS.basis), c, dtype)
    weight = tl.where(known, weight, -1)
    channels: tl.constexpr = TILE.padded[0]
    positions: tl.constexpr = TILE.padded[1]
    full: tl.constexpr = TILE.channels * TILE.positions == TILE.elements
    axis: tl.constexpr = 1 if full and TILE.inner else 0
    if full:
        if TILE.inner:
            parts = tl.reshape(weight, (positions, channels))
        else:
            parts = tl.reshape(weight, (channels, positions))
    else:
        k = tl.arange(0, channels * positions)
        channel = k // positions
        position = k % positions
        if TILE.inner:
            i = position * TILE.channels + channel
        else:
            i = channel * TILE.positions + position
        part = tl.gather(weight, tl.minimum(i, TILE.elements - 1), 0)
        parts = tl.reshape(tl.where(channel < TILE.channels, part, 0), (channels, positions))
    return tl.where(tl.min(parts, axis) < 0, -1, tl.sum(parts, axis))


@triton.jit
def store_indices(indices, stage: tl.constexpr, sizes, values, first, cols, TILE: tl.constexpr):
    """Store a stage's indices; the stages of a position are contiguous."""
    q = tl.arange(0, TILE.padded[1])
    p = first + q
    inside = (q < TILE.positions) & (p < width(cols, first, TILE.vec))
    values = values.to(indices[0].dtype.element_ty)
    tl.store(column_pointers(indices, sizes, p, TILE.vec) + stage, values, mask=inside)


@triton.jit(do_not_specialize=["cols"])
def forward_kernel(
    z, codes, indices, sizes, cols,
    CHANNELS: tl.constexpr, DIGITS: tl.constexpr, VARIANT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = compute_type(z[0])
    i = tl.arange(0, TILE.elements)
    c = channel_of(i, TILE)
    for step in range(TILE.steps):
        first = first_position(step, TILE)
        inside = is_inside(i, first, cols, TILE)
        value = tl.load(elements(z, sizes, i, first, TILE), mask=inside).to(dtype)
        digit = digit_of(value, c, CHANNELS, VARIANT)
        store_as(elements(codes, sizes, i, first, TILE), code_of(digit, c, CHANNELS, VARIANT), inside)
        if indices is not None:
            index = number(digit, c, DIGITS, TILE)
            store_indices(indices, 0, sizes, index, first, cols, TILE)


@triton.jit(do_not_specialize=["cols"])
def backward_kernel(
    z, grad, gz, sizes, cols,
    CHANNELS: tl.constexpr, VARIANT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = compute_type(z[0])
    i = tl.arange(0, TILE.elements)
    c = channel_of(i, TILE)
    for step in range(TILE.steps):
        first = first_position(step, TILE)
        inside = is_inside(i, first, cols, TILE)
        value = tl.load(elements(z, sizes, i, first, TILE), mask=inside).to(dtype)
        g = tl.load(elements(grad, sizes, i, first, TILE), mask=inside).to(dtype)
        value = gradient(g, slope_of(value, c, CHANNELS, VARIANT), VARIANT)
        store_as(elements(gz, sizes, i, first, TILE), value, inside)


@triton.jit
def quotient(n, factor: tl.constexpr, shift: tl.constexpr, c):
    return tl.umulhi(n << 1, pick(factor, c, n.dtype)) >> pick(shift, c, n.dtype)


@triton.jit(do_not_specialize=["cols"])
def decode_kernel(
    codes, indices, sizes, cols,
    CHANNELS: tl.constexpr, DIGITS: tl.constexpr, VARIANT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = compute_type(codes[0])
    i = tl.arange(0, TILE.elements)
    c = channel_of(i, TILE)
    for step in range(TILE.steps):
        first = first_position(step, TILE)
        inside = is_inside(i, first, cols, TILE)
        p = first + position_of(i, TILE)
        index = tl.load(column_pointers(indices, sizes, p, TILE.vec), mask=inside)
        if DIGITS.wide:
            index = index.to(tl.int64)
        known = (index >= 0) & (index <= DIGITS.last)
        whole = tl.where(known, index, 0).to(tl.uint64 if DIGITS.wide else tl.uint32)
        rest = quotient(whole, static(DIGITS.by_basis.factor), static(DIGITS.by_basis.shift), c)
        turns = quotient(rest, static(DIGITS.by_levels.factor), static(DIGITS.by_levels.shift), c)
        digit = rest - turns * pick(static(DIGITS.levels), c, rest.dtype)
        code = code_of(digit.to(tl.int32).to(dtype), c, CHANNELS, VARIANT)
        code = tl.where(known, code, float("nan"))
        store_as(elements(codes, sizes, i, first, TILE), code, inside)


@triton.jit(do_not_specialize=["cols"])
def residual_kernel(
    x, out, indices, active, sizes, cols,
    CHANNELS: tl.constexpr, SCALES: tl.constexpr, DIGITS: tl.constexpr, VARIANT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`indices` is the view of stage 0."""
    dtype: tl.constexpr = compute_type(x[0])
    i = tl.arange(0, TILE.elements)
    c = channel_of(i, TILE)
    first = first_position(0, TILE)
    inside = is_inside(i, first, cols, TILE)
    rest = tl.load(elements(x, sizes, i, first, TILE), mask=inside).to(dtype)
    total = tl.full((TILE.elements,), 0.0, dtype)
    count = len(SCALES)
    if active is not None:
        count = tl.load(active)
    for stage in tl.static_range(len(SCALES)):
        index = tl.full((TILE.padded[1],), -1, tl.int64 if DIGITS.wide else tl.int32)
        if stage < count:
            scale: tl.constexpr = entry(SCALES, stage)
            digit = digit_of(divide(rest, static(scale.values), static(scale.reciprocals), c), c, CHANNELS, VARIANT)
            part = code_of(digit, c, CHANNELS, VARIANT) * pick(static(scale.values), c, dtype)
            rest -= part
            total += part
            index = number(digit, c, DIGITS, TILE)
        store_indices(indices, stage, sizes, index, first, cols, TILE)
    store_as(elements(out, sizes, i, first, TILE), total, inside)


@triton.jit(do_not_specialize=["cols"])
def residual_backward_kernel(
    x, grad, gx, active, sizes, cols,
    CHANNELS: tl.constexpr, SCALES: tl.constexpr, VARIANT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = compute_type(x[0])
    i = tl.arange(0, TILE.elements)
    c = channel_of(i, TILE)
    first = first_position(0, TILE)
    inside = is_inside(i, first, cols, TILE)
    rest = tl.load(elements(x, sizes, i, first, TILE), mask=inside).to(dtype)
    g = tl.load(elements(grad, sizes, i, first, TILE), mask=inside).to(dtype)
    total = tl.full((TILE.elements,), 0.0, dtype)
    count = len(SCALES)
    if active is not None:
        count = tl.load(active)
    for stage in tl.static_range(len(SCALES)):
        if stage < count:
            scale: tl.constexpr = entry(SCALES, stage)
            scaled = divide(rest, static(scale.values), static(scale.reciprocals), c)
            total += slope_of(scaled, c, CHANNELS, VARIANT)
            code = code_of(digit_of(scaled, c, CHANNELS, VARIANT), c, CHANNELS, VARIANT)
            rest -= code * pick(static(scale.values), c, dtype)
    store_as(elements(gx, sizes, i, first, TILE), gradient(g, total, VARIANT), inside)
