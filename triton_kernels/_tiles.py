"""Device functions of the kernels: strided tiles of rows x columns, and sums in a fixed order.

What a kernel is given, in the words of csrc/tiles/view.h:

view: (tensor, (row strides, column strides)) over the merged dims of `_launch.collapse`; None if the tensor is absent.
    Row strides, outer column strides and the innermost column size are in units of TILE.vec elements, which tells the
    compiler that these neighbours are contiguous and aligned.
row view: (tensor, stride), one value per row; or (tensor,), one value for all rows; or a number passed by value.
    There is no None in a tuple, which Triton 3.6 does not compare with None.
number: the two words of its bits, see `_plans.Words`.
sizes: (row sizes, column sizes) of the merged dims. Those of leading dims are not needed and not passed.
TILE: how a program goes over the rows and columns, see `TileShape`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

MAX_LEVELS = tl.constexpr(10)  # log2 of the longest tile, _launch.TILE


class TileShape(NamedTuple):
    """Compile-time part of `_launch.Blocks`: a program takes tiles of rows x cols from `segment` columns."""

    index: Any  # type of row and column numbers
    vec: int  # contiguous and aligned neighbours, in all tensors
    rows: int
    cols: int
    segment: int


class Tile(NamedTuple):
    """Row numbers (R, 1), the first column and column numbers (1, C) of a tile, and which elements are inside."""

    sizes: Any
    r: Any
    first: Any
    c: Any
    inside: Any


@triton.constexpr_function
def static(value):
    """Make a field of a constexpr NamedTuple a constexpr; Triton 3.6 leaves it a plain value."""
    return value


@triton.constexpr_function
def compute_type(tensor):
    """float64 for a pointer to float64, else float32."""
    return tl.float64 if tensor.dtype.element_ty == tl.float64 else tl.float32


@triton.jit
def place(segments, TILE: tl.constexpr):
    """The program's rows (R,) and the number of its segment."""
    program = tl.program_id(0)
    return (program // segments).to(TILE.index) * TILE.rows + tl.arange(0, TILE.rows), (program % segments).to(
        TILE.index
    )


@triton.jit
def tile_at(sizes, row, first, rows, cols, TILE: tl.constexpr):
    """The tile of rows `row` (R,) and of columns from `first` on."""
    r, c = row[:, None], (first + tl.arange(0, TILE.cols))[None, :]
    return Tile(sizes, r, first, c, (r < rows) & (c < width(cols, c, TILE.vec)))


@triton.jit
def only(tile, mask):
    """The tile without the elements outside of the mask."""
    return Tile(tile.sizes, tile.r, tile.first, tile.c, tile.inside & mask)


@triton.jit
def zeros(TILE: tl.constexpr, dtype: tl.constexpr):
    return tl.full((TILE.rows, TILE.cols), 0.0, dtype)


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
def row_pointers(view, sizes, r):
    """Pointers for rows r; a view of row dims alone has no column strides."""
    tensor, strides = view
    return tensor + row_offset(r, sizes[0], strides)


@triton.jit
def column_pointers(view, sizes, c, VEC: tl.constexpr):
    """Pointers for columns c of a view whose rows are all the same."""
    tensor, strides = view
    return tensor + col_offset(c, sizes[1], strides[1], VEC)


@triton.jit
def pointers(view, tile, VEC: tl.constexpr):
    tensor, strides = view
    offset = row_offset(tile.r, tile.sizes[0], strides[0]) * VEC + col_offset(tile.c, tile.sizes[1], strides[1], VEC)
    return tensor + offset


@triton.jit
def load(view, tile, TILE: tl.constexpr, dtype: tl.constexpr):
    return tl.load(pointers(view, tile, TILE.vec), mask=tile.inside).to(dtype)


@triton.jit
def load_pair(view, tile, TILE: tl.constexpr, HALF: tl.constexpr, dtype: tl.constexpr):
    """Two neighbours of type HALF stored as one integer: whole vectors instead of two loads of stride 2."""
    both = tl.load(pointers(view, tile, TILE.vec), mask=tile.inside)
    size: tl.constexpr = HALF.primitive_bitwidth
    half: tl.constexpr = tl.int32 if size == 32 else tl.int16
    first, second = both.to(half), (both >> size).to(half)
    return first.to(HALF, bitcast=True).to(dtype), second.to(HALF, bitcast=True).to(dtype)


