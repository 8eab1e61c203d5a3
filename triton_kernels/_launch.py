"""Host helpers of the launchers: one iteration space for all tensors, block shapes, the launch."""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import _plans, _tiles

TILE = 1024  # elements a program handles per loop iteration
SEGMENT = 4 * TILE  # most columns of a row in one program
SMALL_TILE = 128  # elements: one per thread
MANY_PROGRAMS = 32  # fewer leave multiprocessors idle, and tiles become smaller


@dataclasses.dataclass(frozen=True, eq=False)
class Space:
    """Iteration space (rows) x (columns): leading dims are the batch, trailing dims the event."""

    rows: int
    cols: int
    vec: int
    sizes: tuple[tuple[int, ...], tuple[int, ...]]  # without the leading dim, see _tiles
    at: tuple[tuple[tuple[int, ...], ...] | None, ...]  # per tensor (row strides, column strides); None: absent
    row_at: tuple[tuple[int, ...] | None, ...]  # row strides of tensors with row dims only, in elements

    @property
    def wide(self) -> bool:
        """Whether an index needs 64 bits."""
        return max(self.rows, self.cols) > 2**31 - 2 * SEGMENT

    @functools.cached_property
    def blocks(self) -> Blocks:
        return cut(self)

    @functools.cached_property
    def spread(self) -> Blocks:
        """`blocks` with fewer rows each while multiprocessors are idle: a thread of a small tensor has one element.

        For kernels whose sums stay in a row, so that no bits depend on it.
        """
        blocks = self.blocks
        while blocks.rows > 1 and blocks.rows * blocks.cols > SMALL_TILE and blocks.programs < MANY_PROGRAMS:
            rows = blocks.rows // 2
            blocks = blocks._replace(rows=rows, programs=-(-self.rows // rows) * blocks.segments)
        return blocks

    @functools.cached_property
    def constants(self) -> dict[Blocks, dict[str, object]]:
        """Arguments of a kernel that follow from the space, for each way to split it; filled by `over_space`."""
        return {}


class Blocks(NamedTuple):
    """How the space is split; columns by the event size alone, so that no sum depends on the batch."""

    rows: int
    cols: int
    segment: int
    segments: int
    programs: int

    def by_rows(self, space: Space, block_rows: int) -> Blocks:
        """One program per `block_rows` rows and one tile width of columns."""
        segments = -(-space.cols // self.cols)
        return Blocks(self.rows, self.cols, self.cols, segments, -(-space.rows // block_rows) * segments)


def collapse(
    event_dims: int, tensors: Sequence[Tensor | None], row_tensors: Sequence[Tensor | None] = (), c_order: bool = False
) -> Space:
    """Merge neighbouring dims that are contiguous with each other in every tensor.

    Event dims are visited in the memory order of the first tensor, or in C order with `c_order`. The same shape and
    strides give the same object.
    """
    lead: Any = tensors[0] if tensors[0] is not None else next(t for t in tensors if t is not None)
    return _space(
        event_dims, c_order, lead.shape, tuple([None if t is None else t.stride() for t in tensors]),
        tuple([None if t is None else t.stride() for t in row_tensors]),
    )  # fmt: skip


Strides = tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def _space(
    event_dims: int,
    c_order: bool,
    shape: Strides,
    whole: tuple[Strides | None, ...],
    by_row: tuple[Strides | None, ...],
) -> Space:
    """Return the space of tensors with these strides; those of `by_row` have row dims only."""
    split = len(shape) - event_dims
    rows, cols = math.prod(shape[:split]), math.prod(shape[split:])
    present = [s for s in (*whole, *by_row) if s is not None]
    if all(_is_contiguous(shape, s) for s in present):
        vec = next(v for v in (8, 4, 2, 1) if cols % v == 0)
        at = ((cols // vec,), (1,))
        one = (1,)
        return Space(
            rows, cols, vec, ((), ()), tuple(at if s is not None else None for s in whole),
            tuple(one if s is not None else None for s in by_row),
        )  # fmt: skip

    strides = [s + (0,) * (len(shape) - len(s)) for s in present]
    # event dims in the memory order of the first tensor, for cache locality
    event = sorted(range(split, len(shape)), key=lambda d: 0 if c_order else -strides[0][d])
    row_sizes, row_strides = _merge(range(split), shape, strides, cols)
    col_sizes, col_strides = _merge(event, shape, strides, 1)
    full = len([s for s in whole if s is not None])
    outer = [s for k in range(full) for s in (*row_strides[k], *col_strides[k][:-1])]
    vec = math.gcd(8, col_sizes[-1], *outer)
    if len(col_sizes) > 1:
        col_sizes[-1] //= vec
    whole_at = iter(
        (tuple(s // vec for s in row_strides[k]), (*(s // vec for s in col_strides[k][:-1]), col_strides[k][-1]))
        for k in range(full)
    )
    row_at = iter(tuple(row_strides[k]) for k in range(full, len(present)))
    return Space(
        rows, cols, vec, (tuple(row_sizes[1:]), tuple(col_sizes[1:])),
        tuple(next(whole_at) if s is not None else None for s in whole),
        tuple(next(row_at) if s is not None else None for s in by_row),
    )  # fmt: skip


def _is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor with the leading sizes of `shape` is contiguous, as `Tensor.is_contiguous` says."""
    size = 1
    for n, stride in reversed(list(zip(shape, strides, strict=False))):
        if n != 1 and stride != size:
            return False
        size *= n
    return True


def any_event_dims(tensors: Sequence[Tensor | None]) -> int:
    """Return event dims for ops without row sums: all if every tensor is contiguous, else all but the first."""
    lead: Any = tensors[0]
    flat = all(t is None or t.is_contiguous() for t in tensors)
    return lead.dim() - (not flat)


def _merge(
    dims: Sequence[int], shape: Sequence[int], strides: Sequence[Sequence[int]], unit: int
) -> tuple[list[int], list[list[int]]]:
    """Return sizes and per-tensor strides of the merged dims, at least one dim."""
    sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for d in dims:
        size = shape[d]
        if size == 1:
            continue
        if sizes and all(m[-1] == s[d] * size for m, s in zip(merged, strides, strict=True)):
            sizes[-1] *= size
        else:
            sizes.append(size)
            for m in merged:
                m.append(0)
        for m, s in zip(merged, strides, strict=True):
            m[-1] = s[d]
    if not sizes:
        return [1], [[unit] for _ in strides]
    return sizes, merged


def cut(space: Space) -> Blocks:
    """Return the block shapes for a space."""
    cols = TILE if space.cols > 2 * TILE else min(TILE // 2, power_of_two(space.cols))
    rows = TILE // cols
    segment = min(SEGMENT, cols * -(-space.cols // cols))
    segments = -(-space.cols // segment)
    return Blocks(rows, cols, segment, segments, -(-space.rows // rows) * segments)


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def bits(value: float, dtype: torch.dtype) -> int:
    """Return the bit pattern of a float as an integer."""
    form, integer = ("<d", "<q") if dtype == torch.float64 else ("<f", "<i")
    try:
        packed = struct.pack(form, value)
    except OverflowError:  # above float32's range
        packed = struct.pack(form, math.copysign(math.inf, value))
    return struct.unpack(integer, packed)[0]


def number(value: float, dtype: torch.dtype) -> _plans.Words:
    """Return a float by value: a float launch argument would be rounded to float32."""
    return _plans.words(bits(value, dtype))


def by_value(tensor: Tensor) -> bool:
    """Whether a scalar is passed by value: a 0-d CPU tensor, made from the caller's number."""
    return tensor.is_cpu and tensor.dim() == 0


def row_view(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor] | tuple[Tensor, int] | _plans.Words:
    """Return one value per row, or one number for all rows, as kernels that compute in `dtype` read it."""
    if by_value(tensor):
        value: Any = tensor.item()
        return _plans.words(value) if dtype == torch.int64 else number(value, dtype)
    return (tensor, tensor.stride(0)) if tensor.dim() else (tensor,)


def over_space(
    kernel: Any, space: Space, x: Tensor, *args: object, blocks: Blocks | None = None,
    num_warps: int | None = None, **constants: object,
) -> None:  # fmt: skip
    """Launch a kernel with parameters sizes, rows, cols, segments and TILE, see _tiles, on the device of x."""
    blocks = blocks or space.blocks
    of_space = space.constants.get(blocks)
    if of_space is None:
        of_space = space.constants[blocks] = {
            "sizes": space.sizes, "rows": space.rows, "cols": space.cols // space.vec, "segments": blocks.segments,
            "TILE": _tiles.TileShape(
                tl.int64 if space.wide else tl.int32, space.vec, blocks.rows, blocks.cols, blocks.segment
            ),
        }  # fmt: skip
    # float64: twice the warps halve the elements per thread, to lower register pressure
    num_warps = num_warps or (8 if x.dtype == torch.float64 else 4)
    _on_device(x.device, kernel, blocks.programs, num_warps, args, constants, of_space)


NOTHING: dict[str, object] = {}


def launch(
    kernel: Any, count: int, device: torch.device, *args: object, num_warps: int = 4, **constants: object
) -> None:
    """Launch `count` programs on the device."""
    _on_device(device, kernel, count, num_warps, args, constants, NOTHING)


def _on_device(device: torch.device, kernel: Any, count: int, num_warps: int, *arguments: Any) -> None:
    index = device.index
    if index is None or index == torch.cuda.current_device():
        _plans.launch(kernel, count, index, num_warps, *arguments)
    else:
        with torch.cuda.device(device):
            _plans.launch(kernel, count, index, num_warps, *arguments)


View = tuple[Tensor, object]  # the tensor and its strides, see _tiles


def views(tensors: Sequence[Tensor | None], at: Sequence[object]) -> list[View | None]:
    """Return the views of tensors over a space: `at` are its strides; None: absent."""
    pairs: Any = list(zip(tensors, at, strict=False))
    return [None if pair[0] is None else pair for pair in pairs] if None in at else pairs


def sum_segments(partial: Tensor, out: Tensor) -> None:
    """Sum (rows, segments) to (rows,), in an order that depends on the number of segments alone."""
    rows, segments = partial.shape
    block = min(TILE, power_of_two(segments))
    launch(
        _tiles.sum_segments, -(-rows // (TILE // block)), partial.device, partial, out, rows, segments,
        BLOCK_R=TILE // block, BLOCK_C=block,
    )  # fmt: skip
