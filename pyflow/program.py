"""Programs of flows: the instructions that `pyflow.ops.flow_program` runs on tiles of rows.

The state of a row is its D columns, its log-determinant and the output of its last conditioner. Instructions run in
order; a permutation is no instruction, but another order of the columns that the instructions after it name.
"""

from __future__ import annotations

import functools
import math
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, get_args, get_type_hints

from . import _schemas
from ._schemas import ACTIVATIONS as ACTIVATIONS
from ._torch import evaluated_while_traced

Columns = tuple[int, ...]
# those of couplings, and pairs with the scale first
PACKINGS = (*_schemas.PACKINGS, "interleaved_scale_shift")


class Scale(NamedTuple):
    """x_c = x_c exp(log_scale_c) + shift_c for some columns, or (x_c + shift_c) exp(log_scale_c); inverse: solved.

    Attributes:
        columns: which columns.
        shift, log_scale: place of a tensor (len(columns),) among the weights, -1 for none.
        shift_first: the second form.
        inverse: the inverse map.
    """

    columns: Columns
    shift: int
    log_scale: int
    shift_first: bool = False
    inverse: bool = False


class Linear(NamedTuple):
    """x = W x + b for some columns, logdet += logdet.

    Attributes:
        columns: which columns, n.
        weight, bias, logdet: places of tensors (n, n), (n,) and () among the weights; -1 for no bias, or no logdet.
    """

    columns: Columns
    weight: int
    bias: int = -1
    logdet: int = -1


class Wrap(NamedTuple):
    """x_c = (x_c + shift_c + bound_c) mod 2 bound_c - bound_c for some columns; inverse: with -shift_c.

    Exact for up to 2^22 periods in float32. The gradient is that of x + shift.

    Attributes:
        columns: which columns.
        bound, shift: one for all columns, or one per column; > 0 and finite.
        inverse: the inverse map, within the bound.
    """

    columns: Columns
    bound: tuple[float, ...]
    shift: tuple[float, ...] = (0.0,)
    inverse: bool = False


class Dense(NamedTuple):
    """Part of a `Net`: h = act(W h + b), with (mask * W) h if there is a mask.

    Attributes:
        weight, bias: places of tensors (size, inputs) and (size,) among the weights; -1 for no bias.
        size: number of outputs.
        activation: index into ACTIVATIONS.
        arg: negative slope of leaky_relu, alpha of elu.
        mask: place of a tensor of the weight's shape; -1 for none. It is constant: it gets no gradient.
    """

    weight: int
    bias: int
    size: int
    activation: int = 0
    arg: float = 0.0
    mask: int = -1


class Activation(NamedTuple):
    """Part of a `Net`: h = act(h), see `Dense`."""

    activation: int
    arg: float = 0.0


class Residual(NamedTuple):
    """Part of a `Net`: h = h + parts(h)."""

    parts: tuple[Part, ...]


class Context(NamedTuple):
    """Part of a `Net`: h = h + act(W c + b) with the context c, or with a gate h = h act(W c + b)."""

    dense: Dense
    gate: bool = False


class Norm(NamedTuple):
    """Part of a `Net`: h = (h - mean) / sqrt(variance + eps) * weight + bias, over the numbers of h.

    Attributes:
        weight, bias: places of tensors (size,); -1 for none.
        eps: > 0.
        unbiased: whether the variance divides by size - 1.
    """

    weight: int
    bias: int
    eps: float
    unbiased: bool = False


class Elementwise(NamedTuple):
    """Part of a `Net`: h = factor h + shift.

    Attributes:
        factor, shift: places of tensors (size,); -1 for none.
    """

    factor: int
    shift: int


class Periodic(NamedTuple):
    """Part of a `Net`: h_i = sine sin(scale h_i) + cosine cos(scale h_i) + bias for some of its numbers.

    Attributes:
        columns: which numbers of h, n.
        scale, sine, cosine, bias: places of tensors (n,); -1 for no bias. The scale is constant: no gradient.
    """

    columns: Columns
    scale: int
    sine: int
    cosine: int
    bias: int = -1


Part = typing.Union[Dense, Activation, Residual, Context, Norm, Elementwise, Periodic]  # noqa: UP007


class Net(NamedTuple):
    """A conditioner: computes, from some columns and the context, the numbers that one later transform takes.

    Attributes:
        columns: the inputs of the first part.
        context: whether the context's columns are further inputs, after the others.
        parts: at least one; the first reads the inputs.
    """

    columns: Columns
    context: bool
    parts: tuple[Part, ...]