@triton.jit
def store_pair(view, tile, TILE: tl.constexpr, HALF: tl.constexpr, first, second):
    size: tl.constexpr = HALF.primitive_bitwidth
    half: tl.constexpr = tl.uint32 if size == 32 else tl.uint16
    whole: tl.constexpr = tl.uint64 if size == 32 else tl.uint32
    if first.dtype == tl.float64:
        # see store_as
        first, second = first.to(tl.float32), second.to(tl.float32)
    low = first.to(HALF).to(half, bitcast=True).to(whole)
    high = second.to(HALF).to(half, bitcast=True).to(whole)
    both = ((high << size) | low).to(view[0].dtype.element_ty, bitcast=True)
    tl.store(pointers(view, tile, TILE.vec), both, mask=tile.inside)


@triton.jit
def store(view, tile, TILE: tl.constexpr, value):
    store_as(pointers(view, tile, TILE.vec), value, tile.inside)


@triton.jit
def store_as(pointer, value, mask):
    """Store as the pointer's element type; float64 is cast to 16 bits through float32, as in C++."""
    element: tl.constexpr = pointer.dtype.element_ty
    if value.dtype == tl.float64:
        if element != tl.float64:
            value = value.to(tl.float32)
    tl.store(pointer, value.to(element), mask=mask)


@triton.jit
def word(value):
    """One of `_plans.Words`, uint32."""
    # the interpreter holds numbers below 2**32 in 32 bits, which the sum widens
    return ((value + tl.zeros([], tl.int64)) >> 32).to(tl.uint32)


@triton.jit
def scalar(number, dtype: tl.constexpr):
    """A float passed by value (a float launch argument would be rounded to float32)."""
    low = word(number[0])
    if dtype == tl.float64:
        return (word(number[1]).to(tl.uint64) << 32 | low.to(tl.uint64)).to(tl.float64, bitcast=True)
    else:
        return low.to(tl.float32, bitcast=True)


@triton.jit
def row_value(view, r, rows, dtype: tl.constexpr):
    """The value of a row view for rows r."""
    if view[0].dtype.is_ptr():
        return load_rows(view, r, rows).to(dtype)
    else:
        return scalar(view, dtype)


@triton.jit
def load_rows(view, r, rows):
    """Values in memory for rows r."""
    if len(view) == 1:
        return tl.load(view[0])
    else:
        return tl.load(view[0] + r.to(tl.int64) * view[1], mask=r < rows, other=0)


@triton.jit
def unpack(v, count: tl.constexpr):
    """The first `count` of the (R, C) tiles v[:, :, i] of an (R, C, N) tile, as a tuple in registers.

    Neighbours along the last dim, which neighbouring threads load, come to one thread through shared memory, once.
    """
    parts = (v,)
    for _ in tl.static_range(MAX_LEVELS):
        if parts[0].shape[2] > 1:
            halves = ()
            for i in tl.static_range(len(parts)):
                whole = parts[i]
                halved = tl.reshape(whole, (whole.shape[0], whole.shape[1], 2, whole.shape[2] // 2))
                first, second = tl.split(tl.permute(halved, (0, 1, 3, 2)))
                halves = halves + (first, second)
            parts = halves
    out = ()
    for i in tl.static_range(count):
        out = out + (tl.reshape(parts[i], (v.shape[0], v.shape[1])),)
    return out


@triton.jit
def pack(tiles):
    """The inverse of `unpack`: an (R, C, N) tile, N the next power of two, filled up with zeros."""
    parts = ()
    for i in tl.static_range(len(tiles)):
        parts = parts + (tl.reshape(tiles[i], (tiles[i].shape[0], tiles[i].shape[1], 1)),)
    for _ in tl.static_range(MAX_LEVELS):
        if len(parts) > 1:
            pairs = ()
            for i in tl.static_range(0, len(parts), 2):
                first = parts[i]
                second = parts[i + 1] if i + 1 < len(parts) else first * 0
                both = tl.permute(tl.join(first, second), (0, 1, 3, 2))
                pairs = pairs + (tl.reshape(both, (first.shape[0], first.shape[1], 2 * first.shape[2])),)
            parts = pairs
    return parts[0]


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
