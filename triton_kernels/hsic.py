"""Sums over Gram matrices that are computed tile by tile and never stored, HSIC from these sums, and permuted sums.

There is no CUDA C++ version, because the tiles are matrix products, which Triton schedules; a GPU without Triton runs
the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import hsic as ref
from . import _launch
from ._gram import DELTA, LAPLACIAN, POLYNOMIAL, PRECOMPUTED, RBF, Gram, grams_of
from ._hsic import (
    MOST_PAIRS,
    accumulate_kernel,
    backward_kernel,
    matrix_kernel,
    pair_backward_kernel,
    permuted_kernel,
    sums_kernel,
    terms_backward_kernel,
    terms_kernel,
)

MOST_SPLITS = 16  # ranges of columns of a backward, whose gradients are added
MOST_PARTIAL = 1 << 21  # most partial row sums of a launch per variable: above this, offsets take several launches
MOST_VARIABLES = 16  # of a launch of terms: four bits name one
TERMS, TERMS_BACKWARD = 1024, 256  # rows of a block


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


def _precision(three: str) -> str:
    """Precision of a tl.dot of float32: the name of the tensor-core mode, "ieee" on AMD."""
    return three if torch.version.hip is None else "ieee"


@functools.cache
def _generation(device: torch.device) -> int:
    """Major compute capability, 0 on AMD; the interpreter counts as Hopper, 9."""
    if device.type == "cpu":
        return 9
    return 0 if torch.version.hip else torch.cuda.get_device_capability(device)[0]


def _from_shared(device: torch.device) -> bool:
    """Whether products read their operands from shared memory, which leaves registers."""
    return _generation(device) in (9, 10)


def _tile(x: Gram, y: Gram, device: torch.device) -> Tile:
    """Tile of the forward kernel; by dtypes, kernels and device alone, so that no sum depends on the batch."""
    if x.z.dtype == torch.float64:
        return Tile(32, 32, 8)
    registers = _registers(x, y, device)
    # 64 columns take 0.87 times the time of 32 on an H200; Triton 3.7 does not compile them for a B200
    return Tile(64, 64 if registers and _generation(device) == 9 else 32, 4, registers)


def _backward_tile(x: Gram, y: Gram, device: torch.device) -> Tile:
    # 3-D sums need small tiles
    if x.kernel == LAPLACIAN.value or x.z.dtype == torch.float64:
        return Tile(16, 16, 8)
    fits = _from_shared(device) or (x.multiplies and y.multiplies)
    return Tile(64 if fits else 32, 32, 4, _registers(x, y, device))


def _pair_tile(device: torch.device) -> Tile:
    return Tile(64 if _from_shared(device) else 32, 32, 4)


def _registers(x: Gram, y: Gram, device: torch.device) -> int:
    """Limit for three blocks per multiprocessor, where it causes no spills."""
    return 168 if x.multiplies and y.multiplies and _from_shared(device) else 0


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
    if sorted(pairs) == [0, 1] and len(z) == 2 and batch * n and all(map(_has_products, grams)):
        return _pair_gradients(grams, scale, grad_rows.contiguous(), grad_cross, allow_tf32)
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


def _has_products(x: Gram) -> bool:
    """Whether the gradient is a product of weights with float32 rows."""
    return x.z.dtype == torch.float32 and x.kernel in (RBF.value, POLYNOMIAL.value)


def _pair_gradients(
    grams: Sequence[Gram], scale: Tensor, rows: Tensor, factor: Tensor, allow_tf32: bool
) -> list[Tensor]:
    """Return the gradients of both variables of the only pair."""
    x, y = grams
    partials = _partial_gradients(
        pair_backward_kernel, x, y, grams, rows, factor.contiguous(), _pair_tile(x.z.device), 2, allow_tf32
    )
    grads = []
    for m, (v, partial) in enumerate(zip(grams, partials, strict=True)):
        grad = torch.empty_like(v.z)
        _accumulate(partial, grad, add=False)
        grads.append(grad.mul_(scale[:, m, None, None]) if v.kernel == RBF.value else grad)
    return grads


def _partial_gradients(
    kernel: Any, x: Gram, y: Gram, of: Sequence[Gram], rows: Tensor | None, factor: Tensor, tile: Tile, resident: int,
    allow_tf32: bool, **constants: Any,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients (splits, batch, n, dim) of the variables `of` from ranges of columns, see `_splits`."""
    batch, n, _ = x.z.shape
    dim = max(v.dim for v in of)
    blocks, steps = -(-n // tile.rows), -(-n // tile.step)
    splits, features = (_splits(blocks, steps, resident), _features(dim)) if tile.rows > 16 else (1, 16)
    chunks = -(-dim // features)
    partials = [v.z.new_empty((splits, *v.z.shape)) for v in of]
    _launch.launch(
        kernel, batch * blocks * splits * chunks, x.z.device, x.variable, y.variable, rows, factor, *partials, n,
        blocks, chunks, splits, -(-steps // splits), X=x.kind, Y=y.kind, PRECISION=_precision("tf32"),
        WEIGHTS=_precision("tf32" if allow_tf32 else "tf32x3"), BLOCK=tile.rows, STEP=tile.step, FEATURES=features,
        **tile.options(), **constants,
    )  # fmt: skip
    return partials


def _splits(blocks: int, steps: int, resident: int) -> int:
    """Ranges of columns, for `resident` programs on each of an H100's multiprocessors; by n alone."""
    return max(1, min(MOST_SPLITS, 128 * resident // blocks, steps))


def _features(dim: int) -> int:
    return min(64, max(16, _launch.power_of_two(dim)))


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
    tile = _backward_tile(x, y, grad.device)
    (partial,) = _partial_gradients(backward_kernel, x, y, [x], rows, factor, tile, 3, allow_tf32, SAME=same)
    _accumulate(partial, grad, add)


def hsic_permuted(gram_x: Tensor, gram_y: Tensor, permutations: Tensor) -> Tensor:
    out = gram_x.new_zeros(permutations.shape[:1], dtype=torch.float64)
    if permutations.numel():
        arguments = (t.contiguous() for t in (gram_x, gram_y, permutations))
        _launch.launch(permuted_kernel, len(out), gram_x.device, *arguments, out, len(gram_x), BLOCK=32)
    return out


def _fits(rows: Tensor, pairs: Sequence[int]) -> bool:
    """Whether a launch can take these pairs, and every variable is in one."""
    variables = rows.shape[1]
    return rows.numel() > 0 and variables <= MOST_VARIABLES and 0 < len(pairs) <= 2 * MOST_PAIRS.value and (
        {*pairs} == {*range(variables)}
    )  # fmt: skip


def _code(pairs: Sequence[int]) -> int:
    code = sum(m << 4 * k for k, m in enumerate(pairs))
    # the argument is a signed integer
    return code - (1 << 64) if code >= 1 << 63 else code


def hsic_terms(
    rows: Tensor, cross: Tensor, shift: Tensor, diagonals: Tensor, pairs: Sequence[int], unbiased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not _fits(rows, pairs):
        return ref.hsic_terms(rows, cross, shift, diagonals, pairs, unbiased)
    rows, cross, shift = rows.contiguous(), cross.contiguous(), shift.contiguous()
    batch, variables, n = rows.shape
    count = len(pairs) // 2
    more, less = torch.empty_like(cross), torch.empty_like(cross)
    totals = rows.new_empty((batch, variables))
    _launch.launch(
        terms_kernel, batch * count, rows.device, rows, cross, shift, (diagonals, diagonals.stride()), more, less,
        totals, variables, count, _code(pairs), n, UNBIASED=unbiased, BLOCK=TERMS,
    )  # fmt: skip
    return more, less, totals


def hsic_terms_backward(
    grad_more: Tensor | None, grad_less: Tensor | None, rows: Tensor, shift: Tensor, diagonals: Tensor, totals: Tensor,
    pairs: Sequence[int], unbiased: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not _fits(rows, pairs):
        return ref.hsic_terms_backward(grad_more, grad_less, rows, shift, diagonals, totals, pairs, unbiased)
    grad_more, grad_less = (grad if grad is None else grad.contiguous() for grad in (grad_more, grad_less))
    rows, shift, totals = rows.contiguous(), shift.contiguous(), totals.contiguous()
    batch, variables, n = rows.shape
    count, blocks = len(pairs) // 2, -(-n // TERMS_BACKWARD)
    grad_rows, grad_diagonals = torch.empty_like(rows), torch.empty_like(rows)
    grad_cross = rows.new_empty((batch, count))
    _launch.launch(
        terms_backward_kernel, batch * variables * blocks, rows.device, grad_more, grad_less, rows, shift,
        (diagonals, diagonals.stride()), totals, grad_rows, grad_cross, grad_diagonals, variables, count, _code(pairs),
        n, blocks, UNBIASED=unbiased, BLOCK=TERMS_BACKWARD,
    )  # fmt: skip
    return grad_rows, grad_cross, grad_diagonals