class Additive(NamedTuple):
    """x_c = x_c + shift_c (inverse: minus), the shifts from the last conditioner."""

    columns: Columns
    inverse: bool = False


class Multiplicative(NamedTuple):
    """x_c = x_c exp(scale_c) (inverse: exp(-scale_c)), the scales from the last conditioner."""

    columns: Columns
    inverse: bool = False


class Affine(NamedTuple):
    """x_c = x_c exp(g(scale_c)) + shift_c, shifts and scales from the last conditioner; see `affine_coupling_packed`.

    Attributes:
        columns: which columns.
        scale_map, packing: indices into SCALE_MAPS and PACKINGS.
        map_arg: the constant of the scale map.
        shift_first, inverse: as for `pyflow.ops.affine_coupling`.
    """

    columns: Columns
    scale_map: int
    packing: int
    map_arg: float
    shift_first: bool = False
    inverse: bool = False


class Spline(NamedTuple):
    """x_c = the rational-quadratic spline of x_c, see `pyflow.ops.rq_spline`.

    Attributes:
        columns: which columns, n >= 1.
        bins: K, 2 to 32.
        slopes: how many of the numbers of a column are slopes: K - 1 if tails are linear, K if they are circular, or
            K + 1, of which linear columns do not use the outer ones, circular columns the last.
        tails: indices into TAILS, one for all columns or one per column; () without tails: the domain and range are
            [0, 1], the result is NaN outside, and there are K + 1 slopes.
        variant: index into SPLINE_VARIANTS.
        bound: one for all columns, or one per column; not used without tails.
        param_scale, min_bin, min_slope: as for `pyflow.ops.rq_spline`.
        params: place of a tensor (n, 2 K + slopes) of weights, the numbers of the columns in all rows; no other kind of
            instruction may name it. -1: the last conditioner returns them, those of a column next to each other.
        inverse: the inverse map.
        zero_outside: whether the result is 0 outside of the bound, as normflows' with a list of tails, and not x.
        turned: whether it is of x mod 2 bound - bound, as zuko's circular ones; the inverse returns that of its result.
    """

    columns: Columns
    bins: int
    slopes: int
    tails: tuple[int, ...]
    variant: int
    bound: tuple[float, ...]
    param_scale: float = 1.0
    min_bin: float = 1e-3
    min_slope: float = 1e-3
    params: int = -1
    inverse: bool = False
    zero_outside: bool = False
    turned: bool = False


# get_args of Python 3.10 takes no X | Y
Transform = typing.Union[Affine, Spline]  # noqa: UP007


class Autoregressive(NamedTuple):
    """x solves x_c = transform(y_c; net(x)) for the transform's columns, one generation of columns after the other.

    The masks of the net must let the numbers of a column depend on columns of lower generation alone. Parts of the net
    are Dense, Activation, Residual, Context, Elementwise and, as the first, Periodic. Every unit is evaluated once,
    when the columns up to its level are known.

    Attributes:
        net, transform: as they would follow each other; the transform is the map from y to x.
        generations: of each of the transform's columns, from 1 on; 0 is that of all other columns and of the context.
        levels: of the units of each Dense of the net but the last, in the order of the parts, contexts left out: at
            least the highest generation that a unit depends on. A Residual leaves them as they are. The numbers of a
            column have its generation less 1.
    """

    net: Net
    transform: Transform
    generations: Columns
    levels: tuple[Columns, ...]

    @property
    def columns(self) -> Columns:
        return self.transform.columns


class Prior(NamedTuple):
    """logdet += log-density of some columns under a standard prior, an index into PRIORS."""

    columns: Columns
    prior: int = 0


class Uniform(NamedTuple):
    """logdet += log-density of some columns in a box: -sum of log(high_c - low_c), -inf for a row outside.

    The gradient is 0.

    Attributes:
        columns: which columns.
        low, high: one for all columns, or one per column; low < high, finite, in float32 too.
        closed: the box is [low, high] and NaN is inside, as in normflows; else [low, high), and NaN is outside, as in
            torch.distributions.
    """

    columns: Columns
    low: tuple[float, ...]
    high: tuple[float, ...]
    closed: bool = False

    @property
    def sides(self) -> list[tuple[float, float]]:
        """(low, high) of every column."""
        n = len(self.columns)
        low, high = (ends * n if len(ends) == 1 else ends for ends in (self.low, self.high))
        return [*zip(low, high, strict=True)]

    @property
    def log_density(self) -> float:
        """Inside of the box."""
        return -sum(math.log(high - low) for low, high in self.sides)


