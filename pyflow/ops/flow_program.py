"""A whole flow in one call: a program over tiles of rows that stay in the caches from the first layer to the last."""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, get_args

import numpy as np
import torch
from torch import Tensor

from .. import _checks as check
from .._kept import columns_to_keep, kept_shape
from .._operators import register
from .._schemas import PRIORS, SCALE_MAPS, SPLINE_VARIANTS, TAILS
from .._torch import evaluated_while_traced
from ..program import (
    ACTIVATIONS,
    PACKINGS,
    Activation,
    Additive,
    Affine,
    Autoregressive,
    Columns,
    Context,
    Dense,
    Elementwise,
    Instruction,
    Linear,
    Multiplicative,
    Net,
    Norm,
    Part,
    Periodic,
    Prior,
    Program,
    Residual,
    Scale,
    Spline,
    Transform,
    Uniform,
    Wrap,
    number_levels,
)  # fmt: skip
from ..reference import flow_program as ref
from . import spline as splines

# as many residuals around a part as kernels have arrays for
_MOST_RESIDUALS = 13


def flow_program(
    x: Tensor, program: Program, weights: Sequence[Tensor], context: Tensor | None = None, repeats: int = 1
) -> tuple[Tensor, Tensor]:
    """Run a flow: y and the log-determinant of dy/dx, or with a `Prior` or a `Uniform` the log-density of x.

    Args:
        x: (B, D) with D = program.columns, float32 or float64, any strides.
        program: the instructions, see `pyflow.program`. `pyflow.flows.fuse` writes them for a module.
        weights: the tensors that the instructions name by their place; x's dtype and device, any strides.
        context: (R, program.context), x's dtype and device, or None. Row r of x has its row r // repeats % R: that of
            torch's `repeat_interleave` if R repeats = B, that of its `repeat` if repeats = 1, its own if R = B.
        repeats: how many rows of x next to each other share a row of the context; R repeats divides B.

    Returns:
        y (B, len(program.outputs)) and logdet (B,), both of x's dtype.

    Raises:
        TypeError: not a tensor, not a program, or another dtype.
        ValueError: a wrong shape or device; an instruction that does not fit the columns, the weights or the
            instruction before it.

    Notes:
        The rows of a tile, its log-determinants and the activations of its networks stay in the caches; nothing between
        two instructions goes to memory. In the backward every tile runs forward again, then back, so that x alone is
        kept. On a CPU the forward keeps for it the results of layers with 48 inputs or more and the columns after a
        transform, if these are at most 2^25 numbers (128 MB in float32): not under torch.compile or a transform of
        torch.func, within an autoregressive inverse, or where rows share a row of the context. Each group of rows of
        the backward has a sum as large as the weights, all together 64 MB or four times the weights. Up to 256 MB of
        such memory stay allocated for the next call.
        On a CPU (float32) a row has the same bits alone, in any batch, on any number of threads and for any instruction
        set.
        An autoregressive inverse evaluates every unit once, as soon as the columns are known that it depends on.
        Matrix products add their terms in order, one fused multiply-add after the other, starting from the bias, those
        of the context first where the first part of a net is a Dense. So what a net makes of the context alone has the
        same bits when it is made once for the rows that share a row of the context; the forward does so where that is
        less work than reading it for each of them, and if it takes at most 256 MB (float32). The backward makes it for
        every row of x, and sums their gradients of a row of the context in float64.
        Log-determinants are summed in float32 within an instruction and in float64 over instructions. Gradients of
        weights are summed over at most 16 groups of rows, which depend on B and the weights' sizes alone: the same bits
        for any number of threads. Double backward runs the plain-torch reference. autocast changes nothing.
        On a GPU one Triton kernel runs a table of steps, the same kernel for every program, and makes what nets make
        of the context for every row of x; a row has the same bits in any batch, but not those of a CPU: products are
        three of TF32 each, which leave the error of float32, and log-determinants are summed in float32, over
        instructions with the rounding errors of the sums. Its programs each sum gradients of weights over their
        tiles, 256 MB in all: the same bits in every run. The first call of a program on a device copies its table
        there, before a CUDA graph is captured. A program whose tile takes more than 16 MB of scratch and sums, or
        whose table takes 32 MB, and a GPU without Triton, run the reference.
        A second program of one compiled function needs torch.compile(dynamic=False) on torch 2.11, but not with `fuse`.

    Source:
        Layer by layer: Dinh et al. 2014, arXiv:1410.8516; Dinh et al. 2016, arXiv:1605.08803.

    Example:
        >>> from pyflow import program as p
        >>> net = p.Net((0,), False, (p.Dense(0, 1, 8, p.ACTIVATIONS.index("relu")), p.Dense(2, 3, 2)))
        >>> flow = p.Program(2, 0, (0, 1), (net, p.Affine((1,), scale_map=0, packing=0, map_arg=0.0)))
        >>> weights = [torch.ones(8, 1), torch.zeros(8), torch.zeros(2, 8), torch.tensor([1.0, 2.0])]
        >>> y, logdet = flow_program(torch.tensor([[1.0, 1.0]]), flow, weights)
        >>> y, logdet  # 1 e^2 + 1
        (tensor([[1.0000, 8.3891]]), tensor([2.]))
    """
    op = "flow_program"
    _two_dims(op, "x", x)
    if not isinstance(program, Program):
        raise TypeError(f"{op}: program must be a pyflow.program.Program, got {type(program).__name__}")
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"{op}: weights must be a list, got {type(weights).__name__}")
    for name, count in (("columns", program.columns), ("context", program.context)):
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"{op}: program: {name} must be an integer of at least 0, got {check.shown(count)}")
    if x.shape[1] != program.columns:
        raise ValueError(f"{op}: x must have {program.columns} columns, got {x.shape[1]}")
    if not isinstance(repeats, torch.SymInt):
        repeats = check.at_least(op, "repeats", repeats, 1)
    if program.context == 0 and context is not None:
        raise ValueError(f"{op}: context must be None for a program without, got {type(context).__name__}")
    given = [(f"weights[{i}]", weight) for i, weight in enumerate(weights)]
    if program.context:
        _two_dims(op, "context", context)
        assert context is not None
        rows = context.shape[0]
        if context.shape[1] != program.context:
            raise ValueError(f"{op}: context must have {program.context} columns, got {context.shape[1]}")
        if rows * repeats != x.shape[0] and (rows == 0 or x.shape[0] % (rows * repeats) != 0):
            raise ValueError(
                f"{op}: rows of context times repeats must divide the rows of x, {x.shape[0]}, got {rows} times "
                f"{repeats}"
            )
        given.append(("context", context))
    for name, value in given:
        check.tensor(op, name, value)
        if value.dtype != x.dtype:
            raise TypeError(
                f"{op}: {name} must have the dtype of x, {check.short(x.dtype)}, got {check.short(value.dtype)}"
            )
        if value.device != x.device:
            raise ValueError(f"{op}: {name} must be on the device of x, {x.device}, got {value.device}")
    if not isinstance(program.instructions, tuple):
        raise ValueError(f"{op}: instructions must be a tuple, got {type(program.instructions).__name__}")
    code = code_of(program, weights)
    if (operator := _run.pick(op, x)) is _run:
        return run(x, context, repeats, list(weights), code)
    y, logdet, _ = operator(x, context, repeats, list(weights), code, 0)
    return y, logdet


