"""Programs of flows: one launch runs all instructions on tiles of rows, forward, or forward and back.

The kernel is a machine, which interprets the table of steps that _program_code.py writes for a program: another program
is no other kernel, and registers are those of the largest step. The table lies in GPU memory, copied when a program
runs for the first time on a device; each call gathers the weights in one buffer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._kept import kept_shape
from ..program import Program
from ..reference import flow_program as ref
from . import _launch
from ._program import (
    ACTIVATE,
    ACTIVATE_BACK,
    CONTEXT,
    COUPLE,
    COUPLE_BACK,
    DENSE,
    DENSE_INPUTS,
    DENSE_WEIGHTS,
    FILL,
    FORM,
    GRAD_LOGDET,
    GRAD_Y,
    KIND,
    LOAD,
    NORM,
    NORM_BACK,
    PERIODIC,
    PERIODIC_BACK,
    PRIOR,
    PRIOR_BACK,
    ROWS,
    SPLINE,
    SPLINE_BACK,
    STORE,
    SUM_ROWS,
    TOTAL,
    UNIFORM,
    WORDS,
    WRAP,
    Machine,
    X,
    activate_step,
    couple_step,
    dense_step,
    fill_step,
    load_step,
    norm_step,
    periodic_step,
    prior_step,
    store_step,
    total_step,
    uniform_step,
    word,
    wrap_step,
)
from ._program_grad import (
    activate_back_step,
    couple_back_step,
    dense_inputs_step,
    dense_weights_step,
    norm_back_step,
    periodic_back_step,
    prior_back_step,
    spline_back_step,
    sum_rows_step,
)
from ._program_spline import spline_step
from ._program_table import Code, compiled

# programs of a launch: four for each multiprocessor of an H100, fewer if their memory is more than this, in bytes
MOST_PROGRAMS = 528
MOST_MEMORY = 1 << 28
LEAST_PROGRAMS = 16  # what leaves fewer runs the reference
MOST_WORDS = 1 << 22  # of a table; of weights 512 times as many, whose offsets are int32


@triton.jit
def shared_step(m, s, kind, x, context, to_x, SPLINES: tl.constexpr):
    """The steps of both directions."""
    if kind == DENSE:
        dense_step(m, s)
    elif kind == COUPLE:
        couple_step(m, s)
    elif kind == ACTIVATE:
        activate_step(m, s)
    elif kind == WRAP:
        wrap_step(m, s)
    elif kind == NORM:
        norm_step(m, s)
    elif kind == PERIODIC:
        periodic_step(m, s)
    elif kind == PRIOR:
        prior_step(m, s)
    elif kind == UNIFORM:
        uniform_step(m, s)
    elif kind == FILL:
        fill_step(m, s)
    elif kind == LOAD:
        if word(s, FORM) == X:
            load_step(m, s, x)
        elif word(s, FORM) == CONTEXT:
            load_step(m, s, context)
    elif kind == STORE:
        if word(s, FORM) == X:
            store_step(m, s, to_x)
    if SPLINES:
        if kind == SPLINE:
            spline_step(m, s)


@triton.jit
def back_step(m, s, kind, grad_y, grad_logdet, to_context, grads, SPLINES: tl.constexpr):
    if kind == DENSE_INPUTS:
        dense_inputs_step(m, s)
    elif kind == DENSE_WEIGHTS:
        dense_weights_step(m, s, grads)
    elif kind == SUM_ROWS:
        sum_rows_step(m, s, grads)
    elif kind == COUPLE_BACK:
        couple_back_step(m, s)
    elif kind == ACTIVATE_BACK:
        activate_back_step(m, s)
    elif kind == NORM_BACK:
        norm_back_step(m, s)
    elif kind == PERIODIC_BACK:
        periodic_back_step(m, s)
    elif kind == PRIOR_BACK:
        prior_back_step(m, s)
    elif kind == LOAD:
        if word(s, FORM) == GRAD_Y:
            load_step(m, s, grad_y)
        elif word(s, FORM) == GRAD_LOGDET:
            load_step(m, s, grad_logdet)
    elif kind == STORE:
        if word(s, FORM) == CONTEXT:
            store_step(m, s, to_context)
    if SPLINES:
        if kind == SPLINE_BACK:
            spline_back_step(m, s)


@triton.jit(
    do_not_specialize=["steps", "places", "rows", "count"],
    do_not_specialize_on_alignment=["x", "context", "grad_y", "grad_logdet", "to_x", "to_context", "logdet"],
)
def machine_kernel(
    table, steps, x, context, grad_y, grad_logdet, weights, scratch, grads, to_x, to_context, logdet, places, rows,
    count, SPLINES: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Forward: to_x is y; BACK: the gradients of x and context, and sums of those of `count` weights per program."""
    program = tl.program_id(0).to(tl.int64)
    rows = rows.to(tl.int64)
    r = tl.arange(0, ROWS)[None, :]
    own = scratch + program * places * ROWS
    for first in range(program * ROWS, rows, tl.num_programs(0).to(tl.int64) * ROWS):
        m = Machine(table, own, weights, r, first + r, rows)
        s = table
        for _ in range(0, steps):
            kind = word(s, KIND)
            shared_step(m, s, kind, x, context, to_x, SPLINES)
            if BACK:
                back_step(m, s, kind, grad_y, grad_logdet, to_context, grads + program * count, SPLINES)
            elif kind == TOTAL:
                total_step(m, s, logdet)
            tl.debug_barrier()
            s += WORDS


