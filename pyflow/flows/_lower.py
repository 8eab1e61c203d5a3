"""From layers to instructions: one function for each class of layers, and of parts of conditioners.

A look at a layer (a rule) reads what does not depend on the input, and returns a function that writes the instructions
for some columns in one direction. Classes are found by their exact type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import program as p
from .._schemas import PACKINGS
from ..nn import ActNorm, AdditiveCoupling, AffineCoupling, Invertible1x1Conv, ReversibleSequential, Scale
from ..ops.coupling import scale_map_constant
from ._run import PLAIN, Computed, Run, Tape, Write
from ._watch import Path, Watch, has_hooks, owned
from .nets import Conditional

Layers = Iterator[tuple[Path, nn.Module]]
F = TypeVar("F", bound=Callable[..., Any])

RULES: dict[type, Callable[[Look, Path, Any], Write]] = {}
STACKS: dict[type, Callable[[Look, Path, Any], Layers]] = {}
_NET_RULES: dict[type, Callable[[Look, Path, Any, list[p.Dense]], None]] = {}


class NoInstruction(Exception):
    """A module, and why it has no instruction."""

    def __init__(self, path: Path, module: object, reason: str) -> None:
        super().__init__(path, module, reason)
        self.path, self.module, self.reason = path, module, reason


def register(table: dict[type, Any], *kinds: type) -> Callable[[F], F]:
    def add(rule: F) -> F:
        table.update(dict.fromkeys(kinds, rule))
        return rule

    return add


class Look:
    """One look at the layers of a root: watches what it reads, and collects the weights of the current run."""

    def __init__(self, root: nn.Module) -> None:
        self.watch, self.run, self.recomputing = Watch(root), Run(), False

    def try_layer(self, path: Path, layer: nn.Module) -> None:
        """Add a layer to the run; raise NoInstruction, and leave the run as it was, if it has none."""
        run, before = self.run, len(self.watch.parameters)
        lists: tuple[list[Any], ...] = run.places, run.computed, run.starts
        counts, numbers = [len(each) for each in lists], (run.conditioners, run.n_computed)
        try:
            write = self.layer(path, layer)
        except NoInstruction:
            self.watch.forget(before)
            run.conditioners, run.n_computed = numbers
            for each, count in zip(lists, counts, strict=True):
                del each[count:]
            raise
        run.layers.append((path, owned(path, layer)))
        run.writes.append(write)

    def layer(self, path: Path, layer: nn.Module) -> Write:
        """Return what writes the instructions of a layer, or raise NoInstruction."""
        return self._rule(RULES, path, layer)(self, path, layer)

    def flat(self, path: Path, module: nn.Module) -> Layers:
        """Yield the layers of a module, with stacks of layers flattened."""
        rule = STACKS.get(type(module))
        if rule is None or (path and _why_not(module)):
            yield path, module
            return
        self.watch.module(path, module)
        for inner, layer in rule(self, path, module):
            yield from self.flat(inner, layer)

    def parameter(self, path: Path, module: nn.Module, name: str, given: bool = True) -> int:
        """Return the place of a parameter among the run's weights, -1 if it is None.

        Args:
            given: whether a program gets it; else weights are computed from it.
        """
        kind = type(module._parameters.get(name))
        if kind not in PLAIN and (name not in module._parameters or module._parameters[name] is not None):
            self.watch.option(path, module, lambda m: type(m._parameters.get(name)))
            missing = name not in module._parameters
            raise NoInstruction(path, module, f"its {name} is {'no parameter' if missing else f'a {kind.__name__}'}")
        place = self.watch.parameter(path, module, name)
        if place < 0:
            return place
        if given:
            self.run.places.append(place)
        return len(self.run.places) - 1

    def computed(
        self, path: Path, layer: nn.Module, compute: Callable[[Any, bool], tuple[Tensor, ...]], count: int
    ) -> int:
        """Return the place of the first of the `count` tensors of a layer among the run's computed weights."""
        first = self.run.n_computed
        self.run.computed.append(Computed(path, layer, compute))
        self.run.n_computed += count
        return first

    def conditioner(self, path: Path, module: nn.Module) -> tuple[bool, tuple[p.Dense, ...]]:
        """Return whether a network takes a context, and its layers."""
        layers: list[p.Dense] = []
        self._rule(_NET_RULES | {Conditional: _sequential}, path, module)(self, path, module, layers)
        if not layers:
            raise NoInstruction(path, module, "it has no linear layer")
        self.run.conditioners += 1
        return type(module) is Conditional, tuple(layers)

    def part(self, path: Path, module: nn.Module, layers: list[p.Dense]) -> None:
        """Add a part of a network to its layers."""
        self._rule(_NET_RULES, path, module)(self, path, module, layers)

    def plain(self, path: Path, module: nn.Module) -> None:
        """Watch a module; raise NoInstruction if it may do other things than its class."""
        self.watch.module(path, module)
        if path and (reason := _why_not(module)):
            raise NoInstruction(path, module, reason)

    def _rule(self, rules: dict[type, F], path: Path, module: Any) -> F:
        if not isinstance(module, nn.Module):
            raise NoInstruction(path, module, "it is no module")
        self.plain(path, module)
        rule = rules.get(type(module))
        if rule is None:
            raise NoInstruction(path, module, "its class has no instruction")
        return rule


def _why_not(module: nn.Module) -> str:
    if has_hooks(module):
        return "it has hooks"
    if parametrize.is_parametrized(module):
        return "it has parametrizations"
    own = [name for name in ("forward", "inverse") if name in vars(module)]
    return f"it has its own {own[0]}" if own else ""


# stacks


