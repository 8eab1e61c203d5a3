"""What torch must know of an operator, derived from the names in its schema: how it is differentiated.

An operator and its backward share the names of arguments. A backward takes the output gradients first, `grad` (of the
first output) or `grad_<output>`, and returns one `grad_<argument>` each. So its names say what the forward has to save.
The backward of a backward is that of its reference, by torch. Rules for vmap are in `_vmap.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import takewhile
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ._backend import current, on
from ._torch import Schema, apply_of

# (output gradients, kept values, which arguments need a gradient) -> gradients by the name of the argument
Formula = Callable[[tuple, Sequence[Any], Sequence[Any]], dict[str, Any]]


class Signature:
    """Names and kinds of the arguments and outputs of a schema."""

    def __init__(self, schema: Schema) -> None:
        self.types = {argument.name: str(argument.real_type) for argument in schema.arguments}
        self.arguments, self.outputs = list(self.types), [output.name for output in schema.returns]
        # places of arguments that are lists of tensors
        self.lists = [i for i, kind in enumerate(self.types.values()) if kind == "List[Tensor]"]
        self.returns_list = [str(output.real_type) for output in schema.returns] == ["List[Tensor]"]

    def of_outputs(self, output: Any) -> tuple:
        """Return one value per name of an output."""
        return (output,) if len(self.outputs) == 1 else tuple(output)


class Rules:
    """Setup and backward of one operator, as torch.library.register_autograd takes them.

    `grads` are the places of the outputs whose gradients `formula` takes, `kept` the names of its other arguments.
    """

    def __init__(
        self,
        signature: Signature,
        grads: Sequence[int],
        kept: Sequence[str],
        formula: Formula,
        keep: Callable[[tuple, Any], Sequence[Any]],
        constant: Callable[[Any], Sequence[Tensor]] | None,
    ) -> None:
        of_output = "List[Tensor]" if signature.returns_list else "Tensor"
        kinds = {**signature.types, **dict.fromkeys(signature.outputs, of_output)}
        tensors = [i for i, name in enumerate(kept) if "Tensor" in kinds.get(name, "")]
        options = [i for i in range(len(kept)) if i not in tensors]
        self.formula, self.keep, self.constant = formula, keep, constant
        self.places = {name: i for i, name in enumerate(signature.arguments)}
        self.lists, self.grads = signature.lists, pick(grads)
        self.saved_lists = [i for i, at in enumerate(tensors) if kinds[kept[at]] == "List[Tensor]"]
        self.tensors, self.options = pick(tensors), pick(options)
        self.together = pick([[*tensors, *options].index(i) for i in range(len(kept))])

    def setup(self, ctx: Any, inputs: tuple, output: Any) -> None:
        """Save what the formula names: tensors as autograd wants them, the rest as it is."""
        kept = self.keep(inputs, output)
        tensors: Sequence[Any] = self.tensors(kept)
        if self.saved_lists:
            tensors, ctx.counts = flat(tensors, self.saved_lists)
        ctx.save_for_backward(*tensors)
        ctx.options, ctx.backend = self.options(kept), current()
        ctx.set_materialize_grads(False)
        if self.constant is not None:
            ctx.mark_non_differentiable(*self.constant(output))

    def backward(self, ctx: Any, *grads: Any) -> tuple:
        return self.gradients(ctx, grads, ctx.needs_input_grad)

    def gradients(self, ctx: Any, grads: tuple, needs: Sequence[Any]) -> tuple:
        """Return one gradient per argument, computed on the backend of the forward in any thread."""
        result: list[Any] = [None] * len(needs)
        for i in self.lists:
            result[i] = [None] * len(needs[i])
        grads = self.grads(grads)
        if all([grad is None for grad in grads]):
            return tuple(result)
        tensors = ctx.saved_tensors
        if self.saved_lists:
            tensors = nested(tensors, ctx.counts)
        kept = self.together((*tensors, *ctx.options))
        if current() == ctx.backend:
            found = self.formula(grads, kept, needs)
        else:
            with on(ctx.backend):
                found = self.formula(grads, kept, needs)
        for name, grad in found.items():
            place = self.places[name]
            if needs[place]:
                result[place] = grad
        return tuple(result)


def first_order(
    signature: Signature,
    backward: Any,
    keep: Callable[[tuple, Any], Sequence[Any]] | None = None,
    constant: Callable[[Any], Sequence[Tensor]] | None = None,
) -> Rules:
    """Return the rules of an operator from its backward: an operator, or a function that returns gradients by name.

    A function whose last parameter is `needs` is told which arguments need a gradient, a list for a list of tensors.
    `keep(inputs, output)` returns what the backward takes after the gradients, if these are not the arguments and
    outputs of the same names. `constant(output)` returns the outputs that have no gradient, if they are not those whose
    gradient the backward does not take.
    """
    own: Signature | None = getattr(backward, "signature", None)
    names = own.arguments if own else list(inspect.signature(backward).parameters)
    asks = own is None and names[-1] == "needs"
    names = names[:-1] if asks else names
    known = [*signature.arguments, *signature.outputs]
    leading = list(takewhile(lambda name: name.startswith("grad") and name not in known, names))
    grads = [0 if name == "grad" else signature.outputs.index(name.removeprefix("grad_")) for name in leading]
    kept = names[len(grads) :]
    if keep is None:
        choose, of_outputs = pick([known.index(name) for name in kept]), signature.of_outputs
        inputs_only = not set(kept) & set(signature.outputs)
        keep = lambda inputs, output: choose(inputs if inputs_only else (*inputs, *of_outputs(output)))
    without = [i for i in range(len(signature.outputs)) if i not in grads]
    if constant is None and without:
        constant = pick(without)
    if own is None:
        formula = lambda grads, kept, needs: backward(*grads, *kept, *(needs,) * asks)
    else:
        results, of_own = [name.removeprefix("grad_") for name in own.outputs], own.of_outputs
        formula = lambda grads, kept, needs: dict(zip(results, of_own(backward(*grads, *kept)), strict=True))
    return Rules(signature, grads, kept, formula, keep, constant)


def second_order(signature: Signature, reference: Callable) -> Rules:
    """Return the rules of a backward operator: its reference, differentiated by torch."""

    def formula(grads: tuple, args: Sequence[Any], needs: Sequence[Any]) -> dict[str, Any]:
        every, counts = flat(args, signature.lists)
        asked = [i for i, need in enumerate(flat(needs, signature.lists)[0]) if need]
        present: list[int] = []

        def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
            full = list(every)
            for i, tensor in zip(asked, tensors, strict=True):
                full[i] = tensor
            values = reference(*nested(full, counts))
            values = values if signature.returns_list else signature.of_outputs(values)
            present[:] = [i for i, value in enumerate(values) if value is not None]
            return tuple(values[i] for i in present)

        values, pull_back = torch.func.vjp(outputs, *(every[i] for i in asked))[:2]
        given = grads[0] if signature.returns_list else grads
        filled = [
            torch.zeros_like(v) if given[i] is None else given[i].to(v.dtype)
            for i, v in zip(present, values, strict=True)
        ]
        result: list[Any] = [None] * len(every)
        for i, grad in zip(asked, pull_back(tuple(filled)), strict=True):
            result[i] = grad
        return dict(zip(signature.arguments, nested(result, counts), strict=True))

    outputs = range(len(signature.outputs))
    return Rules(signature, outputs, signature.arguments, formula, lambda inputs, _: inputs, None)


def eager_apply(name: str, signature: Signature, run: Callable[[tuple], Any], rules: Rules) -> Callable[..., Any]:
    """Return a function that runs an operator and records its backward without torch's dispatcher."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = run(args)
        rules.setup(ctx, args, output)
        return output

    def forward_of_lists(ctx: Any, counts: tuple, *every: Any) -> tuple:
        ctx.argument_counts = counts
        return tuple(forward(ctx, *nested(every, counts)))

    def backward_of_lists(ctx: Any, *grads: Any) -> tuple:
        needs = nested(ctx.needs_input_grad[1:], ctx.argument_counts)
        found = rules.gradients(ctx, (grads,) if signature.returns_list else grads, needs)
        return None, *flat(found, signature.lists)[0]

    def apply_to_lists(*args: Any) -> Any:
        every, counts = flat(args, signature.lists)
        output = apply(counts, *every)
        return list(output) if signature.returns_list else output

    # autograd sees the tensors among the arguments of a function, not those in lists
    methods = (forward_of_lists, backward_of_lists) if signature.lists else (forward, rules.backward)
    attributes = dict(zip(("forward", "backward"), map(staticmethod, methods), strict=True))
    apply = apply_of(type(name, (torch.autograd.Function,), attributes))
    return apply_to_lists if signature.lists else apply


def pick(places: Sequence[int]) -> Callable[[Sequence[Any]], Any]:
    """Return a function that picks the values at some places, as a sequence."""
    start = places[0] if places else 0
    if list(places) == list(range(start, start + len(places))):
        return itemgetter(slice(start, start + len(places)))
    return itemgetter(*places)


def flat(values: Sequence[Any], lists: Sequence[int]) -> tuple[list[Any], list[int | None]]:
    """Replace the lists at some places by their elements; return also their lengths, None for other values."""
    every: list[Any] = []
    counts: list[int | None] = [None] * len(values)
    last = 0
    for i in lists:
        every += values[last:i]
        every += values[i]
        counts[i], last = len(values[i]), i + 1
    every += values[last:]
    return every, counts


def nested(values: Sequence[Any], counts: Sequence[int | None]) -> list[Any]:
    """The inverse of `flat`."""
    found: list[Any] = []
    at = 0
    for n in counts:
        found.append(values[at] if n is None else [*values[at : at + n]])
        at += 1 if n is None else n
    return found
