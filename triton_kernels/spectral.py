"""Spectral normalisation: groups of layers, and the launches of the kernels in _spectral for each."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import _launch
from ._spectral import (
    COLS,
    ROWS,
    Z_COLS,
    Z_ROWS,
    dot_kernel,
    gradient_kernel,
    product_kernel,
    reduce_kernel,
    scale_kernel,
)
from ._table import Layout

ELEMENT = {
    torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
}  # fmt: skip


class Types(NamedTuple):
    """Types of the elements behind the addresses in the table."""

    w: Any
    u: Any
    v: Any
    g: Any = None
    grad_sigma: Any = None


@lru_cache(maxsize=64)
def _types(*dtypes: torch.dtype) -> Types:
    return Types(*(ELEMENT[dtype] for dtype in dtypes))


class Plan(NamedTuple):
    """How layers of these shapes share the launches; widest first, because their programs take longest."""

    order: list[int]
    forward: Layout
    backward: Layout
    row_blocks: int
    col_blocks: int
    partials: int
    tiles: int


@lru_cache(maxsize=64)
def _plan(shapes: tuple[tuple[int, int], ...]) -> Plan:
    order = sorted(range(len(shapes)), key=lambda i: -shapes[i][1])
    rows, cols = ([shapes[i][k] for i in order] for k in range(2))
    row_blocks = [-(-r // ROWS) for r in rows]
    col_blocks = [max(1, -(-c // Z_COLS)) for c in cols]
    tiles = [a * max(1, -(-c // COLS)) for a, c in zip(row_blocks, cols, strict=True)]
    counts = [row_blocks, col_blocks, [a * b for a, b in zip(row_blocks, col_blocks, strict=True)], tiles]
    starts = [[0, *itertools.accumulate(count)] for count in counts]
    fields = [start[:-1] for start in starts]
    return Plan(order, Layout([rows, cols, *fields]), Layout([rows, cols, fields[-1]]), *(s[-1] for s in starts))


def _groups(*lists: Sequence[Tensor]) -> list[list[int]]:
    """Indices of layers that share launches: the same dtypes, and all vectors or none."""
    groups = defaultdict(list)
    for i, layer in enumerate(zip(*lists, strict=True)):
        key = (layer[0].dim() == 1, *(t.dtype for t in layer))
        groups[key].append(i)
    return list(groups.values())


def _plan_of(weights: Sequence[Tensor]) -> Plan:
    if weights[0].dim() == 1:
        return _plan(tuple((1, w.shape[0]) for w in weights))
    return _plan(tuple((w.shape[0], w.numel() // w.shape[0]) for w in weights))


def spectral_normalize(weights: list[Tensor], u: list[Tensor], v: list[Tensor], n_iter: int) -> list[Tensor]:
    results: list[list[Tensor]] = [[*weights], [*u], [*v], [*weights]]
    for group in _groups(weights, u, v):
        w, left, right = ([values[i] for i in group] for values in (weights, u, v))
        outputs = _normalized(w, left, right, n_iter)
        for values, result in zip(results, outputs, strict=True):
            for i, tensor in zip(group, result, strict=True):
                values[i] = tensor
    return [tensor for values in results for tensor in values]


def _normalized(weights: list[Tensor], u: list[Tensor], v: list[Tensor], n_iter: int) -> list[list[Tensor]]:
    """Return [weights, u, v, sigmas] of layers of one group."""
    device, dtype, vector = weights[0].device, _launch.compute_dtype(weights[0]), weights[0].dim() == 1
    rounds, iterates = (1, True) if vector else (max(n_iter, 1), n_iter > 0)
    plan = _plan_of(weights)
    tensors = [[t.contiguous() for t in values] for values in (weights, u, v)]
    copy = torch.clone if vector else torch.empty_like
    results = [[torch.empty_like(t) for t in tensors[0]], *([copy(t) for t in values] for values in tensors[1:])]
    table = plan.forward.table([[values[i] for i in plan.order] for values in (*tensors, *results)])
    # of every row block: rows of y, |y|^2; of every column block: columns of z, |z|^2; and the norms |y|
    counts = [plan.row_blocks * ROWS, plan.col_blocks * Z_COLS, plan.partials * Z_COLS * iterates]
    counts += [-(-n // Z_COLS) * Z_COLS for n in (plan.row_blocks, plan.col_blocks, len(weights))]
    counts += [n * (rounds > 1) for n in counts[:2]]
    work = torch.empty(sum(counts), dtype=dtype, device=device)
    y, z, partial, squares, z_squares, norms, u_state, v_state = work.split(counts)
    sigmas = torch.empty(len(weights), dtype=dtype, device=device)
    head = (table, plan.forward.pitch, len(weights))
    sizes = dict(VECTOR=vector, BLOCK_R=ROWS, UNIT=Z_COLS, num_warps=8 if dtype == torch.float64 else 4)
    elements = [values[0].dtype for values in tensors]
    for i in range(rounds):
        first, last = i == 0, i + 1 == rounds
        kinds = dict(FIRST=first, ITERATES=iterates, BLOCK_C=COLS, **sizes)
        _launch.launch(
            product_kernel, plan.row_blocks, device, *head, v_state, y, squares, partial,
            TYPES=_types(*elements[:2], elements[2] if first else dtype), **kinds,
        )  # fmt: skip
        if iterates:
            _launch.launch(
                reduce_kernel, plan.col_blocks, device, *head, partial, squares, z, z_squares, norms,
                MOST=Z_ROWS, **sizes,
            )  # fmt: skip
        _launch.launch(
            scale_kernel, plan.tiles, device, *head, u_state, v_state, y, squares, z, z_squares, norms, sigmas,
            TYPES=_types(*elements), LAST=last, **kinds,
        )  # fmt: skip
    # tensors over one buffer, not views: autograd forbids changes in place of one of several views
    storage, back = sigmas.untyped_storage(), [sigmas] * len(weights)
    for position, i in enumerate(plan.order):
        back[i] = sigmas.new_empty(0).set_(storage, position, (), ())
    return [[_as(w, t) for w, t in zip(weights, results[0], strict=True)], *results[1:], back]


def spectral_normalize_backward(
    grads: list[Tensor],
    grad_sigmas: list[Tensor],
    weights: list[Tensor],
    u: list[Tensor],
    v: list[Tensor],
    sigmas: list[Tensor],
) -> list[Tensor]:
    lists, results = (weights, u, v, grads, grad_sigmas, sigmas), [*weights]
    for group in _groups(*lists):
        outputs = _gradients(*([values[i] for i in group] for values in lists))
        for i, tensor in zip(group, outputs, strict=True):
            results[i] = tensor
    return results


def _gradients(
    weights: list[Tensor], u: list[Tensor], v: list[Tensor],
    grads: list[Tensor], grad_sigmas: list[Tensor], sigmas: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    plan = _plan_of(weights)
    w, u, v, g = ([t.contiguous() for t in values] for values in (weights, u, v, grads))
    out = [torch.empty_like(t) for t in w]
    fields = (w, u, v, out, g, grad_sigmas, sigmas)
    table = plan.backward.table([[values[i] for i in plan.order] for values in fields])
    partial = sigmas[0].new_empty(plan.tiles)
    head = (table, plan.backward.pitch, len(w), partial)
    types = _types(*(values[0].dtype for values in (w, u, v, g, grad_sigmas)))
    common: dict[str, Any] = dict(
        TYPES=types, BLOCK_R=ROWS, BLOCK_C=COLS, num_warps=8 if partial.dtype == torch.float64 else 4
    )
    _launch.launch(dot_kernel, plan.tiles, partial.device, *head, **common)
    _launch.launch(
        gradient_kernel, plan.tiles, partial.device, *head, VECTOR=weights[0].dim() == 1, **common
    )  # fmt: skip
    return [_as(a, b) for a, b in zip(weights, out, strict=True)]


def _as(like: Tensor, values: Tensor) -> Tensor:
    """Return the values with the strides of empty_like(like)."""
    return values if like.is_contiguous() else torch.empty_like(like).copy_(values)
