"""When the forward of a program keeps the tape that its backward needs, and how large that is.

A tape has what the instructions make of every row: on a CPU the backward makes it again tile by tile, unless the
forward has left it. Writing and reading a number of it costs as much as some tens of multiply-adds.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _backend
from ._schemas import ACTIVATIONS
from ._torch import any_requires_grad, under_transform
from .program import (
    Additive,
    Autoregressive,
    Context,
    Dense,
    Net,
    Part,
    Program,
    Residual,
    Wrap,
)

# Numbers of a tape that is kept: any program's up to FEW, which stay in the caches; up to MOST (128 MB in float32)
# those of programs with WORTH multiply-adds for each.
FEW, MOST, WORTH = 1 << 21, 1 << 25, 48
# rows of a tape are a multiple of this, kProgramRows of csrc/args/flow_program.h
BLOCK = 32
# activations whose slope follows from the value before them alone
_IDENTITY = ACTIVATIONS.index("identity")
_IDENTITY = ACTIVATIONS.index("identity")
_NEED_BEFORE = {ACTIVATIONS.index(name) for name in ("silu", "gelu", "clamp_exp")}


class Size(NamedTuple):
    """Of a row: numbers on the tape, and multiply-adds of the forward's products."""

    columns: int
    multiply_adds: int


def kept_columns(x: Tensor, context: Tensor | None, weights: Sequence[Tensor], code: str) -> int:
    """Return the columns of the tape that the forward keeps, 0 for none."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.device.type != "cpu" or under_transform():
        return 0
    if _backend.current() != "auto" or not any_requires_grad(x, context, weights):
        return 0
    rows = x.shape[0]
    # what nets make of a row of the context is made once for all rows of x that share it, and not on the tape of each
    if context is not None and (context.shape[0] != rows or context.stride(0) == 0):
        return 0
    size = size_of(code)
    numbers = size.columns * rows
    worth = numbers <= FEW or (numbers <= MOST and size.multiply_adds >= WORTH * size.columns)
    return size.columns if worth else 0


def tape_shape(rows: int, kept: int) -> tuple[int, ...]:
    """Return the shape of the tape with that many columns."""
    return ((rows + BLOCK - 1) // BLOCK * BLOCK, kept) if kept else (0,)


@functools.lru_cache(maxsize=256)
def size_of(code: str) -> Size:
    """Return the size of a program's tape; no columns for one with an autoregressive inverse, which is not kept."""
    program = Program.decode(code)
    columns = multiply_adds = 0
    for instruction in program.instructions:
        if isinstance(instruction, Autoregressive):
            return Size(0, 0)
        if isinstance(instruction, Net):
            inputs = len(instruction.columns) + program.context * instruction.context
            size = _of_parts(instruction.parts, inputs, program.context)
            columns += inputs + size.columns
            multiply_adds += size.multiply_adds
        elif not isinstance(instruction, (Additive, Wrap)):
            columns += len(instruction.columns)
    return Size(columns, multiply_adds)


def _of_parts(parts: Sequence[Part], inputs: int, context: int) -> Size:
    columns = multiply_adds = 0
    for part in parts:
        if isinstance(part, Dense):
            columns += _of_dense(part)
            multiply_adds += part.size * inputs
            inputs = part.size
        elif isinstance(part, Context):
            # a sum takes the place of W c + b
            makes_more = part.gate or part.dense.activation != _IDENTITY
            columns += _of_dense(part.dense) + part.dense.size * makes_more
            multiply_adds += part.dense.size * context
        elif isinstance(part, Residual):
            size = _of_parts(part.parts, inputs, context)
            columns += size.columns + inputs
            multiply_adds += size.multiply_adds
        else:
            columns += inputs
    return Size(columns, multiply_adds)


def _of_dense(dense: Dense) -> int:
    return dense.size * (1 + (dense.activation in _NEED_BEFORE))
