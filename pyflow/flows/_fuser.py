"""Runs the layers of a flow as programs: `pyflow.ops.flow_program`, one call for many layers."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _backend
from .._torch import any_global_module_hook, evaluated_while_traced, exporting, under_transform
from ._lower import PLAIN, Look, NoInstruction
from ._run import DoesNotFit, Key, Result, Run, operator
from ._watch import Path, at


class Fusing(nn.Module):
    """A module with a fuser, which is no part of its state; a copy makes its own."""

    def __init__(self) -> None:
        super().__init__()
        self._fuser = Fuser(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._fuser = Fuser(self, frozen=getattr(self.__dict__.get("_fuser"), "frozen", False))


class Fuser:
    """Finds and runs the programs of a module's layers.

    Args:
        root: the module.
        frozen: keep the weights of the first call, and do not watch the module.
    """

    def __init__(self, root: nn.Module | None = None, frozen: bool = False) -> None:
        self.root: Callable[[], nn.Module | None] = (lambda: None) if root is None else weakref.ref(root)
        self.frozen = frozen
        self.structure: Structure | None = None
        self.snapshots: dict[Any, tuple[list[Tensor], str]] = {}
        here = weakref.ref(self)

        @evaluated_while_traced
        def prepare(*key: Any) -> bool:
            """Look at the module as it is now, in a trace of dynamo; return whether one program runs all of it."""
            fuser = here()
            assert fuser is not None
            now = fuser.now(fuser.root())
            return now is not None and now[0].whole is not None and now[0].whole.code(key, now[1]) is not None

        self.prepare = prepare

    def __reduce__(self) -> tuple[Any, ...]:
        return Fuser, (None, self.frozen)

    def run(
        self, root: nn.Module, x: Tensor, given: tuple[Any, ...], columns: int, inverse: bool = False,
        prior: str | None = None,
    ) -> Result | None:  # fmt: skip
        """Return (y, logdet), with a prior (nothing, log-density); None where the layers have to run.

        Args:
            root: the module that owns this fuser.
            x: (B, columns).
            given: the layers' arguments after x: nothing, or a context.
        """
        if not may_run(x, given):
            return None
        context = given[0] if given else None
        key = (columns, 0 if context is None else int(context.shape[1]), inverse, prior)
        if torch.compiler.is_compiling():
            return self._run_traced(root, x, context, key)
        if self.frozen and (kept := self.snapshots.get((key, x.dtype, x.device))):
            return operator(x, context, *kept)
        # replicas of DataParallel share their fuser
        now = self.now(root) if self.root() is root else None
        if now is None or not fits(x, now[1]):
            return None
        structure, weights = now
        if structure.whole is None:
            return structure.run_parts(x, given, key, weights) if prior is None else None
        if self.frozen:
            return self._run_frozen(structure.whole, x, context, key, weights)
        return structure.whole.call(x, context, key, weights)

    def now(self, root: nn.Module | None) -> tuple[Structure, list[Tensor]] | None:
        """Return what the module is made of now, and its parameters."""
        if root is None:
            return None
        structure = self.structure
        weights = None if structure is None else structure.look.watch.weights(root)
        if structure is None or weights is None:
            structure = self.structure = Structure(root)
            weights = structure.look.watch.weights(root)
        return None if weights is None else (structure, weights)

    def _run_traced(self, root: nn.Module, x: Tensor, context: Tensor | None, key: Key) -> Result | None:
        if exporting() or not self.prepare(*key):
            return None
        assert self.structure is not None and self.structure.whole is not None
        run, inverse = self.structure.whole, key[2]
        if not inverse and any([at(root, path).may_start for path, _ in run.starts]):
            return None
        weights = self.structure.look.watch.traced_weights(root)
        if not all([w.dtype == x.dtype and w.device == x.device for w in weights]):
            return None
        tensors = [weights[place] for place in run.places]
        for path, _, compute in run.computed:
            tensors += compute(at(root, path), inverse)
        return operator(x, context, tensors, run.codes[key])

    def _run_frozen(
        self, run: Run, x: Tensor, context: Tensor | None, key: Key, weights: list[Tensor]
    ) -> Result | None:
        code = run.code(key, weights)
        if code is None:
            return None
        # a tensor that is made in inference mode cannot be saved for a backward
        with torch.inference_mode(False), torch.no_grad():
            kept = [tensor.detach() for tensor in run.tensors(weights, key[2])], code
        self.snapshots[key, x.dtype, x.device] = kept
        return operator(x, context, *kept)


class Left(NamedTuple):
    """A layer that runs as it is, and why."""

    path: Path
    layer: nn.Module
    why: NoInstruction


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
                    self.parts.append(Left(path, layer, why))
        except NoInstruction as why:
            self.parts.append(Left((), root, why))
        self._close()
        if self.look.recomputing and len(self.parts) > 1:
            self._leave_all("its ReversibleSequential recomputes, so it is fused whole or not at all")
        alone = self.parts[0] if len(self.parts) == 1 else None
        self.whole = alone if isinstance(alone, Run) else None
        self.fuses = any(isinstance(part, Run) for part in self.parts)

    def run_parts(self, x: Tensor, given: tuple[Any, ...], key: Key, parameters: list[Tensor]) -> Result | None:
        """Return what the layers do, with runs as programs; None if there are no runs."""
        if not self.fuses:
            return None
        context, inverse = given[0] if given else None, key[2]
        total: Any = 0
        for part in reversed(self.parts) if inverse else self.parts:
            result: Any = None
            if isinstance(part, Left):
                layer: Any = part.layer
                result = layer.inverse(x, *given) if inverse else layer(x, *given)
            elif may_run(x, given) and fits(x, parameters):
                result = part.call(x, context, (x.shape[1], *key[1:]), parameters)
            x, logdet = part.call_layers(x, given, inverse) if isinstance(part, Run) and result is None else result
            total = logdet + total
        return x, total

    def _close(self) -> None:
        """End the current run; one without a conditioner is left."""
        run, self.look.run = self.look.run, Run()
        if run.conditioners:
            self.parts.append(run)
        elif run.layers:
            self.parts += [_left(path, layer, "no conditioner is beside it") for path, layer in run.layers]

    def _leave_all(self, reason: str) -> None:
        layers = [part.layers if isinstance(part, Run) else [part] for part in self.parts]
        self.parts = [
            each if isinstance(each, Left) else _left(*each, reason) for part in layers for each in part
        ]  # fmt: skip


def _left(path: Path, layer: nn.Module, reason: str) -> Left:
    return Left(path, layer, NoInstruction(path, layer, reason))


def explain(root: nn.Module) -> str:
    """Return a line for each run of layers and for each layer that is left, with the reason."""
    lines = [_line(part) for part in Structure(root).parts]
    like = next(root.parameters(), None)
    if like is not None and not has_kernel(like):
        lines.insert(0, f"on {like.device} with pyflow.backend {_backend.current()!r} no program runs, but every layer")
    return "\n".join(lines)


def _line(part: Run | Left) -> str:
    if isinstance(part, Run):
        (first, _), (last, _) = part.layers[0], part.layers[-1]
        where = _name(first) if first == last else f"{_name(first)} to {_name(last)}"
        classes = Counter(type(layer).__name__ for _, layer in part.layers)
        instructions = Counter(type(each).__name__ for each in _instructions(part))
        return f"{where}: fused, {_counted(classes)} as {_counted(instructions)}"
    why = part.why
    cause = "" if why.module is part.layer else f"{_name(why.path)} ({type(why.module).__name__}): "
    return f"{_name(part.path)} ({type(part.layer).__name__}): left, {cause}{why.reason}"


def _instructions(run: Run) -> tuple[Any, ...]:
    # the kinds of instructions do not depend on the number of columns
    try:
        return run.program(2, 0, False).instructions
    except DoesNotFit:
        return run.program(2, 1, False).instructions


def _counted(names: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in names.items())


def _name(path: Path) -> str:
    return ".".join(path) or "the flow"


def may_run(x: Any, given: tuple[Any, ...]) -> bool:
    """Whether an operator can take these inputs here, and modules are called without anything that watches them."""
    if type(x) not in PLAIN or x.layout is not torch.strided or x.is_nested or x.dim() != 2:
        return False
    if x.dtype not in (torch.float32, torch.float64) or under_transform() or any_global_module_hook():
        return False
    if given:
        context = given[0]
        fit = len(given) == 1 and type(context) in PLAIN and context.layout is torch.strided and not context.is_nested
        if not fit or context.dim() != 2 or context.dtype is not x.dtype or context.device != x.device:
            return False
        if context.shape[0] != x.shape[0] or context.shape[1] == 0:
            return False
    return has_kernel(x)


def has_kernel(x: Tensor) -> bool:
    """Whether programs have a kernel for tensors like x on the backend that is chosen."""
    try:
        return not _backend.runs_reference("flow_program", x, cuda=False, triton=False)
    # a layer says so in its own name
    except _backend.BackendUnavailable:
        return False


def fits(x: Tensor, parameters: list[Tensor]) -> bool:
    """Whether all are plain tensors of x's dtype on its device."""
    dtype = x.dtype
    if not PLAIN.issuperset(map(type, parameters)) or not all([each.dtype is dtype for each in parameters]):
        return False
    # costs half of a comparison of devices
    if x.is_cpu:
        return all([each.is_cpu for each in parameters])
    device = x.device
    return all([each.device == device for each in parameters])