@register(STACKS, ReversibleSequential)
def _stack(look: Look, path: Path, stack: Any) -> Layers:
    look.recomputing |= look.watch.option(path, stack, lambda m: m.recompute)
    return children(look, (*path, "layers"), stack.layers)


def children(look: Look, path: Path, modules: Any) -> Layers:
    """Yield the modules of a ModuleList."""
    look.watch.module(path, modules)
    for name, module in modules._modules.items():
        yield (*path, name), module


# layers


@register(RULES, ActNorm, Scale)
def _elementwise(look: Look, path: Path, layer: Any) -> Write:
    shift, log_scale = look.parameter(path, layer, "shift"), look.parameter(path, layer, "log_scale")
    look.run.starts.append((path, layer))
    return lambda tape: tape.add(p.Scale(tape.order, shift, log_scale, shift_first=True, inverse=tape.inverse))


@register(RULES, Invertible1x1Conv)
def _matrix(look: Look, path: Path, layer: Any) -> Write:
    for name in ("lower", "upper", "log_diagonal"):
        look.parameter(path, layer, name, given=False)
    first = look.computed(path, layer, _matrix_and_logdet, 2)

    def write(tape: Tape) -> None:
        place = tape.computed + first
        tape.add(p.Linear(tape.order, place, logdet=place + 1))

    return write


def _matrix_and_logdet(layer: Invertible1x1Conv, inverse: bool) -> tuple[Tensor, Tensor]:
    if inverse:
        return layer.inverse_weight(), -layer.log_diagonal.sum()
    return layer.weight(), layer.log_diagonal.sum()


@register(RULES, AdditiveCoupling)
def _additive(look: Look, path: Path, layer: Any) -> Write:
    return _coupling(look, path, layer, p.Additive)


@register(RULES, AffineCoupling)
def _affine(look: Look, path: Path, layer: Any) -> Write:
    options = dict(look.watch.option(path, layer, lambda m: m.options))
    shift_first, packing = bool(options.pop("shift_first")), PACKINGS.index(options.pop("packing"))
    try:
        scale_map, arg = scale_map_constant("AffineCoupling", dtype=torch.float32, **options)
    except ValueError:
        raise NoInstruction(path, layer, "its constants are out of the range of float32") from None

    def transform(columns: p.Columns, inverse: bool) -> p.Affine:
        return p.Affine(columns, scale_map, packing, arg, shift_first, inverse)

    return _coupling(look, path, layer, transform)


def _coupling(look: Look, path: Path, layer: Any, transform: Callable[[p.Columns, bool], p.Instruction]) -> Write:
    split, swap = look.watch.option(path, layer, lambda m: (m.split, m.swap))
    if split not in ("half", "interleave"):
        raise NoInstruction(path, layer, f"split {split!r} is for images")
    context, layers = look.conditioner((*path, "net"), layer._modules.get("net", layer.net))

    def write(tape: Tape) -> None:
        kept, changed = tape.split(split)[:: -1 if swap else 1]
        tape.conditioner(kept, context, layers)
        tape.add(transform(changed, tape.inverse))

    return write


# parts of conditioners


@register(_NET_RULES, nn.Sequential)
def _sequential(look: Look, path: Path, module: Any, layers: list[p.Dense]) -> None:
    for name, part in module._modules.items():
        look.part((*path, name), part, layers)


@register(_NET_RULES, nn.Linear)
def _linear(look: Look, path: Path, module: Any, layers: list[p.Dense]) -> None:
    weight = look.parameter(path, module, "weight")
    if weight < 0:
        raise NoInstruction(path, module, "its weight is None")
    size = look.watch.shapes[-1][0]
    layers.append(p.Dense(weight, look.parameter(path, module, "bias"), size))


@register(_NET_RULES, nn.Identity)
def _identity(look: Look, path: Path, module: Any, layers: list[p.Dense]) -> None:
    pass


@register(_NET_RULES, nn.Dropout)
def _dropout(look: Look, path: Path, module: Any, layers: list[p.Dense]) -> None:
    if look.watch.option(path, module, lambda m: m.p) != 0:
        raise NoInstruction(path, module, f"it drops with p={module.p}")


@register(_NET_RULES, nn.ReLU, nn.Tanh, nn.SiLU, nn.Sigmoid)
def _activation(look: Look, path: Path, module: Any, layers: list[p.Dense], arg: float = 0.0) -> None:
    if not layers or layers[-1].activation:
        raise NoInstruction(path, module, "no linear layer is before it")
    layers[-1] = layers[-1]._replace(activation=p.ACTIVATIONS.index(_NAMES[type(module)]), arg=arg)


_NAMES = {
    nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.Tanh: "tanh", nn.SiLU: "silu", nn.GELU: "gelu", nn.ELU: "elu",
    nn.Sigmoid: "sigmoid",
}  # fmt: skip


@register(_NET_RULES, nn.LeakyReLU)
def _leaky_relu(look: Look, path: Path, module: Any, layers: list[p.Dense]) -> None:
    _activation(look, path, module, layers, float(look.watch.option(path, module, lambda m: m.negative_slope)))


@register(_NET_RULES, nn.ELU)
def _elu(look: Look, path: Path, module: Any, layers: list[p.Dense]) -> None:
    _activation(look, path, module, layers, float(look.watch.option(path, module, lambda m: m.alpha)))


@register(_NET_RULES, nn.GELU)
def _gelu(look: Look, path: Path, module: Any, layers: list[p.Dense]) -> None:
    if look.watch.option(path, module, lambda m: m.approximate) != "none":
        raise NoInstruction(path, module, f"approximate={module.approximate!r}")
    _activation(look, path, module, layers)