class Call(NamedTuple):
    """How a program runs on a device."""

    code: Code
    table: Tensor


# kept for ever: CUDA graphs hold addresses of tables
@functools.cache
def _call(
    code: str, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device, needs: tuple[bool, ...] | None = None
) -> Call | None:  # fmt: skip
    """Return a program's steps, or None for one that is too large, and on a GPU of AMD."""
    if torch.version.hip:
        # its barriers order shared memory alone
        return None
    steps = compiled(Program.decode(code), sizes, dtype, needs)
    memory = dtype.itemsize * (steps.places * ROWS.value + sum(sizes) * (needs is not None))
    if max(len(steps.words), sum(sizes) >> 9) > MOST_WORDS or memory * LEAST_PROGRAMS > MOST_MEMORY:
        return None
    return Call(steps._replace(words=[]), torch.tensor(steps.words, dtype=torch.int64, device=device))


def _flat(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    return torch.cat([weight.reshape(-1) for weight in weights]) if weights else x.new_empty(1)


def _launched(
    call: Call, x: Tensor, context: Tensor | None, grads: Sequence[Tensor], weights: Sequence[Tensor],
    to: Sequence[Tensor], back: bool, sums: int,
) -> Tensor:  # fmt: skip
    """Launch the machine; return the sums of gradients of weights (programs, sums)."""
    rows, scratch = x.shape[0], call.code.places * ROWS.value
    programs = min(-(-rows // ROWS.value), MOST_PROGRAMS, max(1, MOST_MEMORY // (x.itemsize * (scratch + sums))))
    memory = x.new_empty(programs * scratch)
    partial = x.new_zeros(programs, sums) if sums else memory
    # no spills: three blocks of 128 threads per multiprocessor leave 168 registers each, two leave 255. float64: twice
    # the warps halve the elements per thread.
    wide = x.dtype == torch.float64
    warps, registers = 8 if wide else 4, 255 if wide or back else 168
    _launch.launch(
        machine_kernel, programs, x.device, call.table, call.code.steps, x.contiguous(),
        x if context is None else context.contiguous(), *grads, _flat(weights, x), memory, partial, *to,
        call.code.places, rows, sums, num_warps=warps, num_stages=1, maxnreg=registers,
        SPLINES=call.code.splines, BACK=back,
    )  # fmt: skip
    return partial


def flow_program(
    x: Tensor, context: Tensor | None, repeats: int, weights: list[Tensor], code: str, keep: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sizes = tuple([weight.numel() for weight in weights])
    y, logdet = x.new_empty(x.shape[0], len(Program.decode(code).outputs)), x.new_empty(x.shape[0])
    # its backward computes all of it again
    kept = x.new_empty(kept_shape(x.shape[0], keep))
    if x.shape[0] == 0:
        return y, logdet, kept
    call = _call(code, sizes, x.dtype, x.device)
    if call is None:
        for to, value in zip((y, logdet), ref.flow_program(x, context, repeats, weights, code)[:2], strict=True):
            to.copy_(value)
        return y, logdet, kept
    by_row = None if context is None else ref.of_rows(context, x.shape[0], repeats)
    _launched(call, x, by_row, (x, x), weights, (y, y, logdet), False, 0)
    return y, logdet, kept


def flow_program_backward(
    grad_y: Tensor | None,
    grad_logdet: Tensor | None,
    x: Tensor,
    context: Tensor | None,
    repeats: int,
    weights: list[Tensor],
    code: str,
    kept: Tensor | None,
    need_x: bool,
    need_context: bool,
    need_weights: bool,
) -> list[Tensor]:
    needs = need_x, need_context and context is not None, need_weights
    empty = x.new_empty(0)
    sizes = tuple([weight.numel() for weight in weights])
    call = _call(code, sizes, x.dtype, x.device, needs) if x.shape[0] else None
    if call is None:
        found = ref.flow_program_backward(grad_y, grad_logdet, x, context, repeats, weights, code, kept, *needs)
        return [empty if grad is None else grad.contiguous() for grad in found]
    outputs = len(Program.decode(code).outputs)
    given = [
        x.new_zeros(shape) if grad is None else grad.contiguous()
        for grad, shape in ((grad_y, (x.shape[0], outputs)), (grad_logdet, (x.shape[0],)))
    ]
    to_x = x.new_empty(x.shape) if needs[0] else empty
    by_row = None if context is None else ref.of_rows(context, x.shape[0], repeats)
    to_context = empty if by_row is None or not needs[1] else x.new_empty(by_row.shape)
    sums = sum(sizes) * need_weights
    partial = _launched(call, x, by_row, given, weights, (to_x, to_context, empty), True, sums)
    grads = [weight.new_empty(weight.shape if need_weights else 0) for weight in weights]
    if sums:
        each = partial.sum(0).split(sizes)
        grads = [part.view(weight.shape) for part, weight in zip(each, weights, strict=True)]
    if context is not None and need_context:
        to_context = ref.of_given(to_context, context, repeats)
    return [to_x, to_context, *grads]
