"""Kernels of spectral normalisation: power iteration with one pass over W per round, division by sigma, gradient.

All layers of one dtype share each launch: a program finds its layer in a table (see _table). What a program does
depends on the shape of its layer alone, so a layer has the same bits in any list.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..reference.spectral import FLOOR
from ._math import constant, div
from ._table import find
from ._tiles import fold, fold_rows, store_as

# a thread has all rows of its columns, so sums over rows need no exchange between threads
ROWS = 8  # rows of W per program
COLS = 512  # columns of W per loop iteration or tile
Z_ROWS = 64  # row blocks per loop iteration of the sum for W' y
Z_COLS = 32  # columns per program of the sum for W' y, and the unit of rows of partial sums
SUMS = tl.constexpr(512)  # partial sums per loop iteration
SMALLEST = tl.constexpr(FLOOR)
GROUP = tl.constexpr(4)  # neighbours in one vector load

# fields of the table: addresses, then numbers
W, U, V, OUT, NEW_U, NEW_V, SHAPE, _, ROW_BLOCK, COL_BLOCK, PARTIAL, TILE = map(tl.constexpr, range(12))
# of the backward: as above up to OUT
GRAD, GRAD_SIGMA, SIGMA, B_SHAPE, B_TILE = map(tl.constexpr, (4, 5, 6, 7, 9))


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
def sum_of(partial, count):
    """The sum of `count` partial sums, in an order that depends on their number alone."""
    acc = tl.zeros((SUMS,), partial.dtype.element_ty)
    for first in range(0, count, SUMS):
        i = first + tl.arange(0, SUMS)
        acc += tl.load(partial + i, mask=i < count, other=0.0)
    return total(acc)


@triton.jit
def field(table, pitch, layer, FIELD: tl.constexpr):
    return tl.load(table + pitch.to(tl.int64) * FIELD + layer)


@triton.jit
def blocks_of(count, size: tl.constexpr):
    return (count + (size - 1)) // size


@triton.jit
def aligned(addresses, cols):
    """Whether rows of matrices at these addresses (or-ed) can be loaded in vectors of GROUP."""
    return (addresses % 16 == 0) & (cols % GROUP == 0)


@triton.jit
def at(address, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The address as a pointer, of which the compiler knows the alignment."""
    if ALIGNED:
        # rounded, so that the hint is on a value of this branch alone
        return tl.multiple_of((address // 16 * 16).to(tl.pointer_type(dtype)), 16)
    else:
        return address.to(tl.pointer_type(dtype))


@triton.jit
def width(cols, ALIGNED: tl.constexpr):
    if ALIGNED:
        cols = cols // GROUP * GROUP
    return cols


@triton.jit
def product(
    w, v, weighted, y, squares, partial, rows, cols, block, padded,
    TYPES: tl.constexpr, VECTOR: tl.constexpr, ITERATES: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = y.dtype.element_ty
    cols, v = width(cols, ALIGNED), at(v, TYPES.v, ALIGNED)
    r = block.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    start = at(w, TYPES.w, ALIGNED) + (r * cols)[:, None]
    if VECTOR:
        sums = tl.full((BLOCK_R,), 1.0, dtype)
    else:
        acc = tl.zeros((BLOCK_R, BLOCK_C), dtype)
        for c0 in range(0, cols, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            inside = (r < rows)[:, None] & (c < cols)[None, :]
            along = tl.load(v + c, mask=c < cols, other=0.0).to(dtype)[None, :]
            acc = tl.fma(tl.load(start + c[None, :], mask=inside, other=0.0).to(dtype), along + tl.zeros_like(acc), acc)
        sums = fold(acc)
    # 0 times an infinite v is NaN outside
    sums = tl.where(r < rows, sums, 0.0)
    program = tl.program_id(0).to(tl.int64)
    tl.store(y + program * BLOCK_R + tl.arange(0, BLOCK_R), sums)
    if ITERATES:
        tl.store(squares + program, total(sums * sums))
        # from the last columns to the first: the last ones are still in the cache
        chunks = blocks_of(cols, BLOCK_C)
        for k in range(0, chunks):
            c = (chunks - 1 - k) * BLOCK_C + tl.arange(0, BLOCK_C)
            inside = (r < rows)[:, None] & (c < cols)[None, :]
            terms = tl.load(start + c[None, :], mask=inside, other=0.0).to(dtype) * sums[:, None]
            tl.store(partial + block * padded + c, fold_rows(terms), mask=c < cols)
    else:
        other = tl.load(at(weighted, TYPES.u, False) + r, mask=r < rows, other=0.0).to(dtype)
        tl.store(squares + program, total(sums * other))


@triton.jit(do_not_specialize=["pitch", "layers"])
def product_kernel(
    table, pitch, layers, state, y, squares, partial,
    TYPES: tl.constexpr, VECTOR: tl.constexpr, ITERATES: tl.constexpr, FIRST: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """y = W v for one block of rows, the block's part of W' y, and of |y|^2; of u'y instead if not ITERATES."""
    layer, block = find(table, pitch, layers, tl.program_id(0), ROW_BLOCK)
    w, u = field(table, pitch, layer, W), field(table, pitch, layer, U)
    rows, cols = field(table, pitch, layer, SHAPE), field(table, pitch, layer, SHAPE + 1)
    partial += field(table, pitch, layer, PARTIAL) * UNIT
    padded = blocks_of(cols, UNIT) * UNIT
    if FIRST:
        v = field(table, pitch, layer, V)
    else:
        v = (state + field(table, pitch, layer, COL_BLOCK) * UNIT).to(tl.int64)
    if aligned(w | v, cols):
        product(
            w, v, u, y, squares, partial, rows, cols, block, padded,
            TYPES, VECTOR, ITERATES, True, BLOCK_R, BLOCK_C,
        )  # fmt: skip
    else:
        product(
            w, v, u, y, squares, partial, rows, cols, block, padded,
            TYPES, VECTOR, ITERATES, False, BLOCK_R, BLOCK_C,
        )  # fmt: skip


@triton.jit(do_not_specialize=["pitch", "layers"])
def reduce_kernel(
    table, pitch, layers, partial, squares, z, z_squares, norms,
    VECTOR: tl.constexpr, BLOCK_R: tl.constexpr, UNIT: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """|y|, then z = W'y / |y| for UNIT columns (not divided where |y| vanishes) and their part of |z|^2."""
    layer, part = find(table, pitch, layers, tl.program_id(0), COL_BLOCK)
    rows, cols = field(table, pitch, layer, SHAPE), field(table, pitch, layer, SHAPE + 1)
    blocks, padded = blocks_of(rows, BLOCK_R), blocks_of(cols, UNIT) * UNIT
    start = partial + field(table, pitch, layer, PARTIAL) * UNIT
    c = part * UNIT + tl.arange(0, UNIT)
    acc = tl.zeros((MOST, UNIT), z.dtype.element_ty)
    for first in range(0, blocks, MOST):
        r = first + tl.arange(0, MOST)
        inside = (r < blocks)[:, None] & (c < cols)[None, :]
        acc += tl.load(start + (r * padded)[:, None] + c[None, :], mask=inside, other=0.0)
    sums = fold_rows(acc)
    if VECTOR:
        left = tl.full([], 1.0, z.dtype.element_ty)
    else:
        left = root(sum_of(squares + field(table, pitch, layer, ROW_BLOCK), blocks))
        # do not divide by a vanishing norm
        sums = div(sums, tl.where(vanishes(left), 1.0, left) + tl.zeros_like(sums))
    tl.store(z + tl.program_id(0).to(tl.int64) * UNIT + tl.arange(0, UNIT), sums)
    tl.store(z_squares + tl.program_id(0), total(sums * sums))
    if part == 0:
        tl.store(norms + layer, left)


@triton.jit
def advance(old, new, to, first, count, norm, stalls, FLAT: tl.constexpr):
    """Write new / norm, or old if the iteration stalls."""
    i = first + tl.arange(0, FLAT)
    before = tl.load(old + i, mask=i < count, other=0.0).to(norm.dtype)
    after = div(tl.load(new + i, mask=i < count, other=0.0), norm + tl.zeros_like(before))
    store_as(to + i, tl.where(stalls, before, after), i < count)


@triton.jit
def along(u, y, rows, FLAT: tl.constexpr):
    """u'y, of all rows."""
    dtype: tl.constexpr = y.dtype.element_ty
    acc = tl.zeros((FLAT,), dtype)
    for first in range(0, rows, FLAT):
        r = first + tl.arange(0, FLAT)
        left = tl.load(u + r, mask=r < rows, other=0.0).to(dtype)
        acc = tl.fma(left, tl.load(y + r, mask=r < rows, other=0.0), acc)
    return total(acc)


@triton.jit
def scale(
    w, out, sigma, rows, cols, part,
    W_TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    cols = width(cols, ALIGNED)
    offset, inside = tile(rows, cols, part, BLOCK_R, BLOCK_C)
    value = tl.load(at(w, W_TYPE, ALIGNED) + offset, mask=inside, other=0.0).to(sigma.dtype)
    store_as(at(out, W_TYPE, ALIGNED) + offset, div(value, sigma + tl.zeros_like(value)), inside)


@triton.jit
def corner(cols, part, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """First row and column of a tile."""
    across = tl.maximum(blocks_of(cols, BLOCK_C), 1)
    return part // across * BLOCK_R, part % across * BLOCK_C


@triton.jit
def tile(rows, cols, part, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets of a tile of W and which are inside."""
    row, col = corner(cols, part, BLOCK_R, BLOCK_C)
    r, c = row + tl.arange(0, BLOCK_R), col + tl.arange(0, BLOCK_C)
    return (r * cols)[:, None] + c[None, :], (r < rows)[:, None] & (c < cols)[None, :]


@triton.jit(do_not_specialize=["pitch", "layers"])
def scale_kernel(
    table, pitch, layers, u_state, v_state, y, squares, z, z_squares, norms, sigmas,
    TYPES: tl.constexpr, VECTOR: tl.constexpr, ITERATES: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """New u and v, which after the last round are results; then sigma and W / sigma. If a norm vanishes, u and v stay
    as they are and sigma is u' W v."""
    # backwards: what the kernel before read last is still in the cache
    layer, part = find(table, pitch, layers, tl.num_programs(0) - 1 - tl.program_id(0), TILE)
    rows, cols = field(table, pitch, layer, SHAPE), field(table, pitch, layer, SHAPE + 1)
    row_block, col_block = field(table, pitch, layer, ROW_BLOCK), field(table, pitch, layer, COL_BLOCK)
    begins = part * BLOCK_C < tl.maximum(rows, cols)
    if LAST:
        active = part >= 0
    else:
        active = begins
    if active:
        if ITERATES:
            left = tl.load(norms + layer)
            right = root(sum_of(z_squares + col_block, blocks_of(cols, UNIT)))
            stalls = vanishes(left) | vanishes(right)
            value = right
            by_left, by_right = tl.where(vanishes(left), 1.0, left), tl.where(vanishes(right), 1.0, right)
        else:
            value = sum_of(squares + row_block, blocks_of(rows, BLOCK_R))
            stalls = part >= 0
            by_left, by_right = constant(1.0, value), constant(1.0, value)
        if not VECTOR:
            new_u, new_v = y + row_block * BLOCK_R, z + col_block * UNIT
            held_u, held_v = u_state + row_block * BLOCK_R, v_state + col_block * UNIT
            if FIRST:
                u = field(table, pitch, layer, U).to(tl.pointer_type(TYPES.u))
                v = field(table, pitch, layer, V).to(tl.pointer_type(TYPES.v))
            else:
                u, v = held_u, held_v
            if LAST:
                held_u = field(table, pitch, layer, NEW_U).to(tl.pointer_type(TYPES.u))
                held_v = field(table, pitch, layer, NEW_V).to(tl.pointer_type(TYPES.v))
                if ITERATES:
                    if stalls:
                        value = along(u, new_u, rows, BLOCK_C)
            if begins:
                advance(u, new_u, held_u, part * BLOCK_C, rows, by_left, stalls, BLOCK_C)
                advance(v, new_v, held_v, part * BLOCK_C, cols, by_right, stalls, BLOCK_C)
        if LAST:
            sigma = tl.where(vanishes(value), constant(SMALLEST, value), value)
            if part == 0:
                tl.store(sigmas + layer, sigma)
            w, out = field(table, pitch, layer, W), field(table, pitch, layer, OUT)
            if aligned(w | out, cols):
                scale(w, out, sigma, rows, cols, part, TYPES.w, True, BLOCK_R, BLOCK_C)
            else:
                scale(w, out, sigma, rows, cols, part, TYPES.w, False, BLOCK_R, BLOCK_C)


@triton.jit
def dot(g, w, partial, program, rows, cols, part, TYPES: tl.constexpr,
        ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    offset, inside = tile(rows, width(cols, ALIGNED), part, BLOCK_R, BLOCK_C)
    a = tl.load(at(g, TYPES.g, ALIGNED) + offset, mask=inside, other=0.0).to(partial.dtype.element_ty)
    b = tl.load(at(w, TYPES.w, ALIGNED) + offset, mask=inside, other=0.0, eviction_policy="evict_first")
    tl.store(partial + program, total(fold_rows(a * b.to(a.dtype))))


@triton.jit(do_not_specialize=["pitch", "layers"])
def dot_kernel(
    table, pitch, layers, partial,
    TYPES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile's part of sum(grad * W)."""
    program = tl.program_id(0)
    layer, part = find(table, pitch, layers, program, B_TILE)
    rows, cols = field(table, pitch, layer, B_SHAPE), field(table, pitch, layer, B_SHAPE + 1)
    w, g = field(table, pitch, layer, W), field(table, pitch, layer, GRAD)
    if aligned(w | g, cols):
        dot(g, w, partial, program, rows, cols, part, TYPES, True, BLOCK_R, BLOCK_C)
    else:
        dot(g, w, partial, program, rows, cols, part, TYPES, False, BLOCK_R, BLOCK_C)


@triton.jit
def gradient(
    g, w, u, v, out, sigma, slope, rows, cols, part,
    TYPES: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    cols = width(cols, ALIGNED)
    offset, inside = tile(rows, cols, part, BLOCK_R, BLOCK_C)
    a = tl.load(at(g, TYPES.g, ALIGNED) + offset, mask=inside, other=0.0).to(sigma.dtype)
    a = div(a, sigma + tl.zeros_like(a))
    if VECTOR:
        b = tl.load(at(w, TYPES.w, ALIGNED) + offset, mask=inside, other=0.0).to(sigma.dtype)
        outer = div(b, sigma + tl.zeros_like(b))
    else:
        row, col = corner(cols, part, BLOCK_R, BLOCK_C)
        r, c = row + tl.arange(0, BLOCK_R), col + tl.arange(0, BLOCK_C)
        left = tl.load(at(u, TYPES.u, False) + r, mask=r < rows, other=0.0).to(sigma.dtype)
        right = tl.load(at(v, TYPES.v, ALIGNED) + c, mask=c < cols, other=0.0).to(sigma.dtype)
        outer = left[:, None] * right[None, :]
    store_as(at(out, TYPES.w, ALIGNED) + offset, tl.fma(slope + tl.zeros_like(a), outer, a), inside)


@triton.jit(do_not_specialize=["pitch", "layers"])
def gradient_kernel(
    table, pitch, layers, partial,
    TYPES: tl.constexpr, VECTOR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad / sigma + slope u v'; for a vector, u v' is W / sigma. slope: grad_sigma - sum(grad * W) / sigma^2."""
    dtype: tl.constexpr = partial.dtype.element_ty
    layer, part = find(table, pitch, layers, tl.num_programs(0) - 1 - tl.program_id(0), B_TILE)
    rows, cols = field(table, pitch, layer, B_SHAPE), field(table, pitch, layer, B_SHAPE + 1)
    w, out, g = field(table, pitch, layer, W), field(table, pitch, layer, OUT), field(table, pitch, layer, GRAD)
    u, v = field(table, pitch, layer, U), field(table, pitch, layer, V)
    s = tl.load(field(table, pitch, layer, SIGMA).to(tl.pointer_type(dtype)))
    slope = tl.load(field(table, pitch, layer, GRAD_SIGMA).to(tl.pointer_type(TYPES.grad_sigma))).to(dtype)
    tiles = blocks_of(rows, BLOCK_R) * tl.maximum(blocks_of(cols, BLOCK_C), 1)
    slope -= div(div(sum_of(partial + field(table, pitch, layer, B_TILE), tiles), s), s)
    slope = tl.where(vanishes(s), 0.0, slope)
    if aligned(w | v | g | out, cols):
        gradient(
            g, w, u, v, out, s, slope, rows, cols, part,
            TYPES, VECTOR, True, BLOCK_R, BLOCK_C,
        )  # fmt: skip
    else:
        gradient(
            g, w, u, v, out, s, slope, rows, cols, part,
            TYPES, VECTOR, False, BLOCK_R, BLOCK_C,
        )  # fmt: skip
