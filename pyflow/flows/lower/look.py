"""One look at the layers of a module: the tables of rules, and what rules read modules with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ... import program as p
from ..._classes import named, own_class, why_unknown
from ..._operators import TENSORS
from ..._torch import has_hooks
from .._run import Base, Computed, Conditioner, Run, Start, Write, Writer
from .._watch import Path, Watch, owned

Layers = Iterator[tuple[Path, nn.Module]]
Kind = Any  # a class, or the name of one
F = TypeVar("F", bound=Callable[..., Any])

RULES: dict[Kind, Callable[[Look, Path, Any], Write]] = {}
STACKS: dict[Kind, Callable[[Look, Path, Any], Layers]] = {}
BASES: dict[Kind, Callable[[Look, Path, Any], Write]] = {}
# networks that may get a context as their second argument, and what adds parts for its one argument
NETS: dict[Kind, Callable[[Look, Path, Any], Conditioner]] = {}
PARTS: dict[Kind, Callable[[Look, Path, Any, list[p.Part]], None]] = {}
TABLES: tuple[dict[Kind, Any], ...] = (RULES, STACKS, BASES, NETS, PARTS)


class NoInstruction(Exception):
    """A module, and why it has no instruction."""

    def __init__(self, path: Path, module: object, reason: str) -> None:
        super().__init__(path, module, reason)
        self.path, self.module, self.reason = path, module, reason


def _fixed(value: Any) -> Any:
    """Return an attribute as what does not change inside: a list as a tuple, a tensor as numbers."""
    value = value.tolist() if isinstance(value, Tensor) else value
    return tuple(value) if type(value) is list else value


def _fixed_and_trained(value: Any) -> tuple[Any, bool]:
    """Return an attribute, and whether it is a tensor that requires a gradient."""
    return _fixed(value), isinstance(value, Tensor) and value.requires_grad


def register(table: dict[Kind, Any], *kinds: type | str) -> Callable[[F], F]:
    def add(rule: F) -> F:
        table.update(dict.fromkeys(kinds, rule))
        return rule

    return add


def _found(table: dict[Kind, F], module: object) -> F | None:
    kind = own_class(type(module))
    return table.get(kind) or table.get(named(kind))


class Look:
    """One look at the layers of a root: watches what it reads, and collects the weights of the current run.

    Attributes:
        base: path and module of the base distribution, if the root has one, and the direction of the layers before it.
        base_alone: whether it gets no context where the layers get one.
        flipped: whether the layer that is looked at runs in the other direction than the root.
    """

    def __init__(self, root: nn.Module) -> None:
        self.watch, self.run, self.recomputing = Watch(root), Run(), False
        self.base: tuple[Path, nn.Module, bool] | None = None
        self.base_alone = self.flipped = False

    def try_layer(self, path: Path, layer: nn.Module) -> None:
        """Add a layer to the run; raise NoInstruction, and leave the run as it was, if it has none."""
        write = self._try(lambda: self.layer(path, layer))
        self.run.layers.append((path, owned(path, layer)))
        self.run.writes.append(write)

    def try_base(self, run: Run) -> None:
        """Add the base distribution to a run; raise NoInstruction if it has none."""
        if self.base is not None:
            self.run, counts = run, (len(run.places), len(run.computed))
            path, base, _ = self.base
            run.base = Base(self._try(lambda: self._rule(BASES, path, base)(self, path, base)), *counts)

    def _try(self, look: Callable[[], Write]) -> Write:
        run, before = self.run, len(self.watch.tensors)
        lists: tuple[list[Any], ...] = run.places, run.computed, run.starts
        counts, numbers = [len(each) for each in lists], (run.conditioners, run.n_computed)
        try:
            return look()
        except NoInstruction:
            self.watch.forget(before)
            run.conditioners, run.n_computed = numbers
            for each, count in zip(lists, counts, strict=True):
                del each[count:]
            raise

    def layer(self, path: Path, layer: nn.Module) -> Write:
        """Return what writes the instructions of a layer or of a stack of them, or raise NoInstruction."""
        if _found(STACKS, layer) is None:
            return self._rule(RULES, path, layer)(self, path, layer)
        return in_order([self._rule(RULES, *each)(self, *each) for each in self.flat(path, layer)])

    def inverted(self, path: Path, layer: nn.Module) -> Write:
        """Return what writes the instructions of the inverse of a layer."""
        self.flipped = not self.flipped
        try:
            write = self.layer(path, layer)
        finally:
            self.flipped = not self.flipped

        def inverse(writer: Writer) -> None:
            writer.inverse = not writer.inverse
            write(writer)
            writer.inverse = not writer.inverse

        return inverse

    def flat(self, path: Path, module: nn.Module) -> Layers:
        """Yield the layers of a module, with stacks of layers flattened."""
        rule = _found(STACKS, module)
        if rule is None or _why_not(path, module):
            yield path, module
            return
        self.watch.module(path, module)
        for inner, layer in rule(self, path, module):
            yield from self.flat(inner, layer)

    def options(self, path: Path, module: nn.Module, *names: str) -> list[Any]:
        """Return attributes that must stay; lists as tuples, tensors as numbers."""
        return [self.option(path, module, name) for name in names]

    def option(self, path: Path, module: nn.Module, name: str) -> Any:
        if path and not isinstance(vars(module).get(name, []), (list, Tensor)):
            return self.watch.attribute(path, module, name)
        value, trained = self.watch.option(path, module, lambda m: _fixed_and_trained(getattr(m, name)))
        if trained:
            raise NoInstruction(path, module, f"its {name} requires a gradient")
        return value

    def numbers(self, path: Path, module: nn.Module, name: str) -> tuple[float, ...]:
        """Return an attribute that is a number, or several, as floats."""
        value = self.option(path, module, name)
        try:
            return tuple(map(float, value if isinstance(value, tuple) else (value,)))
        except (TypeError, ValueError):
            raise NoInstruction(path, module, f"its {name} is {value!r}") from None

    def values(self, path: Path, module: nn.Module, name: str) -> list[Any]:
        """Return the numbers of a tensor that is no parameter, which is read once: see `Watch.buffer`."""
        return self.buffer(path, module, name).reshape(-1).tolist()

    def buffer(self, path: Path, module: nn.Module, name: str) -> Tensor:
        """Return a tensor that is no parameter, whose numbers are read once: see `Watch.buffer`."""
        tensor = self.watch.buffer(path, module, name)
        if tensor.requires_grad:
            raise NoInstruction(path, module, f"its {name} requires a gradient")
        return tensor

    def tensor(self, path: Path, module: nn.Module, name: str, given: bool = True) -> int:
        """Return the place of a parameter or a buffer among the run's weights, -1 if it is None.

        Args:
            given: whether a program gets it; else weights are computed from it.
        """
        kind = "_buffers" if name in module._buffers else "_parameters"
        held = vars(module)[kind]
        if type(held.get(name)) not in TENSORS and (name not in held or held[name] is not None):
            self.watch.option(path, module, lambda m: type(vars(m)[kind].get(name)))
            found = f"a {type(held[name]).__name__}" if name in held else "no parameter"
            raise NoInstruction(path, module, f"its {name} is {found}")
        place = self.watch.tensor(path, module, kind, name)
        if place < 0:
            return place
        if given:
            self.run.places.append(place)
        return len(self.run.places) - 1

    def computed(
        self, path: Path, layer: nn.Module, names: tuple[str, ...],
        compute: Callable[[Any, bool, int], tuple[Tensor, ...]], count: int,
    ) -> int:  # fmt: skip
        """Return the place of the first of `count` weights that are computed at every call.

        Args:
            names: the parameters and buffers that they are computed from.
            compute: of the layer, the direction and the number of columns.
        """
        for name in names:
            self.tensor(path, layer, name, given=False)
        run = self.run
        run.computed.append(Computed(path, layer, compute, self.flipped))
        # from the end, since other tensors are found before a run ends
        run.places += range(-run.n_computed - 1, -run.n_computed - count - 1, -1)
        run.n_computed += count
        return len(run.places) - count

    def starts(self, path: Path, layer: nn.Module, pending: Callable[[Any, bool], bool]) -> None:
        """Let the layer run while `pending` of it and the direction is true: a batch has to initialise it."""
        self.run.starts.append(Start(path, layer, pending, self.flipped))

    def conditioner(self, path: Path, module: nn.Module) -> Conditioner:
        """Return a network that is called with the columns alone."""
        if _found(NETS, module) is not None:
            return self.conditional(path, module)._replace(given=None)
        parts: list[p.Part] = []
        self.part(path, module, parts)
        if not any(isinstance(part, p.Dense) for part in _all(parts)):
            raise NoInstruction(path, module, "it has no linear layer")
        self.run.conditioners += 1
        return Conditioner(None, without_context(parts))

    def conditional(self, path: Path, module: nn.Module) -> Conditioner:
        """Return a network that is called with the columns and a context, which may be None."""
        self.run.conditioners += 1
        return self._rule(NETS, path, module)(self, path, module)

    def part(self, path: Path, module: nn.Module, parts: list[p.Part]) -> None:
        """Add a part of a network, which is called with what comes out of the last one, to its parts."""
        self._rule(PARTS, path, module)(self, path, module, parts)

    def plain(self, path: Path, module: Any) -> None:
        """Watch a module; raise NoInstruction if it is none, or if more than its class says what it does."""
        if not isinstance(module, nn.Module):
            raise NoInstruction(path, module, "it is no module")
        self.watch.module(path, module)
        if reason := _why_not(path, module):
            raise NoInstruction(path, module, reason)

    def _rule(self, rules: dict[Kind, F], path: Path, module: Any) -> F:
        self.plain(path, module)
        rule = _found(rules, module)
        if rule is None:
            raise NoInstruction(path, module, "its class has no instruction")
        return rule


def _why_not(path: Path, module: nn.Module) -> str:
    """Return what a module does beyond its class, or that its class is not the one we know; empty if neither."""
    own = [name for name in vars(module) if isinstance(getattr(type(module), name, None), FunctionType)]
    # a root is called by its own methods, and a flow's are not the program's
    if not path:
        inner = [] if _found(STACKS, module) else [name for name in own if name not in ("forward", "inverse")]
        return f"it has its own {inner[0]}" if inner else _why_unknown(module)
    if has_hooks(module):
        return "it has hooks"
    if parametrize.is_parametrized(module):
        return "it has parametrizations"
    return f"it has its own {own[0]}" if own else _why_unknown(module)


def _why_unknown(module: nn.Module) -> str:
    # of a class without a rule no source is known
    return why_unknown(type(module)) if any(_found(table, module) for table in TABLES) else ""


def children(look: Look, path: Path, modules: Any) -> Layers:
    """Yield the modules of a ModuleList."""
    look.watch.module(path, modules)
    for name, module in modules._modules.items():
        yield (*path, name), module


def in_order(writes: list[Write]) -> Write:
    """Return what writes layers one after the other, the last one first in the inverse."""

    def write(writer: Writer) -> None:
        for each in reversed(writes) if writer.inverse else writes:
            each(writer)

    return write


def without_context(parts: Any) -> tuple[p.Part, ...]:
    """Return the parts of a network that run when it gets no context."""
    kept = [part for part in parts if not isinstance(part, p.Context)]
    return tuple(
        part._replace(parts=without_context(part.parts)) if isinstance(part, p.Residual) else part for part in kept
    )


def _all(parts: Any) -> Iterator[p.Part]:
    for part in parts:
        yield part
        if isinstance(part, p.Residual):
            yield from _all(part.parts)