def run(x: Tensor, context: Tensor | None, repeats: int, weights: list[Tensor], code: str) -> tuple[Tensor, Tensor]:
    """Run the kernel for arguments that were checked."""
    y, logdet, _ = _run(x, context, repeats, weights, code, columns_to_keep(x, context, weights, code))
    return y, logdet


def code_of(program: Program, weights: Sequence[Tensor]) -> str:
    """Return the text of a program, held to its columns and to the shapes of its weights."""
    code, shapes = _laid(program, len(weights))
    for where, place, shape in shapes:
        found = weights[place].shape
        # dynamo of torch 2.11 does not compare a shape with a tuple that it has evaluated
        if len(found) != len(shape) or not all([a == b for a, b in zip(found, shape, strict=True)]):
            raise ValueError(f"flow_program: {where} must have the shape {shape}, got {tuple(found)}")
    return code


def _two_dims(op: str, name: str, value: Any) -> None:
    check.tensor(op, name, value)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: {name} must be float32 or float64, got {check.short(value.dtype)}")
    if value.dim() != 2:
        raise ValueError(f"{op}: {name} must have two dims, got shape {tuple(value.shape)}")


class _Checker:
    """Holds the instructions of a program to its columns and to the number of weights.

    `params` is how many numbers the last conditioner returns, `shapes` the weights that instructions name: what for,
    place and shape; `masked` weights, `constants`, `tables` and those that stand `alone` must not be used otherwise.
    """

    def __init__(self, program: Program, count: int) -> None:
        self.program, self.count, self.params, self.where = program, count, 0, ""
        self.residuals = 0  # around a part
        self.shapes: list[tuple[str, int, tuple[int, ...]]] = []
        self.masked: list[tuple[str, int]] = []
        self.constants: list[tuple[str, int]] = []
        self.alone: list[tuple[str, int]] = []
        self.tables: list[tuple[str, int]] = []

    def fail(self, rule: str) -> NoReturn:
        raise ValueError(f"flow_program: {self.where}: {rule}")

    def columns(self, columns: Any, unique: bool = True) -> int:
        return self.named(columns, self.program.columns, unique)

    def named(self, columns: Any, count: int, unique: bool = True) -> int:
        """Return how many of `count` columns are named."""
        if not isinstance(columns, tuple) or not all(isinstance(c, int) for c in columns):
            self.fail(f"columns must be a tuple of integers, got {check.shown(columns)}")
        if not all(0 <= c < count for c in columns):
            self.fail(f"columns must be 0 to {count - 1}, got {check.shown(columns)}")
        if unique and len(set(columns)) != len(columns):
            self.fail(f"columns must differ, got {check.shown(columns)}")
        return len(columns)

    def weight(self, name: str, place: Any, shape: tuple[int, ...], optional: bool = True) -> None:
        if place == -1 and optional:
            return
        if not isinstance(place, int) or not 0 <= place < self.count:
            self.fail(f"{name} must be the place of one of {self.count} weights, got {check.shown(place)}")
        self.shapes.append((f"{self.where}: {name}", place, shape))

    def uses(self) -> None:
        """Hold weights with a mask to one use, and constants and the numbers of splines to uses of their kind."""
        named = collections.Counter(place for _, place, _ in self.shapes)
        for where, place in self.masked:
            if named[place] > 1:
                raise ValueError(f"flow_program: {where}: a weight with a mask must be named once, got {named[place]}")
        for where, place in self.alone:
            if named[place] > 1:
                raise ValueError(f"flow_program: {where} must be named once in the program, got {named[place]} times")
        for what, uses in (("a mask or scale", self.constants), ("the params of a spline", self.tables)):
            own = collections.Counter(place for _, place in uses)
            for where, place in uses:
                if named[place] > own[place]:
                    raise ValueError(f"flow_program: {where}: {what} must be no other weight, got {place}")

    def takes(self, count: int) -> None:
        if self.params != count:
            self.fail(f"the conditioner before it must return {count} numbers, got {self.params}")
        # a conditioner serves one transform
        self.params = 0

    def index(self, name: str, value: Any, names: tuple[str, ...]) -> None:
        if not isinstance(value, int) or not 0 <= value < len(names):
            self.fail(f"{name} must be 0 to {len(names) - 1}, got {check.shown(value)}")

    def number(self, name: str, value: Any) -> None:
        if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            self.fail(f"{name} must be a number, at least 0 and finite, got {check.shown(value)}")

    def flags(self, instruction: Any, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(instruction, name), int):
                self.fail(f"{name} must be true or false, got {check.shown(getattr(instruction, name))}")

    def scale(self, scale: Scale) -> None:
        n = self.columns(scale.columns)
        self.weight("shift", scale.shift, (n,))
        self.weight("log_scale", scale.log_scale, (n,))
        self.flags(scale, "shift_first", "inverse")

    def linear(self, linear: Linear) -> None:
        n = self.columns(linear.columns)
        self.weight("weight", linear.weight, (n, n), False)
        self.weight("bias", linear.bias, (n,))
        self.weight("logdet", linear.logdet, ())

    def wrap(self, wrap: Wrap) -> None:
        n = self.columns(wrap.columns)
        self.some("bound", wrap.bound, (1, n))
        self.some("shift", wrap.shift, (1, n))
        self.bounds(wrap.bound)
        for shift in wrap.shift:
            self.number("shift", abs(shift) if isinstance(shift, (int, float)) else shift)
        self.flags(wrap, "inverse")

    def some(self, name: str, given: Any, counts: tuple[int, ...]) -> None:
        if not isinstance(given, tuple) or len(given) not in counts:
            few = "none, one" if 0 in counts else "one"
            self.fail(f"{name} must be a tuple of {few} or one per column, got {check.shown(given)}")

    def bounds(self, bounds: tuple[Any, ...]) -> None:
        try:
            for bound in bounds:
                splines.one_bound(f"flow_program: {self.where}", bound, torch.float32)
        except TypeError as error:
            raise ValueError(*error.args) from None

    def net(self, net: Net) -> None:
        size = self.columns(net.columns, unique=False)
        self.flags(net, "context")
        if net.context and not self.program.context:
            self.fail("context must be false in a program without context")
        if net.context:
            size += self.program.context
        size = self.parts(net.parts, size)
        if self.params:
            self.fail("a transform must take what the conditioner before it returns")
        self.params = size

    def parts(self, parts: Any, size: int) -> int:
        """Return how many numbers the parts of a net return for `size` of them."""
        if not isinstance(parts, tuple) or not parts:
            self.fail(f"parts must be a tuple of at least one, got {check.shown(parts)}")
        for part in parts:
            if type(part) not in _PARTS:
                self.fail(f"parts must be of pyflow.program's parts of a net, got {check.shown(part)}")
            size = getattr(self, f"{type(part).__name__.lower()}_part")(part, size)
        return size

    def dense_part(self, dense: Any, inputs: int) -> int:
        if not isinstance(dense, Dense) or not isinstance(dense.size, int) or dense.size < 1:
            self.fail(f"a layer must be Dense of at least one output, got {check.shown(dense)}")
        self.weight("weight", dense.weight, (dense.size, inputs), False)
        self.weight("bias", dense.bias, (dense.size,))
        self.weight("mask", dense.mask, (dense.size, inputs))
        if dense.mask >= 0:
            self.masked.append((self.where, dense.weight))
            self.constants.append((self.where, dense.mask))
        self.activation_part(dense, inputs)
        return dense.size

    def activation_part(self, part: Activation | Dense, size: int) -> int:
        self.index("activation", part.activation, ACTIVATIONS)
        self.number("arg", part.arg)
        return size

    def residual_part(self, residual: Residual, size: int) -> int:
        self.residuals += 1
        if self.residuals > _MOST_RESIDUALS:
            self.fail(f"residuals must be nested at most {_MOST_RESIDUALS} deep, got more")
        inner = self.parts(residual.parts, size)
        self.residuals -= 1
        if inner != size:
            self.fail(f"the parts of a Residual must return as many numbers as they take, {size}, got {inner}")
        return size

    def context_part(self, context: Context, size: int) -> int:
        self.flags(context, "gate")
        if not self.program.context:
            self.fail("there must be no Context in a program without context")
        inner = self.dense_part(context.dense, self.program.context)
        if inner != size:
            self.fail(f"a Context must return {size} numbers, as many as it meets, got {inner}")
        return size

    def norm_part(self, norm: Norm, size: int) -> int:
        self.weight("weight", norm.weight, (size,))
        self.weight("bias", norm.bias, (size,))
        self.number("eps", norm.eps)
        self.flags(norm, "unbiased")
        return size

    def elementwise_part(self, elementwise: Elementwise, size: int) -> int:
        self.weight("factor", elementwise.factor, (size,))
        self.weight("shift", elementwise.shift, (size,))
        return size

    def periodic_part(self, periodic: Periodic, size: int) -> int:
        n = self.named(periodic.columns, size)
        self.weight("scale", periodic.scale, (n,), False)
        self.weight("sine", periodic.sine, (n,), False)
        self.weight("cosine", periodic.cosine, (n,), False)
        self.weight("bias", periodic.bias, (n,))
        self.constants.append((self.where, periodic.scale))
        return size

    def additive(self, additive: Additive) -> None:
        self.takes(self.columns(additive.columns))
        self.flags(additive, "inverse")

    def multiplicative(self, multiplicative: Multiplicative) -> None:
        self.takes(self.columns(multiplicative.columns))
        self.flags(multiplicative, "inverse")

    def affine(self, affine: Affine) -> None:
        self.takes(2 * self.columns(affine.columns))
        self.index("scale_map", affine.scale_map, SCALE_MAPS)
        self.index("packing", affine.packing, PACKINGS)
        self.number("map_arg", affine.map_arg)
        if SCALE_MAPS[affine.scale_map] in ("tanh", "atan", "softsign") and affine.map_arg == 0:
            self.fail(f"map_arg must be positive for {SCALE_MAPS[affine.scale_map]}, got 0.0")
        self.flags(affine, "shift_first", "inverse")

    def spline(self, spline: Spline) -> None:
        n, bins, most = self.columns(spline.columns), spline.bins, splines.MOST_BINS
        if n == 0:
            self.fail("columns must be at least one, got ()")
        if not isinstance(bins, int) or not 2 <= bins <= most:
            self.fail(f"bins must be an integer, 2 to {most}, got {check.shown(bins)}")
        self.some("tails", spline.tails, (0, 1, n))
        self.some("bound", spline.bound, (1, n))
        for tail in spline.tails:
            self.index("tails", tail, TAILS)
        # linear tails need no outer slopes, circular ones have equal ones
        fits = (bins + 1,) if len({*spline.tails}) != 1 else (bins - 1 + spline.tails[0], bins + 1)
        if spline.slopes not in fits:
            self.fail(f"slopes must be {' or '.join(map(str, fits))} with these bins and tails, got {spline.slopes!r}")
        self.index("variant", spline.variant, SPLINE_VARIANTS)
        self.bounds(spline.bound)
        try:
            op = f"flow_program: {self.where}"
            splines.constants(op, bins, SPLINE_VARIANTS[spline.variant], *spline[6:9], torch.float32)
        except TypeError as error:
            raise ValueError(*error.args) from None
        if spline.params == -1:
            self.takes(n * (2 * bins + spline.slopes))
        else:
            self.weight("params", spline.params, (n, 2 * bins + spline.slopes))
            self.tables.append((self.where, spline.params))
        self.flags(spline, "inverse", "zero_outside", "turned")
        for name in ("zero_outside", "turned"):
            if getattr(spline, name) and not spline.tails:
                self.fail(f"{name} must be false without tails, got True")

    def autoregressive(self, inverse: Autoregressive) -> None:
        net, transform = inverse.net, inverse.transform
        if type(net) is not Net or type(transform) not in get_args(Transform):
            self.fail(f"net and transform must be a Net and an Affine or a Spline, got {check.shown((net, transform))}")
        if getattr(transform, "params", -1) != -1:
            self.fail("its net must return the numbers of its Spline")
        # a conditioner before it may serve a transform after it
        params, self.params, first = self.params, 0, len(self.shapes)
        self.net(net)
        getattr(self, type(transform).__name__.lower())(transform)
        self.params = params
        # kernels have their gradients in another order
        self.alone += [(where, place) for where, place, _ in self.shapes[first:]]
        n = len(transform.columns)
        self.whole("generations", inverse.generations, n, 1, n)
        if not isinstance(inverse.levels, tuple):
            self.fail(f"levels must be a tuple of tuples, got {check.shown(inverse.levels)}")
        generation = dict(zip(transform.columns, inverse.generations, strict=True))
        of_inputs = [generation.get(column, 0) for column in net.columns] + [0] * (self.program.context * net.context)
        levels = iter((*inverse.levels, number_levels(inverse)))
        found = self.levels(net.parts, of_inputs, levels, max(inverse.generations, default=0), net.parts[0])
        if next(levels, None) is not None:
            self.fail("there must be levels for every Dense of the net but the last, got more")
        if found != [*number_levels(inverse)]:
            self.fail("the numbers of a column must have its generation less 1 as level")

    def levels(
        self, parts: tuple[Part, ...], levels: list[int], more: Iterator[Columns], most: int, first: Part | None = None
    ) -> list[int]:
        """Return the levels of what the parts return."""
        for part in parts:
            if isinstance(part, Dense):
                given = next(more, None)
                if given is None:
                    self.fail("there must be levels for every Dense of the net but the last, got fewer")
                self.whole("levels", given, part.size, 0, most)
                levels = [*given]
            elif isinstance(part, Residual):
                if self.levels(part.parts, levels, more, most) != levels:
                    self.fail("the parts of a Residual must leave the levels as they are")
            elif isinstance(part, Norm) or (isinstance(part, Periodic) and part is not first):
                self.fail(f"its net must have no {type(part).__name__} here")
        return levels

    def whole(self, name: str, values: Any, count: int, least: int, most: int) -> None:
        fit = isinstance(values, tuple) and len(values) == count
        if not fit or not all(isinstance(v, int) and least <= v <= most for v in values):
            self.fail(f"{name} must be {count} integers from {least} to {most}, got {check.shown(values)}")

    def prior(self, prior: Prior) -> None:
        self.columns(prior.columns)
        self.index("prior", prior.prior, PRIORS)

    def uniform(self, uniform: Uniform) -> None:
        n = self.columns(uniform.columns)
        self.some("low", uniform.low, (1, n))
        self.some("high", uniform.high, (1, n))
        for low, high in uniform.sides:
            if not is_side(low, high):
                ends = f"{check.shown(low)} and {check.shown(high)}"
                self.fail(f"low must be less than high, both finite in float32, got {ends}")
        self.flags(uniform, "closed")


