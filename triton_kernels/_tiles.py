"""Device functions of the kernels: strided tiles of rows x columns, and sums in a fixed order.

Each tensor comes with `at = (row strides, column strides)` over the merged dims of `_launch.collapse`. Row strides,
outer column strides and the innermost column size are in units of VEC elements, which tells the compiler that VEC
neighbours are contiguous and aligned. Sizes of leading dims are not needed and not passed.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAX_LEVELS = tl.constexpr(10)  # log2 of the longest tile, _launch.TILE


@triton.constexpr_function
def static(value):
    """Make a field of a constexpr NamedTuple a constexpr; Triton 3.6 leaves it a plain value."""
    return value


@triton.jit
def place(segments, INDEX: tl.constexpr, BLOCK_R: tl.constexpr):
    """The program's rows (BLOCK_R,) and the number of its segment."""
    program = tl.program_id(0)
    return (program // segments).to(INDEX) * BLOCK_R + tl.arange(0, BLOCK_R), (program % segments).to(INDEX)


@triton.jit
def width(cols, c, VEC: tl.constexpr):
    """Elements of a row, in the type of c: `cols` may fit int32 where cols * VEC does not."""
    return tl.full([], VEC, c.dtype) * cols


@triton.jit
def row_offset(r, sizes, strides):
    at = tl.zeros(r.shape, tl.int64)
    for i in tl.static_range(len(strides) - 1, 0, -1):
        at += (r % sizes[i - 1]).to(tl.int64) * strides[i]
        r = r // sizes[i - 1]
    return at + r.to(tl.int64) * strides[0]


@triton.jit
def col_offset(c, sizes, strides, VEC: tl.constexpr):
    if len(strides) == 1:
        return c.to(tl.int64) * strides[0]
    else:
        last: tl.constexpr = len(strides) - 1
        inner = width(sizes[last - 1], c, VEC)
        at = (c % inner).to(tl.int64) * strides[last]
        c = c // inner
        for i in tl.static_range(last - 1, 0, -1):
            at += (c % sizes[i - 1]).to(tl.int64) * strides[i] * VEC
            c = c // sizes[i - 1]
        return at + c.to(tl.int64) * strides[0] * VEC


@triton.jit
def pointers(tensor, at, sizes, r, c, VEC: tl.constexpr):
    """(R, C) pointers for rows r (R, 1) and columns c (1, C)."""
    return tensor + (row_offset(r, sizes[0], at[0]) * VEC + col_offset(c, sizes[1], at[1], VEC))


@triton.jit
def load(tensor, at, sizes, r, c, inside, VEC: tl.constexpr, dtype: tl.constexpr):
    return tl.load(pointers(tensor, at, sizes, r, c, VEC), mask=inside).to(dtype)


@triton.jit
def load_pair(tensor, at, sizes, r, c, inside, VEC: tl.constexpr, HALF: tl.constexpr, dtype: tl.constexpr):
    """Two neighbours of type HALF stored as one integer: whole vectors instead of two loads of stride 2."""
    both = tl.load(pointers(tensor, at, sizes, r, c, VEC), mask=inside)
    size: tl.constexpr = HALF.primitive_bitwidth
    half: tl.constexpr = tl.int32 if size == 32 else tl.int16
    first, second = both.to(half), (both >> size).to(half)
    return first.to(HALF, bitcast=True).to(dtype), second.to(HALF, bitcast=True).to(dtype)


@triton.jit
def store_pair(tensor, at, sizes, r, c, inside, VEC: tl.constexpr, HALF: tl.constexpr, first, second):
    size: tl.constexpr = HALF.primitive_bitwidth
    half: tl.constexpr = tl.uint32 if size == 32 else tl.uint16
    whole: tl.constexpr = tl.uint64 if size == 32 else tl.uint32
    if first.dtype == tl.float64:
        # see store_as
        first, second = first.to(tl.float32), second.to(tl.float32)
    low = first.to(HALF).to(half, bitcast=True).to(whole)
    high = second.to(HALF).to(half, bitcast=True).to(whole)
    both = (high << size) | low
    tl.store(pointers(tensor, at, sizes, r, c, VEC), both.to(tensor.dtype.element_ty, bitcast=True), mask=inside)


@triton.jit
def store_as(pointer, value, mask):
    """Store as the pointer's element type; float64 is cast to 16 bits through float32, as in C++."""
    element: tl.constexpr = pointer.dtype.element_ty
    if value.dtype == tl.float64:
        if element != tl.float64:
            value = value.to(tl.float32)
    tl.store(pointer, value.to(element), mask=mask)


@triton.jit
def store(tensor, at, sizes, r, c, inside, VEC: tl.constexpr, value):
    store_as(pointers(tensor, at, sizes, r, c, VEC), value, inside)


@triton.jit
def scalar(bits, dtype: tl.constexpr):
    """Float from its bit pattern (a float launch argument would be rounded to float32)."""
    if dtype == tl.float64:
        return bits.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def fold(v):
    """Sum (R, C) over columns to (R,) by pairs of neighbours: the bits depend on neither layout nor batch."""
    for _ in tl.static_range(MAX_LEVELS):
        if v.shape[1] > 1:
            v = tl.sum(tl.reshape(v, (v.shape[0], v.shape[1] // 2, 2)), axis=2)
    return tl.reshape(v, (v.shape[0],))


@triton.jit
def fold_rows(v):
    """Sum (R, C) over rows to (C,) by pairs of neighbours."""
    for _ in tl.static_range(MAX_LEVELS):
        if v.shape[0] > 1:
            v = tl.sum(tl.reshape(v, (v.shape[0] // 2, 2, v.shape[1])), axis=1)
    return tl.reshape(v, (v.shape[1],))


@triton.jit
def row_sums(partial, r, rows, segments, BLOCK_C: tl.constexpr):
    """Sum partial (rows, segments) over segments, for rows r (R,) int64."""
    acc = tl.zeros((r.shape[0], BLOCK_C), partial.dtype.element_ty)
    for first in range(0, segments, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        inside = (r < rows)[:, None] & (c < segments)[None, :]
        acc += tl.load(partial + (r * segments)[:, None] + c[None, :], mask=inside, other=0.0)
    return fold(acc)


@triton.jit(do_not_specialize=["rows", "segments"])
def sum_segments(partial, out, rows, segments, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum partial (rows, segments) to out (rows,)."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    tl.store(out + r, row_sums(partial, r, rows, segments, BLOCK_C), mask=r < rows)
