"""A run: layers one after the other that one program runs, and whether it may."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _backend
from .. import program as p
from .._autograd import pick
from .._schemas import PRIORS
from .._torch import any_global_module_hook, under_transform
from ..ops.flow_program import _run as run_program
from ..ops.flow_program import code_of
from ._watch import Path

Write = Callable[["Tape"], None]
Key = tuple[int, int, bool, "str | None"]  # columns, columns of the context, inverse, prior
Result = tuple[Tensor, Tensor]

PLAIN = frozenset((Tensor, nn.Parameter))


class DoesNotFit(Exception):
    """The layers do not take this input; running them says why."""


class Tape:
    """Instructions in the order of writing.

    Attributes:
        order: which column of the state is each column of the input of the next layer.
        context: columns of the context, 0 for none.
        inverse: direction of the layers.
        computed: place of the first weight that is computed at every call.
    """

    def __init__(self, columns: int, context: int, inverse: bool, computed: int) -> None:
        self.order = tuple(range(columns))
        self.context, self.inverse, self.computed = context, inverse, computed
        self.instructions: list[p.Instruction] = []

    def add(self, instruction: p.Instruction) -> None:
        self.instructions.append(instruction)

    def split(self, split: str) -> tuple[p.Columns, p.Columns]:
        """Return the two parts of the columns, as `pyflow.nn._split` does."""
        half = (len(self.order) + 1) // 2
        if split == "interleave":
            return self.order[::2], self.order[1::2]
        return self.order[:half], self.order[half:]

    def join(self, first: p.Columns, second: p.Columns, split: str) -> None:
        """Let the next layer see two parts as one input, the inverse of `split`."""
        order = [*first, *second]
        if split == "interleave":
            order[::2], order[1::2] = first, second
        self.order = tuple(order)

    def conditioner(self, kept: p.Columns, context: bool, layers: tuple[p.Dense, ...]) -> None:
        # a network that takes a context needs one, and others take none
        if context != bool(self.context):
            raise DoesNotFit
        self.add(p.Net(kept, context, layers))


class Computed(NamedTuple):
    """Weights that a layer computes from its parameters at every call."""

    path: Path
    layer: nn.Module
    compute: Callable[[Any, bool], tuple[Tensor, ...]]  # of the layer and the direction


class Run:
    """Layers one after the other that one program runs.

    Attributes:
        layers: with their paths.
        writes: what writes the instructions of each.
        places: those of the program's weights among all parameters that are watched.
        computed: of its weights behind these; `n_computed` tensors.
        starts: layers that the first batch may initialise.
        conditioners: how many networks it has.
    """

    def __init__(self) -> None:
        self.layers: list[tuple[Path, Any]] = []
        self.writes: list[Write] = []
        self.places: list[int] = []
        self.computed: list[Computed] = []
        self.starts: list[tuple[Path, Any]] = []
        self.conditioners = self.n_computed = 0
        self.codes: dict[Key, str | None] = {}
        self._pick: Callable[[list[Tensor]], list[Tensor]] | None = None

    def program(self, columns: int, context: int, inverse: bool, prior: str | None = None) -> p.Program:
        """Return the program; raise DoesNotFit if the layers do not take a context, or need one."""
        tape = Tape(columns, context, inverse, len(self.places))
        for write in reversed(self.writes) if inverse else self.writes:
            write(tape)
        if prior is None:
            return p.Program(columns, context, tape.order, tuple(tape.instructions))
        # nothing but the density is stored
        tape.add(p.Prior(tape.order, PRIORS.index(prior)))
        return p.Program(columns, context, (), tuple(tape.instructions))

    def code(self, key: Key, parameters: list[Tensor]) -> str | None:
        """Return the program's code, None if the layers do not take such an input."""
        if key not in self.codes:
            try:
                program = self.program(*key)
                with torch.no_grad():
                    self.codes[key] = code_of(program, self.tensors(parameters, key[2]))
            except (DoesNotFit, ValueError):
                self.codes[key] = None
        return self.codes[key]

    def tensors(self, parameters: list[Tensor], inverse: bool) -> list[Tensor]:
        """Return the weights of the program."""
        if self._pick is None:
            self._pick = pick(self.places)
        tensors = [*self._pick(parameters)]
        for _, layer, compute in self.computed:
            tensors += compute(layer, inverse)
        return tensors

    def call(self, x: Tensor, context: Tensor | None, key: Key, parameters: list[Tensor]) -> Result | None:
        """Return what the layers do, None if they have to run."""
        inverse = key[2]
        if not inverse and any([layer.is_pending for _, layer in self.starts]):
            return None
        code = self.code(key, parameters)
        return None if code is None else run_program(x, context, self.tensors(parameters, inverse), code)

    def call_layers(self, x: Tensor, given: tuple[Any, ...], inverse: bool) -> Result:
        """Return what the layers do, layer by layer."""
        total: Any = 0
        for _, layer in reversed(self.layers) if inverse else self.layers:
            x, logdet = layer.inverse(x, *given) if inverse else layer(x, *given)
            total = logdet + total
        return x, total


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
