"""What a look at a module found: runs of layers that are fused, and layers that are left; and a text that says so."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import _backend
from .._classes import named
from ..reference.flow_program import of_rows
from ._run import DoesNotFit, Key, Result, Run, call_layer, fits, has_kernel, why_not
from ._watch import Path, at, owned
from .lower import Look, NoInstruction

ALONE = "no conditioner is beside it"


class Left(NamedTuple):
    """A layer that runs as it is, and why: the name of the module in it that has no instruction, and the reason."""

    path: Path
    layer: Any
    module: str
    reason: str
    lazy: bool = False  # called with a context it returns its transform

    def line(self) -> str:
        return f"{_name(self.path)} ({self.layer.__class__.__name__}): left, {self.module}{self.reason}"


class Structure:
    """What a look at a module found: its layers as runs, and those that are left between them."""

    def __init__(self, root: nn.Module) -> None:
        self.look = Look(root)
        self.parts: list[Run | Left] = []
        try:
            for path, layer in self.look.flat((), root):
                try:
                    self.look.try_layer(path, layer)
                except NoInstruction as why:
                    self._close()
                    # whatever wraps a layer of zuko
                    lazy = any(named(type(at(root, path[:i]))).startswith("zuko.") for i in range(len(path)))
                    self.parts.append(_left(path, layer, why)._replace(lazy=lazy))
        except NoInstruction as why:
            self.parts.append(_left((), root, why))
        self._close()
        if self.look.recomputing and len(self.parts) > 1:
            reason = "its ReversibleSequential recomputes, so it is fused whole or not at all"
            each = [[part] if isinstance(part, Left) else _left_all(part, reason) for part in self.parts]
            self.parts = [left for parts in each for left in parts]
        alone = self.parts[0] if len(self.parts) == 1 else None
        self.whole = alone if isinstance(alone, Run) else None
        self.fuses = any(isinstance(part, Run) for part in self.parts)
        # those that are left for want of a conditioner come last, since another layer may be why
        left = sorted((part for part in self.parts if isinstance(part, Left)), key=lambda part: part.reason == ALONE)
        self.first_left = left[0].line() if left else ""
        self.base_left: Left | None = None
        if self.whole is not None and self.look.base is not None:
            try:
                self.look.try_base(self.whole)
            except NoInstruction as why:
                self.base_left = _left(*self.look.base[:2], why)

    def run_parts(
        self, x: Tensor, given: tuple[Any, ...], repeats: int, key: Key, tensors: list[Tensor]
    ) -> Result | None:  # fmt: skip
        """Return what the layers do, with runs as programs; None if there are no runs."""
        if not self.fuses:
            return None
        context, inverse = given[0] if given else None, key[2]
        whole = () if context is None else (of_rows(context, x.shape[0], repeats),)
        total: Any = 0
        for part in reversed(self.parts) if inverse else self.parts:
            result: Any = None
            if isinstance(part, Left):
                result = call_layer(part.layer, x, whole, inverse, part.lazy)
            elif not why_not(x, given, True) and fits(x, tensors):
                result = part.call(x, context, repeats, (x.shape[1], *key[1:]), tensors)
            x, logdet = part.call_layers(x, whole, inverse) if isinstance(part, Run) and result is None else result
            total = logdet + total
        return x, total

    def _close(self) -> None:
        """End the current run; one without a conditioner is left."""
        run, self.look.run = self.look.run, Run()
        if run.conditioners:
            self.parts.append(run)
        else:
            self.parts += _left_all(run, ALONE)


def _left(path: Path, layer: nn.Module, why: NoInstruction) -> Left:
    # not the exception, whose frames refer to the root
    module = "" if why.path == path else f"{_name(why.path)} ({type(why.module).__name__}): "
    return Left(path, owned(path, layer), module, why.reason)


def _left_all(run: Run, reason: str) -> list[Left]:
    return [Left(path, layer, "", reason) for path, layer in run.layers]


def explain(root: nn.Module) -> str:
    """Return a line for each run of layers and for each layer that is left, with the reason."""
    structure = Structure(root)
    lines = [_line(part) for part in structure.parts]
    if structure.look.base is not None:
        lines.append(_base_line(structure, *structure.look.base))
    like = next(root.parameters(), None)
    if like is not None and not has_kernel(like):
        lines.insert(0, f"on {like.device} with pyflow.backend {_backend.current()!r} no program runs, but every layer")
    return "\n".join(lines)


def _line(part: Run | Left) -> str:
    if isinstance(part, Run):
        (first, _), (last, _) = part.layers[0], part.layers[-1]
        where = _name(first) if first == last else f"{_name(first)} to {_name(last)}"
        classes = Counter(layer.__class__.__name__ for _, layer in part.layers)
        programs = {inverse: _instructions(part, inverse) for inverse in (False, True)}
        instructions = Counter(type(each).__name__ for each in programs[False] or programs[True] or ())
        line = f"{where}: fused, {_counted(classes)} as {_counted(instructions)}"
        left = [name for name, inverse in (("forward", False), ("inverse", True)) if programs[inverse] is None]
        return f"{line}; its {' and '.join(left)} left" if left else line
    return part.line()


def _base_line(structure: Structure, path: Path, base: nn.Module, inverse: bool) -> str:
    if structure.base_left is not None:
        return _line(structure.base_left)
    run = structure.whole
    if run is None or run.base is None or _instructions(run, inverse) is None:
        return _line(Left(path, base, "", "the layers before it are not one program"))
    return f"{_name(path)}: fused, 1 {base.__class__.__name__} in log_prob"


def _instructions(run: Run, inverse: bool) -> tuple[Any, ...] | None:
    """Return the instructions in one direction, None if there are none."""
    # their kinds depend neither on the number of columns nor on the context's
    for context in (run.context, 0, 1):
        try:
            return run.program(run.columns or 2, context, inverse).instructions
        except DoesNotFit:
            pass
    return None


def _counted(names: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in names.items())


def _name(path: Path) -> str:
    return ".".join(path) or "the flow"
