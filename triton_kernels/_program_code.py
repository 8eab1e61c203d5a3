"""Compiles a program of a flow to the table of steps that _program.py runs, forward or forward and back.

Every column of every step is a value, written once. The way back is the list of steps reversed, each replaced by those
of its gradients. Then steps whose values nobody reads are dropped, and values get places, which are used again once
nobody reads them: what the way back needs stays.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .._schemas import PRIORS, SCALE_MAPS, SPLINE_VARIANTS
from ..program import (
    ACTIVATIONS,
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
    Periodic,
    Prior,
    Program,
    Residual,
    Scale,
    Spline,
    Transform,
    number_levels,
)  # fmt: skip
from . import _launch
from ._program import ABSENT, CONTEXT, FACTOR, FIELDS, GRAD_LOGDET, GRAD_Y, KINDS, MAPS, WORDS, X
from ._spline import FREE

ZERO = 0  # a value of every program
PLACES = ("a", "b", "c", "g", "out", "out_b", "out_c", "log")
WRITTEN = frozenset(("out", "out_b", "out_c"))
EFFECTS = frozenset(("store", "total", "dense_weights", "sum_rows"))
# activations whose gradient follows from their result
OF_RESULT = frozenset(map(ACTIVATIONS.index, ("relu", "leaky_relu", "tanh")))

Values = tuple[int, ...]


class Step:
    """A step before it has places: `values` by the names of PLACES, `lists` of numbers, other `words`, and floats."""

    def __init__(
        self, kind: str, values: dict[str, Values], lists: dict[str, tuple], words: dict[str, int], floats: Sequence[float]
    ) -> None:  # fmt: skip
        self.kind, self.values, self.lists, self.words, self.floats = kind, values, lists, words, floats
        # a step forward writes its part of logdet, a step back reads the gradient
        self.adds = not kind.endswith("_back")

    def written(self, name: str) -> bool:
        return name in WRITTEN or (name == "log" and self.adds)

    def reads(self) -> Iterator[int]:
        return (v for name, values in self.values.items() if not self.written(name) for v in values)

    def writes(self) -> Iterator[int]:
        return (v for name, values in self.values.items() if self.written(name) for v in values)


class Code(NamedTuple):
    """A program as the machine takes it."""

    words: list[int]
    steps: int
    places: int
    splines: bool  # whether there are any


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
        out = self.add(
            "spline", self.fresh(len(columns)), spline.param_scale, limit, least, 1.0 - bins * least, spline.min_slope,
            a=self.named(columns), c=numbers, log=self.sum_of(), rows=highs, cols=ends, pitch=2 * bins + spline.slopes,
            form=spline.variant, bins=bins, shift=spline.slopes == bins - 1, inverse=spline.inverse,
            clear=spline.zero_outside, tails=bool(spline.tails),
        )  # fmt: skip
        self.set(columns, out)

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

    def finish_forward(self) -> None:
        if self.program.outputs:
            self.add("store", (), n=len(self.program.outputs), a=self.outputs(), form=X.value)
        self.add("total", (), n=len(self.sums), a=self.sums)


class Back:
    """Writes the steps of the way back behind those of the forward."""

    def __init__(self, builder: Builder, need_weights: bool) -> None:
        self.builder, self.need_weights = builder, need_weights
        self.grads: dict[int, int] = {}  # value -> its gradient
        forward, outputs = list(builder.steps), builder.program.outputs
        self.logdet = builder.load(GRAD_LOGDET.value, 1, (0,))
        self.give(builder.outputs(), builder.load(GRAD_Y.value, len(outputs), range(len(outputs))))
        for step in reversed(forward):
            if "log" in step.values or any(v in self.grads for v in step.writes()):
                getattr(self, step.kind)(step)

    def store(self, values: Sequence[int], target: int) -> None:
        if values:
            self.builder.add("store", (), n=len(values), a=self.of(values), form=target)

    def of(self, values: Sequence[int]) -> Values:
        return tuple(self.grads.get(v, ZERO) for v in values)

    def give(self, values: Sequence[int], grads: Sequence[int]) -> None:
        """Add to the gradients of values, among which there may be equal ones."""
        pairs = [(v, g) for v, g in zip(values, grads, strict=True) if v != ZERO]
        while pairs:
            now: dict[int, int] = {}
            later = []
            for value, grad in pairs:
                if value not in self.grads:
                    self.grads[value] = grad
                elif value in now:
                    later.append((value, grad))
                else:
                    now[value] = grad
            if now:
                sums = self.builder.add("couple", self.builder.fresh(len(now)), a=self.of([*now]), b=[*now.values()])
                self.grads |= zip(now, sums, strict=True)
            pairs = later

    def again(self, kind: str, step: Step, n: int, values: dict[str, Any], **words: int) -> None:
        """Add a step with the lists and words of another one."""
        given = {name: tuple(v) for name, v in values.items() if v}
        self.builder.steps.append(Step(kind, given, step.lists, {**step.words, **words, "n": n}, step.floats))

    def sum_rows(self, step: Step, place: str, grads: Sequence[int]) -> None:
        """Add the sums of values over rows to the gradients of a vector of weights, if there is one."""
        if self.need_weights and step.words.get(place, -1) >= 0:
            self.again("sum_rows", step, len(grads), {"g": grads}, weight=step.words[place])

    def pull(self, kind: str, step: Step, *more: str) -> list[Values]:
        """Add the step back of another one; return the gradients that it writes: of a, and those named `more`."""
        out, a = step.values.get("out", ()), step.values["a"]
        given = {name: step.values[name] for name in ("a", "b", "c") if name in step.values}
        given |= {"g": self.of(out), "log": self.logdet if "log" in step.values else ()}
        sizes = {"out": len(a), "out_b": len(a), "out_c": len(a)}
        if kind == "spline_back":
            sizes["out_b"] = len(step.values["c"])
        written = {name: self.builder.fresh(sizes[name]) for name in ("out", *more)}
        self.again(kind, step, len(a), given | written)
        return [*written.values()]

    def fill(self, step: Step) -> None: ...

    def load(self, step: Step) -> None: ...

    def dense(self, step: Step) -> None:
        g, inputs = self.of(step.values["out"]), step.values.get("a", ())
        if "b" in step.values:
            self.give(step.values["b"], g)
        self.sum_rows(step, "bias", g)
        if not inputs:
            return
        if self.need_weights:
            self.again("dense_weights", step, len(g), {"a": inputs, "g": g})
        # joins what there is, if it can
        unique = len(set(inputs)) == len(inputs)
        other = self.of(inputs) if unique and any(v in self.grads for v in inputs) else ()
        out = self.builder.fresh(len(inputs))
        self.again("dense_inputs", step, len(inputs), {"g": g, "b": other, "out": out}, terms=len(g))
        if unique:
            self.grads |= zip(inputs, out, strict=True)
        else:
            self.give(inputs, out)

    def couple(self, step: Step) -> None:
        shifts, scales = (
            name in step.values or step.words.get(place, -1) >= 0 for name, place in (("b", "bias"), ("c", "weight"))
        )
        names = ["out_b"] * shifts + ["out_c"] * scales
        found = dict(zip(("out", *names), self.pull("couple_back", step, *names), strict=True))
        # each gives way to what it is made of
        self.give(step.values["a"], found["out"])
        for name, values, place in (("out_b", "b", "bias"), ("out_c", "c", "weight")):
            if name in found:
                self.give(step.values.get(values, ()), found[name] if values in step.values else ())
                self.sum_rows(step, place, found[name])

    def activate(self, step: Step) -> None:
        given = step.values["out" if step.words["form"] in OF_RESULT else "a"]
        out = self.builder.fresh(len(given))
        self.again("activate_back", step, len(given), {"a": given, "g": self.of(step.values["out"]), "out": out})
        self.give(step.values["a"], out)

    def spline(self, step: Step) -> None:
        of_columns, of_numbers = self.pull("spline_back", step, "out_b")
        self.give(step.values["a"], of_columns)
        self.give(step.values["c"], of_numbers)

    def norm(self, step: Step) -> None:
        self.give(step.values["a"], *self.pull("norm_back", step))

    def periodic(self, step: Step) -> None:
        of_columns, of_sine, of_cosine = self.pull("periodic_back", step, "out_b", "out_c")
        self.sum_rows(step, "bias", self.of(step.values["out"]))
        self.sum_rows(step, "mask", of_sine)
        self.sum_rows(step, "more", of_cosine)
        self.give(step.values["a"], of_columns)

    def prior(self, step: Step) -> None:
        self.give(step.values["a"], *self.pull("prior_back", step))


def compiled(
    program: Program, sizes: Sequence[int], dtype: torch.dtype, back: bool = False, needs: tuple[bool, bool, bool] = (True,) * 3
) -> Code:
    """Return the steps of a program with weights of these sizes.

    Args:
        needs: whether the way back returns gradients of x, of the context and of the weights.
    """
    offsets = [0, *itertools.accumulate(sizes)]
    builder = Builder(program, offsets)
    x = tuple(builder.state)
    builder.forward()
    if back:
        grads = Back(builder, needs[2])
        for needed, values, target in zip(needs, (x, builder.context), (X.value, CONTEXT.value), strict=False):
            if needed:
                grads.store(values, target)
    else:
        builder.finish_forward()
    return encoded(used(builder.steps), dtype)


def used(steps: list[Step]) -> list[Step]:
    """Return the steps of which something is read or stored."""
    live: set[int] = set()
    kept = []
    for step in reversed(steps):
        writes = [name for name in step.values if step.written(name)]
        dead = [name for name in writes if live.isdisjoint(step.values[name])]
        if step.kind in EFFECTS or len(dead) < len(writes):
            for name in dead:
                del step.values[name]
            live.update(step.reads())
            kept.append(step)
    return kept[::-1]


def placed(steps: list[Step]) -> tuple[dict[int, int], int]:
    """Return the place of each value, and how many there are; values whose times overlap have places of their own."""
    last = {v: k for k, step in enumerate(steps) for v in (*step.writes(), *step.reads())}
    ending: list[list[int]] = [[] for _ in steps]
    for value, k in last.items():
        ending[k].append(value)
    places: dict[int, int] = {}
    free: list[int] = []
    count = 0
    for k, step in enumerate(steps):
        for value in step.writes():
            if free:
                places[value] = heapq.heappop(free)
            else:
                places[value], count = count, count + 1
        for value in ending[k]:
            heapq.heappush(free, places[value])
    return places, count


def encoded(steps: list[Step], dtype: torch.dtype) -> Code:
    places, count = placed(steps)
    records, lists, firsts = [], [], {}
    start = len(steps) * WORDS.value

    def first(items: tuple) -> int:
        # before they are compared: 1.0 is equal to 1
        items = tuple([_launch.bits(item, dtype) if isinstance(item, float) else item for item in items])
        if items not in firsts:
            firsts[items] = start + len(lists)
            lists.extend(items)
        return firsts[items]

    for step in steps:
        record = dict.fromkeys(FIELDS[:ABSENT], -1) | dict.fromkeys(FIELDS[ABSENT:], 0) | step.words
        record["kind"] = KINDS.index(step.kind)
        for name, values in step.values.items():
            at = tuple([places[value] for value in values])
            record[name] = at[0] if name == "log" else first(at)
        record |= {name: first(items) for name, items in step.lists.items()}
        record |= {f"f{i}": _launch.bits(value, dtype) for i, value in enumerate(step.floats)}
        records += [*record.values(), *[0] * (WORDS.value - len(FIELDS))]
    return Code(records + lists, len(steps), max(1, count), any(step.kind.startswith("spline") for step in steps))
