"""Noise on the device: csrc/math/philox.h and normal.h operation for operation, without fma."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import row_view
from ._math import LN2_HI, LN2_LO, SQRT_HALF_BITS, bits, from_bits, neg, sqrt_normal
from ._plans import Words, words
from ._tiles import load_rows, width, word

UNIFORM = tl.constexpr(0)
NORMAL = tl.constexpr(1)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Four words (uint32) from a counter and a key."""
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * tl.full([], 0xD2511F53, tl.uint64)
        p1 = c2.to(tl.uint64) * tl.full([], 0xCD9E8D57, tl.uint64)
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = k0 + tl.full([], 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full([], 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def uniform(word):
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-8


@triton.jit
def log_plain(x, SCALE: tl.constexpr = 0, TIMES: tl.constexpr = 1):
    """TIMES log(x / 2**SCALE) of positive normal float32, without fma; TIMES is a power of two."""
    # the scale is taken from the exponent and TIMES from the constants, which saves products and changes no bits
    i = bits(x) - (SQRT_HALF_BITS + (SCALE << 23))
    k = (i >> 23).to(tl.float32)
    f = from_bits((i & 0x007FFFFF) + SQRT_HALF_BITS) - 1.0
    p = f * (-0.07857371121644974 * TIMES) + 0.1288098394870758 * TIMES
    p = p * f + -0.13129225373268127 * TIMES
    p = p * f + 0.14181305468082428 * TIMES
    p = p * f + -0.1662452220916748 * TIMES
    p = p * f + 0.20002280175685883 * TIMES
    p = p * f + -0.25000810623168945 * TIMES
    p = p * f + 0.33333316445350647 * TIMES
    f2 = f * f
    tail = f2 * f * p + (-0.5 * TIMES) * f2
    return k * (LN2_HI * TIMES) + (f * TIMES + (k * (LN2_LO * TIMES) + tail))


@triton.jit
def flip(x, sign):
    """-x where the top bit of `sign` (int32) is set."""
    return from_bits(bits(x) ^ sign)


@triton.jit
def sincos_turns(word):
    """Sine and cosine of 2 pi (word >> 8) / 2**24 (word: uint32)."""
    # the top two bits of quarter number the quarter turn; the other bits, signed, are the angle from its middle
    quarter = (word + tl.full([], 0x20000000, tl.uint32)).to(tl.int32, bitcast=True)
    rest = ((word & 0xFFFFFF00) << 2).to(tl.int32, bitcast=True)
    r = rest.to(tl.float32) * 5.82076609134674072265625e-11
    s = r * r
    p = s * -75.87133026123047 + 81.6053695678711
    p = s * p + -41.34176254272461
    p = s * p + 6.2831854820251465
    sine = r * p
    q = s * 58.07190704345703 + -85.41180419921875
    q = s * q + 64.93907928466797
    q = s * q + -19.739208221435547
    cosine = s * q + 1.0
    swapped = (quarter & 0x40000000) != 0
    a = tl.where(swapped, cosine, sine)
    b = tl.where(swapped, sine, cosine)
    return flip(a, quarter & -0x80000000), flip(b, (quarter + 0x40000000) & -0x80000000)


@triton.jit
def box_muller(even, odd):
    # -0.0 for the largest words, else at least 2**-23
    r = sqrt_normal(neg(log_plain(even.to(tl.float32) + 1.0, 32, 2)))
    sine, cosine = sincos_turns(odd)
    return r * cosine, r * sine


@triton.jit
def halves(value):
    """(low, high) words of an int64."""
    return (value & 0xFFFFFFFF).to(tl.uint32), ((value >> 32) & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def number_at(view, r, rows):
    """(low, high) words of an integer: by value, or in memory for rows r."""
    if view[0].dtype.is_ptr():
        return halves(load_rows(view, r, rows))
    else:
        return word(view[0]), word(view[1])


@triton.jit
def words_at(block, stream, r, rows):
    """Philox words of the blocks (int64) of four elements."""
    low, high = number_at(stream.seed, r, rows)
    s0, s1 = number_at(stream.step, r, rows)
    s1 = (s1 & 0xFFFFFF) | (word(stream.purpose[0]) << 24)
    b0, b1 = halves(block)
    return philox(b0, b1, s0, s1, low, high)


@triton.constexpr_function
def per_row(seed):
    """Whether each row has a stream of its own: whether a row view has a stride."""
    return seed[0].dtype.is_ptr() and len(seed) == 2


@triton.jit
def draw(stream, tile, rows, cols, KIND: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr):
    """Noise of a tile.

    ALIGNED: in every row the tile starts at a Philox block, so that each block is drawn once for its four elements.
    """
    r, c0 = tile.r, tile.first
    cols = width(cols, c0, TILE.vec)
    PER_ROW: tl.constexpr = per_row(stream.seed)
    if ALIGNED:
        block = ((c0 >> 2) + tl.arange(0, TILE.cols // 4)).to(tl.int64)[None, :]
        block = r.to(tl.int64) * 0 + block if PER_ROW else r.to(tl.int64) * (cols >> 2) + block
        w0, w1, w2, w3 = words_at(block, stream, r, rows)
        if KIND == NORMAL:
            z0, z1 = box_muller(w0, w1)
            z2, z3 = box_muller(w2, w3)
        else:
            z0, z1, z2, z3 = uniform(w0), uniform(w1), uniform(w2), uniform(w3)
        return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
    else:
        k = (c0 + tl.arange(0, TILE.cols)).to(tl.int64)[None, :]
        k = r.to(tl.int64) * 0 + k if PER_ROW else r.to(tl.int64) * cols + k
        w0, w1, w2, w3 = words_at(k >> 2, stream, r, rows)
        odd = (k & 1) != 0
        even, after = tl.where((k & 2) == 0, w0, w2), tl.where((k & 2) == 0, w1, w3)
        if KIND == NORMAL:
            first, second = box_muller(even, after)
            return tl.where(odd, second, first)
        else:
            return uniform(tl.where(odd, after, even))


class Stream(NamedTuple):
    """Noise stream of a call: one over all elements in C order, or one per row."""

    seed: Any  # row view
    step: Any  # row view, one value for all rows
    purpose: Words


def stream(seed: Tensor, step: Tensor, purpose: int) -> Stream:
    return Stream(row_view(seed, torch.int64), row_view(step, torch.int64), words(purpose))


def aligned(seed: Tensor, rows: int, cols: int, block_cols: int) -> bool:
    """Whether every row of every tile starts at a Philox block."""
    return block_cols % 4 == 0 and (seed.dim() > 0 or rows == 1 or cols % 4 == 0)
