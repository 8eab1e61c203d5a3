"""What the forward of a program leaves to its backward on a CPU.

The backward runs forward again, tile by tile. It does not have to compute what the forward has kept: the results of
layers with many inputs, each of which costs as many multiply-adds as the layer has inputs, and the columns after a
transform. Writing and reading a number costs as much as some tens of multiply-adds.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _backend
from ._torch import any_requires_grad, under_transform
from .program import Affine, Dense, Multiplicative, Net, Part, Program, Residual, Spline

# numbers that are kept, at most: 128 MB in float32
MOST = 1 << 25
# inputs of a layer that is kept, at least: kProgramKeptInputs of csrc/args/flow_program.h
INPUTS = 48
# rows come in multiples of this: kProgramRows
BLOCK = 32


def columns_to_keep(x: Tensor, context: Tensor | None, weights: Sequence[Tensor], code: str) -> int:
    """Return how many numbers of every row the forward keeps, 0 for none."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.device.type != "cpu" or under_transform():
        return 0
    if _backend.current() != "auto" or not any_requires_grad(x, context, weights):
        return 0
    rows = x.shape[0]
    # where rows of x share a row of the context, the forward does once what nets make of that row alone
    if context is not None and (context.shape[0] != rows or context.stride(0) == 0):
        return 0
    columns = columns_of(code)
    return columns if columns * rows <= MOST else 0


def kept_shape(rows: int, columns: int) -> tuple[int, ...]:
    """Return the shape of the tensor with so many numbers of every row."""
    return ((rows + BLOCK - 1) // BLOCK * BLOCK, columns) if columns else (0,)


@functools.lru_cache(maxsize=256)
def columns_of(code: str) -> int:
    """Return how many numbers of every row a program keeps; an autoregressive inverse keeps none of its own."""
    program, columns = Program.decode(code), 0
    for instruction in program.instructions:
        if isinstance(instruction, Net):
            inputs = len(instruction.columns) + program.context * instruction.context
            columns += _of_parts(instruction.parts, inputs)
        elif isinstance(instruction, (Affine, Multiplicative, Spline)):
            columns += len(instruction.columns)
    return columns


def _of_parts(parts: Sequence[Part], inputs: int) -> int:
    columns = 0
    for part in parts:
        if isinstance(part, Dense):
            columns += part.size * (inputs >= INPUTS)
            inputs = part.size
        elif isinstance(part, Residual):
            columns += _of_parts(part.parts, inputs)
    return columns
