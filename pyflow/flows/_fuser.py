"""Runs the layers of a flow as programs: `pyflow.ops.flow_program`, one call for many layers."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import evaluated_while_traced, exporting
from ..ops.flow_program import run as run_program
from ._run import Key, Result, Run, fits, why_not
from ._structure import Structure
from ._watch import at


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
        self.other: Structure | None = None  # of the same modules, as they were before a change of mode
        self.snapshots: dict[Any, tuple[list[Tensor], str]] = {}
        here = weakref.ref(self)

        @evaluated_while_traced
        def prepare(*key: Any) -> bool:
            """Look at the module as it is now, in a trace of dynamo; return whether one program runs all of it."""
            fuser = here()
            assert fuser is not None
            now = fuser.now(fuser.root())
            run = None if now is None else now[0].whole
            if now is None or run is None or run.checks or run.waits(key[2]):
                return False
            return run.code(key, now[1]) is not None

        self.prepare = prepare

    def __reduce__(self) -> tuple[Any, ...]:
        return Fuser, (None, self.frozen)

    def run(
        self, root: nn.Module, x: Tensor, given: tuple[Any, ...], columns: int, inverse: bool = False,
        prior: str | None = None, repeats: int | None = None,
    ) -> Result | None:  # fmt: skip
        """Return (y, logdet), with a prior (nothing, log-density); None where the layers have to run.

        Args:
            root: the module that owns this fuser.
            x: (B, columns).
            given: the layers' arguments after x: nothing, or a context (R, C).
            repeats: row r of x has the row r // repeats % R of the context; None: its own.
        """
        if why_not(x, given, repeats is not None):
            return None
        repeats = repeats or 1
        context = given[0] if given else None
        key = (columns, 0 if context is None else int(context.shape[1]), inverse, prior)
        if torch.compiler.is_compiling():
            return self._run_traced(root, x, context, repeats, key)
        if self.frozen and (kept := self.snapshots.get((key, x.dtype, x.device))):
            return run_program(x, context, repeats, *kept)
        # replicas of DataParallel share their fuser
        now = self.now(root) if self.root() is root else None
        if now is None or not fits(x, now[1]):
            return None
        structure, weights = now
        if structure.whole is None:
            return structure.run_parts(x, given, repeats, key, weights) if prior is None else None
        if self.frozen and not structure.whole.checks:
            return self._run_frozen(structure.whole, x, context, repeats, key, weights)
        return structure.whole.call(x, context, repeats, key, weights)

    def why_not(self, root: nn.Module, x: Any, given: tuple[Any, ...], shared: bool = False) -> str:
        """Return why the layers have to run with these inputs, after `run` has returned None."""
        structure = self.structure
        if structure is not None and not structure.fuses:
            return structure.first_left
        if (reason := why_not(x, given, shared)) or (now := self.now(root)) is None:
            return reason or "its modules have changed"
        structure, weights = now
        if not fits(x, weights):
            return "its parameters are not plain tensors of x's dtype and device"
        if structure.first_left:
            return structure.first_left
        if structure.whole is not None and structure.whole.starts:
            return "a batch has to initialise its layers"
        return "its layers do not take this input as it is"

    def now(self, root: nn.Module | None) -> tuple[Structure, list[Tensor]] | None:
        """Return what the module is made of now, and its parameters."""
        if root is None:
            return None
        for structure in (self.structure, self.other):
            weights = None if structure is None else structure.look.watch.weights(root)
            if structure is not None and weights is not None:
                if structure is not self.structure:
                    self.structure, self.other = structure, self.structure
                return structure, weights
        structure, before = Structure(root), self.structure
        # training and evaluation take turns; modules that were replaced are let go
        keeps = before is not None and {*before.look.watch.modules} <= {*root.modules()}
        self.structure, self.other = structure, before if keeps else None
        weights = structure.look.watch.weights(root)
        return None if weights is None else (structure, weights)

    def _run_traced(self, root: nn.Module, x: Tensor, context: Tensor | None, repeats: int, key: Key) -> Result | None:
        if exporting() or not self.prepare(*key):
            return None
        assert self.structure is not None and self.structure.whole is not None
        run, inverse, code = self.structure.whole, key[2], self.structure.whole.codes[key]
        assert code is not None
        # what may have to be initialised by the next call is guarded
        if not inverse and any([getattr(at(root, start.path), "may_start", False) for start in run.starts]):
            return None
        weights = self.structure.look.watch.traced_weights(root)
        if not all([w.dtype == x.dtype and w.device == x.device for w in weights]):
            return None
        return run_program(x, context, repeats, run.traced_weights(root, weights, key), code)

    def _run_frozen(
        self, run: Run, x: Tensor, context: Tensor | None, repeats: int, key: Key, weights: list[Tensor]
    ) -> Result | None:
        code = None if run.waits(key[2]) else run.code(key, weights)
        if code is None:
            return None
        # a tensor that is made in inference mode cannot be saved for a backward
        with torch.inference_mode(False), torch.no_grad():
            kept = [tensor.detach() for tensor in run.weights(weights, key)], code
        self.snapshots[key, x.dtype, x.device] = kept
        return run_program(x, context, repeats, *kept)
