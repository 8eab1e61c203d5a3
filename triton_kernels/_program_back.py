"""The way back through the steps of _program_code.py: in reverse, each replaced by the steps of its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..program import ACTIVATIONS
from ._program import GRAD_LOGDET, GRAD_Y
from ._program_code import ZERO, Builder, Step, Values

# activations whose gradient follows from their result
OF_RESULT = frozenset(map(ACTIVATIONS.index, ("relu", "leaky_relu", "tanh")))


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
        given: dict[str, Values] = {name: step.values[name] for name in ("a", "b", "c") if name in step.values}
        given |= {"g": self.of(out), "log": self.logdet if "log" in step.values else ()}
        sizes = {"out": len(a), "out_b": len(a), "out_c": len(a)}
        if kind == "spline_back":
            sizes["out_b"] = len(step.values["c"])
        written = {name: self.builder.fresh(sizes[name]) for name in ("out", *more)}
        self.again(kind, step, len(a), given | written)
        return [*written.values()]

    def fill(self, step: Step) -> None: ...

    def load(self, step: Step) -> None: ...

    def uniform(self, step: Step) -> None: ...

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

    def wrap(self, step: Step) -> None:
        self.give(step.values["a"], self.of(step.values["out"]))

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