def is_side(low: Any, high: Any) -> bool:
    """Whether two numbers are the ends of a side of a box, in float32 too."""
    most = torch.finfo(torch.float32).max
    numbers = isinstance(low, (int, float)) and isinstance(high, (int, float))
    return numbers and -most <= low < high <= most and bool(np.float32(low) < np.float32(high))


_KINDS, _PARTS = get_args(Instruction), get_args(Part)


@evaluated_while_traced
def _laid(program: Program, count: int) -> tuple[str, list[tuple[str, int, tuple[int, ...]]]]:
    """Return the program's text and the shapes of its weights, once it is checked."""
    kinds = tuple(map(type, program.instructions))
    try:
        hash(program)
    except TypeError:
        # something is a list, which the check names
        return _lay.__wrapped__(program, kinds, count)
    return _lay(program, kinds, count)


# tuples of other instructions may be equal, their kinds are not
@functools.lru_cache(maxsize=256)
def _lay(program: Program, kinds: tuple, count: int) -> tuple[str, list[tuple[str, int, tuple[int, ...]]]]:
    checker = _Checker(program, count)
    checker.where = "outputs"
    checker.columns(program.outputs, unique=False)
    for i, (instruction, kind) in enumerate(zip(program.instructions, kinds, strict=True)):
        checker.where = f"instruction {i}, {kind.__name__}"
        if kind not in _KINDS:
            checker.fail("it must be one of pyflow.program's instructions")
        getattr(checker, kind.__name__.lower())(instruction)
    if checker.params:
        checker.fail("a transform must take what the last conditioner returns")
    checker.uses()
    return program.encode(), checker.shapes


