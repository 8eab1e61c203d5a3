"""Sums over Gram matrices that are computed tile by tile and never stored; permuted sums; centring.

Forward, a program owns a block of rows I and a block of columns J: every unordered pair of blocks is computed once, for
J = I, I + 1, ... modulo the number of blocks, and gives row sums of I and of J. Backward, a program owns a block of
rows and a range of columns, and computes the tiles on both sides of the diagonal. There are no atomics: partial sums
are added in a fixed order. There is no CUDA C++ version, because the tiles are matrix products, which Triton schedules;
a GPU without Triton runs the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._gram import DELTA, LAPLACIAN, POLYNOMIAL, PRECOMPUTED, RBF, Gram, counted, gram_tile, grams_of, item_of
from ._tiles import fold_rows

GRID = tl.constexpr(1.5 * 2.0**7)  # adding it rounds to a multiple of 2^-16
MOST_SPLITS = 16  # ranges of columns of a backward, whose gradients are added
MOST_PARTIAL = 1 << 21  # most partial row sums of a launch per variable: above this, offsets take several launches


class Tile(NamedTuple):
    """Rows of a block, columns of a step, warps, and most registers per thread, so that several blocks share a
    multiprocessor (0: no limit)."""

    rows: int
    step: int
    warps: int
    registers: int = 0

    def options(self) -> dict[str, int]:
        # AMD's compiler has no such limit
        limit = {"maxnreg": self.registers} if self.registers and torch.version.hip is None else {}
        # one stage: a prefetched tile would take the registers of a second block
        return {"num_warps": self.warps, "num_stages": 1, **limit}


@triton.jit(do_not_specialize=["count", "parts"])
def accumulate_kernel(partial, out, count, parts, ADD: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Write the sums of partial (parts, count) over parts to out (count,), or add them."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((PARTS, BLOCK), out.dtype.element_ty)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (i < count)[None, :]
        total += tl.load(partial + part.to(tl.int64)[:, None] * count + i[None, :], mask=inside, other=0.0)
    result = fold_rows(total)
    if ADD:
        result += tl.load(out + i, mask=i < count, other=0.0)
    tl.store(out + i, result, mask=i < count)


@triton.jit
def exact_sum(v, axis: tl.constexpr, BOUNDED: tl.constexpr):
    """Sum in float64. Entries of at most 1 are split: up to 128 multiples of 2^-16 add without rounding in float32."""
    if v.dtype == tl.float64:
        return tl.sum(v, axis)
    elif BOUNDED:
        high = (v + GRID) - GRID
        return tl.sum(high, axis).to(tl.float64) + tl.sum(v - high, axis).to(tl.float64)
    else:
        return tl.sum(v.to(tl.float64), axis)


@triton.jit
def add_tile(sums, columns, k, j, n, diagonal, BOUNDED: tl.constexpr):
    """Add the row sums of a tile to `sums` and store its column sums, if `columns` is not None."""
    if columns is not None:
        sums += exact_sum(k, 1, BOUNDED)
        # the diagonal block has both sides already
        tl.store(columns + j, tl.where(diagonal, 0.0, exact_sum(k, 0, BOUNDED)), mask=j < n)
    return sums


@triton.jit(do_not_specialize=["n", "blocks", "part", "parts", "own", "first", "offsets", "size"])
def sums_kernel(
    x, y, x_partial, y_partial, cross, n, blocks, part, parts, own, first, offsets, size,
    X: tl.constexpr, Y: tl.constexpr, SAME: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One pair of blocks of a pair of variables: cross (batch, own, offsets), and if requested partial row sums
    (2 offsets, batch n = size): of the rows, then of the columns.

    A launch covers `offsets` offsets from `first` on, of the row blocks part, part + parts, part + 2 parts, ...
    """
    program = tl.program_id(0)
    offset = program % offsets
    item = (program // offsets // own).to(tl.int64)
    row_block = (program // offsets % own) * parts + part
    distance = first + offset
    column_block = (row_block + distance) % blocks
    # half a turn: the pair of blocks is met from both sides
    met = (2 * distance == blocks) & (row_block > column_block)
    i = row_block * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = x.z.dtype.element_ty
    x, y = item_of(x, item, n, dtype), item_of(y, item, n, dtype)
    X_BOUNDED: tl.constexpr = X.kernel != POLYNOMIAL and X.kernel != PRECOMPUTED
    Y_BOUNDED: tl.constexpr = Y.kernel != POLYNOMIAL and Y.kernel != PRECOMPUTED
    sum_x, sum_y = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    products = tl.zeros((BLOCK,), tl.float64)
    at_rows = offset.to(tl.int64) * size + item * n
    at_columns = at_rows + offsets.to(tl.int64) * size
    x_columns, y_columns = x_partial, y_partial
    if x_partial is not None:
        x_columns += at_columns
    if y_partial is not None:
        y_columns += at_columns
    for step in range(0, BLOCK, STEP):
        j = column_block * BLOCK + step + tl.arange(0, STEP)
        inside = counted(i, j, n) & (met == 0)
        k, _ = gram_tile(x, i, j, n, X, PRECISION)
        k = tl.where(inside, k, 0.0)
        sum_x = add_tile(sum_x, x_columns, k, j, n, distance == 0, X_BOUNDED)
        if SAME:
            m = k
        else:
            m, _ = gram_tile(y, i, j, n, Y, PRECISION)
            m = tl.where(inside, m, 0.0)
        sum_y = add_tile(sum_y, y_columns, m, j, n, distance == 0, Y_BOUNDED)
        products += exact_sum(k * m, 1, X_BOUNDED and Y_BOUNDED)
    if x_partial is not None:
        tl.store(x_partial + at_rows + i, sum_x, mask=i < n)
    if y_partial is not None:
        tl.store(y_partial + at_rows + i, sum_y, mask=i < n)
    total = tl.sum(products, 0)
    tl.store(cross + program, tl.where(distance == 0, total, 2.0 * total))


@triton.jit
def weight_tile(inside, i, j, n, rows, factor, other, slope):
    """dL/dK of an unordered pair of rows times the slope of the kernel; zero outside."""
    w = other * (factor * 2.0)
    if rows is not None:
        at_i = tl.load(rows + i, mask=i < n, other=0.0)[:, None]
        w += (at_i + tl.load(rows + j, mask=j < n, other=0.0)[None, :]).to(w.dtype)
    return tl.where(inside, w * slope, 0.0)


@triton.jit
def own_features(x, i, f, n, SPLIT: tl.constexpr):
    """Features f of rows i."""
    inside = (i < n)[:, None] & (f < x.dim)[None, :]
    at = i.to(tl.int64)[:, None] * x.dim + f[None, :]
    value = tl.load(x.z + at, mask=inside, other=0.0)
    if SPLIT:
        value += tl.load(x.low + at, mask=inside, other=0.0)
    return value


@triton.jit(do_not_specialize=["n", "blocks", "chunks", "splits", "steps"])
def backward_kernel(
    x, y, rows, factor, partial, n, blocks, chunks, splits, steps,
    X: tl.constexpr, Y: tl.constexpr, SAME: tl.constexpr, PRECISION: tl.constexpr, WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Gradient of x from one pair of variables: a block of rows x FEATURES features, from `steps` steps of columns.

    partial is (splits, batch, n, x.dim).
    """
    program = tl.program_id(0)
    chunk = program % chunks
    split = program // chunks % splits
    item = (program // chunks // splits // blocks).to(tl.int64)
    i = program // chunks // splits % blocks * BLOCK + tl.arange(0, BLOCK)
    f = chunk * FEATURES + tl.arange(0, FEATURES)
    batch = (tl.num_programs(0) // chunks // splits // blocks).to(tl.int64)
    dtype: tl.constexpr = x.z.dtype.element_ty
    x, y = item_of(x, item, n, dtype), item_of(y, item, n, dtype)
    if rows is not None:
        rows += item * n
    by = tl.load(factor + item).to(dtype)
    total = tl.zeros((BLOCK, FEATURES), dtype)
    weights = tl.zeros((BLOCK,), dtype)
    for step in range(split * steps, tl.minimum((split + 1) * steps, (n + STEP - 1) // STEP)):
        j = step * STEP + tl.arange(0, STEP)
        inside = counted(i, j, n)
        if SAME:
            k, slope = gram_tile(x, i, j, n, X, PRECISION)
            w = weight_tile(inside, i, j, n, rows, by, k, slope)
        else:
            # y first: fewer registers than with the slope of x beside it
            other, _ = gram_tile(y, i, j, n, Y, PRECISION)
            _, slope = gram_tile(x, i, j, n, X, PRECISION)
            w = weight_tile(inside, i, j, n, rows, by, other, slope)
        zj = own_features(x, j, f, n, X.split)
        if X.kernel == LAPLACIAN:
            more = own_features(x, i, f, n, X.split)[:, None, :] - zj[None, :, :]
            sign = tl.where(more > 0.0, 1.0, tl.where(more < 0.0, -1.0, 0.0)).to(dtype)
            total -= tl.sum(w[:, :, None] * sign, 1)
        elif dtype == tl.float32:
            total = tl.dot(w, zj, total, input_precision=WEIGHTS)
        else:
            total += tl.sum(w[:, :, None] * zj[None, :, :], 1)
        weights += tl.sum(w, 1)
    if X.kernel == RBF:
        # sum over j of w_ij (z_j - z_i)
        total -= weights[:, None] * own_features(x, i, f, n, X.split)
    at = ((split * batch + item) * n + i)[:, None] * x.dim + f[None, :]
    tl.store(partial + at, total, mask=(i < n)[:, None] & (f < x.dim)[None, :])


@triton.jit(do_not_specialize=["n", "blocks"])
def matrix_kernel(
    y, rows, factor, grad, n, blocks,
    Y: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of a precomputed matrix from one pair of variables: one tile."""
    program = tl.program_id(0)
    item = (program // (blocks * blocks)).to(tl.int64)
    i = program // blocks % blocks * BLOCK + tl.arange(0, BLOCK)
    j = program % blocks * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = y.z.dtype.element_ty
    value, _ = gram_tile(item_of(y, item, n, dtype), i, j, n, Y, PRECISION)
    total = value * tl.load(factor + item).to(dtype)
    if rows is not None:
        total += tl.load(rows + item * n + i, mask=i < n, other=0.0)[:, None].to(dtype)
    total = tl.where(counted(i, j, n), total, 0.0)
    inside = (i < n)[:, None] & (j < n)[None, :]
    at = grad + item * n * n + i.to(tl.int64)[:, None] * n + j[None, :]
    if ADD:
        total += tl.load(at, mask=inside, other=0.0)
    tl.store(at, total, mask=inside)


@triton.jit(do_not_specialize=["n"])
def permuted_kernel(x, y, permutations, out, n, BLOCK: tl.constexpr):
    """Sum of x[i, j] y[p[i], p[j]] over i != j, for one permutation p."""
    row = tl.program_id(0).to(tl.int64)
    permutations += row * n
    total = tl.zeros((BLOCK,), tl.float64)
    for i0 in range(0, n, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        p = tl.load(permutations + i, mask=i < n, other=0).to(tl.int64)
        for j0 in range(0, n, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            q = tl.load(permutations + j, mask=j < n, other=0)
            inside = counted(i, j, n)
            a = tl.load(x + i.to(tl.int64)[:, None] * n + j[None, :], mask=inside, other=0.0).to(tl.float64)
            b = tl.load(y + p[:, None] * n + q[None, :], mask=inside, other=0.0).to(tl.float64)
            total += tl.sum(a * b, 1)
    tl.store(out + row, tl.sum(total, 0))


def _precision(three: str) -> str:
    """Precision of a tl.dot of float32: the name of the tensor-core mode, "ieee" on AMD."""
    return three if torch.version.hip is None else "ieee"


@functools.cache
def _hopper(device: torch.device) -> bool:
    """Whether products read their operands from shared memory, which leaves registers; so does the interpreter."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def _tile(x: Gram, y: Gram, device: torch.device) -> Tile:
    """Tile of the forward kernel; by dtypes, kernels and device alone, so that no sum depends on the batch."""
    if x.z.dtype == torch.float64:
        return Tile(32, 32, 8)
    return Tile(64, 32, 4, _registers(x, y, device))


def _backward_tile(x: Gram, y: Gram, device: torch.device) -> Tile:
    # 3-D sums need small tiles
    if x.kernel == LAPLACIAN.value or x.z.dtype == torch.float64:
        return Tile(16, 16, 8)
    fits = _hopper(device) or (x.multiplies and y.multiplies)
    return Tile(64 if fits else 32, 32, 4, _registers(x, y, device))


def _registers(x: Gram, y: Gram, device: torch.device) -> int:
    """Limit for three blocks per multiprocessor, where it causes no spills."""
    return 168 if x.multiplies and y.multiplies and _hopper(device) else 0


def _accumulate(partial: Tensor, out: Tensor, add: bool) -> None:
    """Write the sums of partial (parts, ...) to out (...), or add them."""
    count, parts = out.numel(), partial.shape[0]
    # the loads of a tile are in flight together
    rows = min(16, _launch.power_of_two(parts))
    block = _launch.TILE // rows
    _launch.launch(
        accumulate_kernel, -(-count // block), out.device, partial, out, count, parts, ADD=add, BLOCK=block, PARTS=rows
    )


def hsic_sums(
    z: Sequence[Tensor], scale: Tensor, kernels: Sequence[int], degrees: Sequence[int], pairs: Sequence[int],
    allow_tf32: bool, part: int, parts: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, n, _ = z[0].shape
    grams, shifts = grams_of(z, scale, kernels, degrees, allow_tf32)
    # a part may have no tile of a variable
    new = scale.new_empty if parts == 1 and n else scale.new_zeros
    rows = new((len(z), batch, n), dtype=torch.float64)
    cross = new((len(pairs) // 2, batch), dtype=torch.float64)
    # a variable in no pair needs its row sums too
    asked = [*zip(pairs[::2], pairs[1::2], strict=True)] + [(m, m) for m in range(len(z)) if m not in pairs]
    left = set(range(len(z)))
    for p, (a, b) in enumerate(asked):
        x_rows = rows[a] if a in left else None
        y_rows = rows[b] if b in left and a != b else None
        left -= {a, b}
        total = cross[p] if p < len(cross) else None
        _pair_sums(grams[a], grams[b], a == b, x_rows, y_rows, total, part, parts)
    return rows.transpose(0, 1).contiguous(), cross.mT.contiguous(), shifts.mT.contiguous()


def _pair_sums(
    x: Gram, y: Gram, same: bool, x_rows: Tensor | None, y_rows: Tensor | None, cross: Tensor | None, part: int,
    parts: int,
) -> None:  # fmt: skip
    """Write one pair's row sums (batch, n) and sum of products (batch,), unless the part has none of its tiles."""
    batch, n, _ = x.z.shape
    tile = _tile(x, y, x.z.device)
    blocks = -(-n // tile.rows)
    own = len(range(part, blocks, parts))
    if batch * own == 0:
        return
    turns = blocks // 2 + 1
    most = max(1, MOST_PARTIAL // n)
    scratch = x.shift
    for first in range(0, turns, most):
        offsets = min(most, turns - first)
        # blocks of other parts are not written
        new = scratch.new_empty if parts == 1 else scratch.new_zeros
        partials = [None if rows is None else new((2 * offsets, batch, n)) for rows in (x_rows, y_rows)]
        products = scratch.new_empty((batch, own * offsets))
        _launch.launch(
            sums_kernel, batch * own * offsets, x.z.device, x.variable, y.variable, *partials, products, n, blocks,
            part, parts, own, first, offsets, batch * n, X=x.kind, Y=y.kind, SAME=same,
            PRECISION=_precision("tf32"), BLOCK=tile.rows, STEP=tile.step, **tile.options(),
        )  # fmt: skip
        for partial, rows in zip(partials, (x_rows, y_rows), strict=True):
            if partial is not None and rows is not None:
                _accumulate(partial, rows, add=first > 0)
        if cross is not None:
            total = torch.empty_like(cross) if first else cross
            _launch.sum_segments(products, total)
            if first:
                cross += total


def hsic_sums_backward(
    grad_rows: Tensor, grad_cross: Tensor, z: Sequence[Tensor], scale: Tensor, kernels: Sequence[int],
    degrees: Sequence[int], pairs: Sequence[int], allow_tf32: bool,
) -> list[Tensor]:  # fmt: skip
    batch, n, _ = z[0].shape
    grams, _ = grams_of(z, scale, kernels, degrees, allow_tf32)
    grads = []
    for m, gram in enumerate(grams):
        if kernels[m] == DELTA.value or batch * n == 0:
            grads.append(torch.zeros_like(gram.z))
            continue
        grad = torch.empty_like(gram.z)
        grads.append(grad)
        # a pair of a variable with itself appears twice; a variable in no pair has only the gradient of its row sums
        sides = [(pairs[k ^ 1], grad_cross[:, k // 2]) for k in range(len(pairs)) if pairs[k] == m]
        rows = grad_rows[:, m].contiguous()
        for index, (other, factor) in enumerate(sides or [(m, grad_rows.new_zeros(batch))]):
            given, factor = rows if index == 0 else None, factor.contiguous()
            if kernels[m] == PRECOMPUTED.value:
                _matrix_gradient(grams[other], given, factor, grad, index > 0)
            else:
                _gradient(gram, grams[other], other == m, given, factor, grad, allow_tf32, index > 0)
        if kernels[m] in (RBF.value, LAPLACIAN.value):
            grad *= scale[:, m, None, None]
    return grads


def _matrix_gradient(y: Gram, rows: Tensor | None, factor: Tensor, grad: Tensor, add: bool) -> None:
    batch, n, _ = grad.shape
    blocks = -(-n // 32)
    _launch.launch(
        matrix_kernel, batch * blocks * blocks, grad.device, y.variable, rows, factor, grad, n, blocks, ADD=add,
        PRECISION=_precision("tf32"), BLOCK=32, num_warps=8, Y=y.kind,
    )  # fmt: skip


def _gradient(
    x: Gram, y: Gram, same: bool, rows: Tensor | None, factor: Tensor, grad: Tensor, allow_tf32: bool, add: bool
) -> None:
    """Write the gradient of x from one pair to `grad`, or add it."""
    batch, n, dim = grad.shape
    tile = _backward_tile(x, y, grad.device)
    blocks, steps = -(-n // tile.rows), -(-n // tile.step)
    # about three programs for each of an H100's multiprocessors; by n alone
    splits = max(1, min(MOST_SPLITS, 384 // blocks, steps)) if tile.rows > 16 else 1
    features = 16 if tile.rows == 16 else min(64, max(16, _launch.power_of_two(dim)))
    chunks = -(-dim // features)
    partial = grad.new_empty((splits, *grad.shape))
    _launch.launch(
        backward_kernel, batch * blocks * splits * chunks, grad.device, x.variable, y.variable, rows, factor,
        partial, n, blocks, chunks, splits, -(-steps // splits), SAME=same, FEATURES=features, BLOCK=tile.rows,
        STEP=tile.step, PRECISION=_precision("tf32"), WEIGHTS=_precision("tf32" if allow_tf32 else "tf32x3"),
        X=x.kind, Y=y.kind, **tile.options(),
    )  # fmt: skip
    _accumulate(partial, grad, add)


def hsic_permuted(gram_x: Tensor, gram_y: Tensor, permutations: Tensor) -> Tensor:
    out = gram_x.new_zeros(permutations.shape[:1], dtype=torch.float64)
    if permutations.numel():
        arguments = (t.contiguous() for t in (gram_x, gram_y, permutations))
        _launch.launch(permuted_kernel, len(out), gram_x.device, *arguments, out, len(gram_x), BLOCK=32)
    return out