def columns_of_numbers(transform: Transform) -> list[int]:
    """Return which of the transform's columns each number of its conditioner is for, by their place."""
    n = len(transform.columns)
    if isinstance(transform, Spline):
        return [i for i in range(n) for _ in range(2 * transform.bins + transform.slopes)]
    if PACKINGS[transform.packing].startswith("interleaved"):
        return [i // 2 for i in range(2 * n)]
    return [i % n for i in range(2 * n)]


def some_columns(transform: Transform, places: Sequence[int]) -> Transform:
    """Return the transform of some of its columns, by their place."""

    def some(values: tuple) -> tuple:
        return tuple([values[place] for place in places]) if len(values) == len(transform.columns) else values

    columns = some(transform.columns)
    if isinstance(transform, Affine):
        return transform._replace(columns=columns)
    return transform._replace(columns=columns, tails=some(transform.tails), bound=some(transform.bound))


def number_levels(inverse: Autoregressive) -> Columns:
    """Return the levels of the numbers that the net of an autoregressive inverse returns."""
    return tuple(inverse.generations[i] - 1 for i in columns_of_numbers(inverse.transform))


# get_args of Python 3.10 takes no X | Y
Instruction = typing.Union[  # noqa: UP007
    Scale, Linear, Wrap, Net, Additive, Multiplicative, Affine, Spline, Autoregressive, Prior, Uniform
]
_NAMED = {union: {kind.__name__.lower(): kind for kind in get_args(union)} for union in (Instruction, Part, Transform)}


class Program(NamedTuple):
    """What `pyflow.ops.flow_program` runs.

    Attributes:
        columns: D, the columns of x and of the state.
        context: columns of the context, 0 for none.
        outputs: which column of the state is each column of y; empty if y is not needed.
        instructions: in order.
    """

    columns: int
    context: int
    outputs: Columns
    instructions: tuple[Instruction, ...]

    def encode(self) -> str:
        """Return the text that the operator takes: words between spaces.

        An integer or a flag is one number, a tuple its length and its items, columns and other integers the number of
        their runs and (first, step, count) of each, an instruction or a part of a net its name and its fields.
        """
        return " ".join(_encode(self, Program))

    @staticmethod
    def decode(code: str) -> Program:
        return _of(code)


@evaluated_while_traced
def _of(code: str) -> Program:
    return _decoded(code)


@functools.lru_cache(maxsize=256)
def _decoded(code: str) -> Program:
    words = iter(code.split())
    try:
        program = _decode(words, Program)
    except (KeyError, StopIteration, RuntimeError, ValueError):
        # within a generator StopIteration is a RuntimeError
        raise ValueError(f"Program.decode: code is no program, got {code!r}") from None
    if next(words, None) is not None:
        raise ValueError(f"Program.decode: code is no program, got {code!r}")
    return program


def runs_of(columns: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return columns as runs (first, step, count)."""
    runs: list[tuple[int, int, int]] = []
    for column in columns:
        if runs:
            first, step, count = runs[-1]
            if count == 1 or column == first + step * count:
                runs[-1] = first, column - first if count == 1 else step, count + 1
                continue
        runs.append((column, 1, 1))
    return runs


@functools.cache
def _fields(kind: Any) -> list[Any]:
    return list(get_type_hints(kind).values())


def _encode(value: Any, kind: Any) -> Iterator[str]:
    if kind in _NAMED:
        kind = type(value)
        yield kind.__name__.lower()
    if kind in (int, bool):
        yield str(int(kind(value)))
    elif kind is float:
        yield repr(float(value) + 0.0)  # equal programs have one text: no -0.0
    elif kind == Columns:
        runs = runs_of(value)
        yield str(len(runs))
        yield from (str(int(number)) for run in runs for number in run)
    elif typing.get_origin(kind) is tuple:
        yield str(len(value))
        for item in value:
            yield from _encode(item, get_args(kind)[0])
    else:
        for item, of in zip(value, _fields(kind), strict=True):
            yield from _encode(item, of)


def _decode(code: Iterator[str], kind: Any) -> Any:
    if kind in _NAMED:
        kind = _NAMED[kind][next(code)]
    if kind in (int, bool, float):
        return kind(int(next(code))) if kind is bool else kind(next(code))
    if kind == Columns:
        runs = [[int(next(code)) for _ in range(3)] for _ in range(int(next(code)))]
        return tuple(first + step * i for first, step, count in runs for i in range(count))
    if typing.get_origin(kind) is tuple:
        return tuple(_decode(code, get_args(kind)[0]) for _ in range(int(next(code))))
    return kind(*(_decode(code, of) for of in _fields(kind)))