# registration with torch


def _fake(x, context, repeats, weights, code, keep):
    rows, outputs = x.shape[0], Program.decode(code).outputs
    return x.new_empty(rows, len(outputs)), x.new_empty(rows), x.new_empty(kept_shape(rows, keep))


def _backward_fake(grad_y, grad_logdet, x, context, repeats, weights, code, kept, need_x, need_context, need_weights):
    needed = [need_x, need_context and context is not None, *(need_weights for _ in weights)]
    every = [x, context, *weights]
    return [v.new_empty(v.shape) if need else x.new_empty(0) for need, v in zip(needed, every, strict=True)]


_run_backward = register(
    "flow_program_backward", "flow_program", reference=ref.flow_program_backward, fake=_backward_fake, cuda=False,
)  # fmt: skip


def _gradients(grad_y, grad_logdet, x, context, repeats, weights, code, kept, needs):
    need_x, need_context, _, need_weights, *_ = needs
    some = any(need_weights)
    backward = _run_backward.for_gradients(grad_y, grad_logdet)
    need_context = need_context and context is not None
    grad_x, grad_context, *grads = backward(
        grad_y, grad_logdet, x, context, repeats, weights, code, kept, need_x, need_context, some
    )
    unused = _unused(code, len(weights)) if some else range(len(weights))
    # None, as autograd has it: an optimizer leaves such a weight alone
    of_weights = [None if i in unused else grad for i, grad in enumerate(grads)] if unused else grads
    return {"x": grad_x, "context": grad_context, "weights": of_weights}


@functools.lru_cache(maxsize=256)
def _unused(code: str, count: int) -> frozenset[int]:
    """Return the places of weights that no instruction names."""
    named = {place for _, place, _ in _laid(Program.decode(code), count)[1]}
    return frozenset(range(count)) - named


_run = register(
    "flow_program", "flow_program", reference=ref.flow_program, fake=_fake, backward=_gradients, cuda=False,
)  # fmt: skip


def warmup(x: Tensor, **other: Any) -> list[Tensor]:
    if x.dtype not in (torch.float32, torch.float64):
        return []
    net = Net((0,), False, (Dense(0, -1, 2),))
    program = Program(2, 0, (0, 1), (net, Affine((1,), 0, 0, 0.0)))
    weight = x.new_zeros(2, 1)
    return list(flow_program(x[:, :2], program, [weight]))
