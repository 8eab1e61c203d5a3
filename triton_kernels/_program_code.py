"""Compiles a program of a flow to steps, see _program.py. Every column of every step is a value, written once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from .._schemas import PRIORS, SCALE_MAPS, SPLINE_VARIANTS
from ..program import (
    PACKINGS,
    Activation,
    Additive,
    Affine,
    Autoregressive,
    Context,
    Dense,
    Elementwise,
    Linear,
    Multiplicative,
    Net,
    Norm,
    Part,
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
from ._program import CONTEXT, FACTOR, MAPS, X
from ._spline import FREE

ZERO = 0  # a value of every program
PLACES = ("a", "b", "c", "g", "out", "out_b", "out_c", "log")
WRITTEN = frozenset(("out", "out_b", "out_c"))
Values = tuple[int, ...]


class Step:
    """A step before it has places: `values` by the names of PLACES, `lists` of numbers, other `words`, and floats."""

    def __init__(
        self,
        kind: str,
        values: dict[str, Values],
        lists: dict[str, tuple],
        words: dict[str, int],
        floats: Sequence[float],
    ) -> None:
        self.kind, self.values, self.lists, self.words, self.floats = kind, values, lists, words, floats
        # a step forward writes its part of logdet, a step back reads the gradient
        self.adds = not kind.endswith("_back")

    def written(self, name: str) -> bool:
        return name in WRITTEN or (name == "log" and self.adds)

    def reads(self) -> Iterator[int]:
        return (v for name, values in self.values.items() if not self.written(name) for v in values)

    def writes(self) -> Iterator[int]:
        return (v for name, values in self.values.items() if self.written(name) for v in values)


class State:
    """What a part of a net has computed: an output is None until its level is reached."""

    def __init__(self, size: int, levels: Sequence[int] | None, inner: list[State]) -> None:
        self.out: list[int | None] = [None] * size
        self.levels, self.inner = levels, inner


class Builder:
    """Writes the steps of a program.

    Args:
        offsets: of each weight among all.
    """

    def __init__(self, program: Program, offsets: Sequence[int]) -> None:
        self.program, self.offsets = program, offsets
        self.count = 0
        self.steps: list[Step] = []
        self.sums: list[int] = []  # values that join logdet
        self.numbers: list[int] = []  # of the last conditioner
        self.add("fill", self.fresh(1), 0.0)
        self.state = list(self.load(X.value, program.columns, range(program.columns)))
        self.context = list(self.load(CONTEXT.value, program.context, range(program.context)))

    def fresh(self, count: int) -> Values:
        self.count += count
        return tuple(range(self.count - count, self.count))

    def add(self, kind: str, out: Sequence[int], *floats: float, n: int | None = None, **given: Any) -> Values:
        """Add a step. `given`: values, lists of numbers, places of weights or numbers, by the names of fields."""
        values = {name: tuple(v) for name, v in given.items() if name in PLACES and v}
        lists = {name: tuple(v) for name, v in given.items() if name in ("rows", "cols")}
        words = {name: int(v) for name, v in given.items() if name not in PLACES and name not in lists}
        for name in ("weight", "bias", "mask", "more"):
            if words.get(name, -1) >= 0:
                words[name] = self.offsets[words[name]]
        if out:
            values["out"] = tuple(out)
        words["n"] = len(out) if n is None else n
        self.steps.append(Step(kind, values, lists, words, floats))
        return tuple(out)

    def load(self, source: int, pitch: int, columns: Sequence[int]) -> Values:
        if not columns:
            return ()
        return self.add("load", self.fresh(len(columns)), form=source, pitch=pitch, cols=columns)

    def sum_of(self) -> Values:
        """A new value that joins logdet."""
        sums = self.fresh(1)
        self.sums += sums
        return sums

    def plus(self, a: Sequence[int], b: Sequence[int]) -> Values:
        """a + b; a dense step that has just returned b adds a itself."""
        last = self.steps[-1]
        if last.kind == "dense" and "b" not in last.values and last.values["out"] == tuple(b):
            last.values |= {"b": tuple(a), "out": self.fresh(len(a))}
            return last.values["out"]
        return self.add("couple", self.fresh(len(a)), a=a, b=b)

    # instructions

    def forward(self) -> None:
        for instruction in self.program.instructions:
            getattr(self, type(instruction).__name__.lower())(instruction)

    def named(self, columns: Sequence[int]) -> list[int]:
        return [self.state[c] for c in columns]

    def set(self, columns: Sequence[int], values: Sequence[int]) -> None:
        for column, value in zip(columns, values, strict=True):
            self.state[column] = value

    def scale(self, scale: Scale) -> None:
        self.couple(
            scale.columns, scale.log_scale >= 0, bias=scale.shift, weight=scale.log_scale,
            inverse=scale.inverse, inner=scale.inverse != scale.shift_first,
        )  # fmt: skip

    def couple(self, columns: Sequence[int], sums: bool, arg: float = 0.0, **given: Any) -> None:
        if columns:
            log = self.sum_of() if sums else ()
            out = self.add("couple", self.fresh(len(columns)), arg, a=self.named(columns), log=log, **given)
            self.set(columns, out)

    def linear(self, linear: Linear) -> None:
        n = len(linear.columns)
        if n:
            dense = Dense(linear.weight, linear.bias, n)
            self.set(linear.columns, self.dense(dense, range(n), self.named(linear.columns), range(n), n))
        if linear.logdet >= 0:
            # the log-scale of a column of no interest
            self.add("couple", self.fresh(1), a=(ZERO,), weight=linear.logdet, log=self.sum_of())

    def wrap(self, wrap: Wrap) -> None:
        n = len(wrap.columns)
        sign = -1.0 if wrap.inverse else 1.0
        bounds, shifts = (values * n if len(values) == 1 else values for values in (wrap.bound, wrap.shift))
        self.wrapped(wrap.columns, bounds, [sign * shift for shift in shifts])

    def wrapped(self, columns: Sequence[int], bounds: Sequence[float], shifts: Sequence[float] = ()) -> None:
        if columns:
            out = self.add(
                "wrap", self.fresh(len(columns)), a=self.named(columns), rows=[*map(float, bounds)], cols=shifts,
                inner=bool(shifts),
            )  # fmt: skip
            self.set(columns, out)

    def net(self, net: Net) -> None:
        inputs: list[Any] = [*self.named(net.columns), *self.context * net.context]
        states = self.begin(net.parts, len(inputs), None)
        self.numbers = self.parts(net.parts, states, inputs, None)

    def additive(self, additive: Additive) -> None:
        self.couple(additive.columns, False, b=self.numbers, inverse=additive.inverse)

    def multiplicative(self, multiplicative: Multiplicative) -> None:
        self.couple(multiplicative.columns, True, c=self.numbers, inverse=multiplicative.inverse)

    def affine(self, affine: Affine) -> None:
        self.transform(affine, self.numbers, range(len(affine.columns)))

    def spline(self, spline: Spline) -> None:
        numbers: Sequence[int] = self.numbers
        if spline.params >= 0:
            count = len(spline.columns) * (2 * spline.bins + spline.slopes)
            numbers = self.add("couple", self.fresh(count), a=[ZERO] * count, bias=spline.params)
        self.transform(spline, numbers, range(len(spline.columns)))

    def transform(self, transform: Transform, numbers: Sequence[Any], places: Sequence[int]) -> None:
        """Transform some of its columns, by their place."""
        n, columns = len(transform.columns), [transform.columns[i] for i in places]
        if isinstance(transform, Spline):
            each = 2 * transform.bins + transform.slopes
            self.splines(transform, places, columns, [numbers[i * each + j] for i in places for j in range(each)])
            return
        packing, swapped = PACKINGS[transform.packing], PACKINGS[transform.packing].endswith("scale_shift")
        pairs = [(2 * i, 2 * i + 1) if packing.startswith("interleaved") else (i, n + i) for i in places]
        first, second = ([numbers[pair[k]] for pair in pairs] for k in (swapped, not swapped))
        name, inverse = SCALE_MAPS[transform.scale_map], transform.inverse
        if transform.map_arg > 0 and name in ("sigmoid", "softplus"):
            name += "_eps"
        self.couple(
            columns, True, transform.map_arg, b=first, c=second, form=MAPS.index(name), inverse=inverse,
            inner=inverse != transform.shift_first,
        )  # fmt: skip

    def splines(self, spline: Spline, places: Sequence[int], columns: list[int], numbers: list[int]) -> None:
        zuko, bins = SPLINE_VARIANTS[spline.variant] == "zuko", spline.bins
        least = 0.0 if zuko else spline.min_bin
        limit = -math.log(spline.min_slope) if zuko else 1.0
        one = lambda values, i: values[i if len(values) == len(spline.columns) else 0]
        highs = [float(one(spline.bound, i)) if spline.tails else 1.0 for i in places]
        ends = [one(spline.tails, i) if spline.tails else FREE.value for i in places]
        if spline.turned and not spline.inverse:
            self.wrapped(columns, highs)
        out = self.add(
            "spline", self.fresh(len(columns)), spline.param_scale, limit, least, 1.0 - bins * least, spline.min_slope,
            a=self.named(columns), c=numbers, log=self.sum_of(), rows=highs, cols=ends, pitch=2 * bins + spline.slopes,
            form=spline.variant, bins=bins, shift=spline.slopes == bins - 1, inverse=spline.inverse,
            clear=spline.zero_outside, tails=bool(spline.tails),
        )  # fmt: skip
        self.set(columns, out)
        if spline.turned and spline.inverse:
            self.wrapped(columns, highs)

    def autoregressive(self, inverse: Autoregressive) -> None:
        net, transform, numbers = inverse.net, inverse.transform, self.numbers
        inputs: list[Any] = [None if c in set(inverse.columns) else self.state[c] for c in net.columns]
        inputs += self.context * net.context
        levels = iter((*inverse.levels, number_levels(inverse)))
        states = self.begin(net.parts, len(inputs), levels)
        for level in range(max(inverse.generations, default=0)):
            places = [i for i, generation in enumerate(inverse.generations) if generation == level + 1]
            found = self.parts(net.parts, states, inputs, level)
            self.transform(transform, found, places)
            known = {transform.columns[i] for i in places}
            # the same input may come twice
            for j, column in enumerate(net.columns):
                if column in known:
                    inputs[j] = self.state[column]
        self.numbers = numbers

    def prior(self, prior: Prior) -> None:
        if prior.columns:
            constant = -0.5 * math.log(2 * math.pi) if PRIORS[prior.prior] == "gaussian" else 0.0
            self.add(
                "prior", (), constant, n=len(prior.columns), a=self.named(prior.columns), log=self.sum_of(),
                form=prior.prior,
            )  # fmt: skip

    def uniform(self, uniform: Uniform) -> None:
        if uniform.columns:
            lows, highs = zip(*[map(float, side) for side in uniform.sides], strict=True)
            self.add(
                "uniform", (), uniform.log_density, n=len(lows), a=self.named(uniform.columns), log=self.sum_of(),
                rows=lows, cols=highs, inner=uniform.closed,
            )  # fmt: skip

    # parts of nets: the outputs of a level, or all

    def begin(self, parts: Sequence[Part], size: int, levels: Iterator[Values] | None) -> list[State]:
        states = []
        for part in parts:
            of_part, inner = None, []
            if isinstance(part, Dense):
                size, of_part = part.size, None if levels is None else next(levels)
            elif isinstance(part, Residual):
                inner = self.begin(part.parts, size, levels)
            states.append(State(size, of_part, inner))
        return states

    def parts(self, parts: Sequence[Part], states: list[State], h: list[Any], level: int | None) -> list[Any]:
        """Return what the parts return, None where it is not known yet."""
        for part, state in zip(parts, states, strict=True):
            inner = self.parts(part.parts, state.inner, h, level) if isinstance(part, Residual) else h
            if isinstance(part, Dense):
                due = [i for i in range(part.size) if state.levels is None or state.levels[i] == level]
            else:
                due = [i for i, v in enumerate(state.out) if v is None and inner[i] is not None]
            if due:
                for i, value in zip(due, self.part(part, due, h, inner), strict=True):
                    state.out[i] = value
            h = state.out
        return h

    def part(self, part: Part, due: list[int], h: list[Any], inner: list[Any]) -> Sequence[int]:
        if isinstance(part, Dense):
            known = [j for j, v in enumerate(h) if v is not None]
            return self.dense(part, due, [h[j] for j in known], known, len(h))
        some = [h[i] for i in due]
        if isinstance(part, Residual):
            return self.plus(some, [inner[i] for i in due])
        if isinstance(part, Context):
            count = len(self.context)
            more = self.dense(part.dense, due, self.context, range(count), count)
            if part.gate:
                return self.add("couple", self.fresh(len(due)), a=some, c=more, form=FACTOR.value)
            return self.plus(some, more)
        if isinstance(part, Activation):
            return self.activated(some, part.activation, part.arg)
        if isinstance(part, Norm):
            return self.norm(part, some)
        if isinstance(part, Elementwise):
            return self.elementwise(part, some, due)
        # the others stay as they are
        places = {column: k for k, column in enumerate(part.columns)}
        waves = [i for i in due if i in places]
        out = dict(zip(due, some, strict=True))
        if waves:
            found = self.add(
                "periodic", self.fresh(len(waves)), a=[h[i] for i in waves], rows=[places[i] for i in waves],
                weight=part.scale, mask=part.sine, more=part.cosine, bias=part.bias,
            )  # fmt: skip
            out |= zip(waves, found, strict=True)
        return [out[i] for i in due]

    def dense(
        self, dense: Dense, rows: Sequence[int], inputs: Sequence[int], cols: Sequence[int], pitch: int
    ) -> Values:  # fmt: skip
        h = self.add(
            "dense", self.fresh(len(rows)), a=inputs, rows=rows, cols=cols, pitch=pitch, terms=len(cols),
            weight=dense.weight, bias=dense.bias, mask=dense.mask,
        )  # fmt: skip
        return self.activated(h, dense.activation, dense.arg) if dense.activation else h

    def activated(self, h: Sequence[int], activation: int, arg: float) -> Values:
        return self.add("activate", self.fresh(len(h)), arg, a=h, form=activation)

    def norm(self, norm: Norm, h: list[int]) -> Values:
        n = len(h)
        h = list(self.add("norm", self.fresh(n), norm.eps, n - norm.unbiased, a=h))
        return self.elementwise(Elementwise(norm.weight, norm.bias), h, range(n))

    def elementwise(self, part: Elementwise, h: list[int], rows: Sequence[int]) -> Values:
        form = FACTOR.value if part.factor >= 0 else 0
        return self.add(
            "couple", self.fresh(len(h)), a=h, weight=part.factor, bias=part.shift, rows=rows, form=form
        )  # fmt: skip

    # ends

    def outputs(self) -> list[int]:
        return self.named(self.program.outputs)

    def finish(self) -> None:
        if self.program.outputs:
            self.add("store", (), n=len(self.program.outputs), a=self.outputs(), form=X.value)
        self.add("total", (), n=len(self.sums), a=self.sums)
