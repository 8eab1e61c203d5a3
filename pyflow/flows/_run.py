"""A run: layers one after the other that one program runs, and whether it may."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .. import _backend
from .. import program as p
from .._autograd import pick
from .._checks import uncast
from .._operators import TENSORS
from .._schemas import PRIORS
from .._torch import any_global_module_hook, under_transform
from ..ops.flow_program import code_of
from ..ops.flow_program import run as run_program
from ._watch import Path, at

Write = Callable[["Writer"], None]
Parts = Sequence[p.Part]
Key = tuple[int, int, bool, "str | None"]  # columns, columns of the context, inverse, prior
Result = tuple[Tensor, Tensor]
F = TypeVar("F", bound=Callable[..., Any])

BASE = "base"  # in place of a prior: the base distribution that the run has
NO_CONTEXT = "the context is no matrix of x's dtype and device with a row for each of x"


class DoesNotFit(Exception):
    """The layers do not take this input; running them says why."""


class Conditioner(NamedTuple):
    """A network that a transform is computed by.

    Attributes:
        given: its parts when it is called with a context; None if it takes none.
        alone: its parts without; None if it needs one.
        joins: whether a context is among the inputs of the first part.
        blind: whether it reads nothing but the context.
    """

    given: tuple[p.Part, ...] | None
    alone: tuple[p.Part, ...] | None
    joins: bool = False
    blind: bool = False


class Writer:
    """Instructions in the order of writing.

    Attributes:
        order: which column of the state is each column of the input of the next layer.
        context: columns of the context, 0 for none.
        inverse: direction of the layers.
    """

    def __init__(self, columns: int, context: int, inverse: bool) -> None:
        self.order = tuple(range(columns))
        self.context, self.inverse = context, inverse
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

    def at(self, places: Sequence[int]) -> p.Columns:
        """Return the columns at these places of the next layer's input."""
        return tuple([self.order[place] for place in places])

    def fit(self, columns: int) -> None:
        """Require so many columns."""
        if columns != len(self.order):
            raise DoesNotFit

    def permute(self, places: Sequence[int]) -> None:
        """Let the next layer see the columns at these places."""
        self.fit(len(places))
        self.order = self.at(places)

    def within(self, columns: p.Columns, write: Write) -> None:
        """Write a layer of some columns, which it does not permute."""
        order, self.order = self.order, columns
        write(self)
        self.order = order

    def net(self, kept: p.Columns, net: Conditioner, before: Parts = (), after: Parts = ()) -> None:
        """Write a network of some columns, between more parts."""
        self.add(self.net_of(kept, net, before, after))

    def net_of(self, kept: p.Columns, net: Conditioner, before: Parts = (), after: Parts = ()) -> p.Net:
        parts = net.given if self.context else net.alone
        if parts is None:
            raise DoesNotFit
        joins = net.joins and self.context > 0
        return p.Net(() if net.blind else kept, joins, (*before, *parts, *after))


Compute = Callable[[Any, bool, int], tuple[Tensor, ...]]  # of a layer, the direction and the number of columns
Many = Callable[[Sequence[Any], bool, int], "list[tuple[Tensor, ...]]"]

# what computes the weights of many layers as one, and of which layers: those with the same key
_TOGETHER: dict[Compute, tuple[Many, Callable[[Any], Any]]] = {}


def together(compute: Compute, key: Callable[[Any], Any]) -> Callable[[F], F]:
    """Register what does the work of `compute` for many layers: small tensors cost their launches."""

    def add(many: F) -> F:
        _TOGETHER[compute] = many, key
        return many

    return add


class Computed(NamedTuple):
    """Weights that a layer computes from its tensors at every call."""

    path: Path
    layer: nn.Module
    compute: Compute
    flipped: bool  # whether its direction is not the run's


class Start(NamedTuple):
    """A layer that runs as it is while a batch has to initialise it."""

    path: Path
    layer: nn.Module
    pending: Callable[[Any, bool], bool]  # of the layer and the direction
    flipped: bool


class Base(NamedTuple):
    """The base distribution of a run's results, and how many places and computed weights there are without it."""

    write: Write
    places: int
    computed: int


class Run:
    """Layers one after the other that one program runs.

    Attributes:
        layers: with their paths.
        writes: what writes the instructions of each.
        places: those of the program's weights among all tensors that are watched, and behind them from the end the
            `n_computed` that are computed.
        computed: what computes these.
        starts: layers that the first batch may initialise.
        conditioners: how many networks it has.
        base: the base distribution, if the run ends with it.
        columns, context: for how many columns it is, of x (or at least) and of the context; 0 if it does not matter.
        checks: whether nan may stand for an error of a layer.
        masks: of the weights at some places, as they were looked at.
    """

    def __init__(self) -> None:
        self.layers: list[tuple[Path, Any]] = []
        self.writes: list[Write] = []
        self.places: list[int] = []
        self.computed: list[Computed] = []
        self.starts: list[Start] = []
        self.conditioners = self.n_computed = self.columns = self.context = 0
        self.base: Base | None = None
        self.checks = False
        self.masks: dict[int, Tensor] = {}
        self.codes: dict[Key, str | None] = {}
        self._picks: dict[bool, Callable[[list[Tensor]], list[Tensor]]] = {}

    def program(self, columns: int, context: int, inverse: bool, prior: str | None = None) -> p.Program:
        """Return the program; raise DoesNotFit if the layers do not take a context, or need one."""
        writer = Writer(columns, context, inverse)
        for write in reversed(self.writes) if inverse else self.writes:
            write(writer)
        if prior is None:
            return p.Program(columns, context, writer.order, tuple(writer.instructions))
        # nothing but the density is stored
        if prior != BASE:
            writer.add(p.Prior(writer.order, PRIORS.index(prior)))
        elif self.base is None:
            raise DoesNotFit
        else:
            self.base.write(writer)
        return p.Program(columns, context, (), tuple(writer.instructions))

    def code(self, key: Key, tensors: list[Tensor]) -> str | None:
        """Return the program's code, None if the layers do not take such an input."""
        if key not in self.codes:
            try:
                program = self.program(*key)
                with torch.no_grad():
                    self.codes[key] = code_of(program, self.weights(tensors, key))
            except (DoesNotFit, ValueError):
                self.codes[key] = None
        return self.codes[key]

    def weights(self, tensors: list[Tensor], key: Key) -> list[Tensor]:
        """Return the weights of the program."""
        of_base = key[3] == BASE
        if of_base not in self._picks:
            self._picks[of_base] = pick(self._parts(of_base)[0])
        every = tensors if not self.computed else [*tensors, *self.made(key, tensors)]
        return [*self._picks[of_base](every)]

    def traced_weights(self, root: nn.Module, tensors: list[Tensor], key: Key) -> list[Tensor]:
        """Return the same in a trace of dynamo, which does not trace what `pick` returns."""
        every = [*tensors, *self.made(key, tensors, root)]
        return [every[place] for place in self._parts(key[3] == BASE)[0]]

    def made(self, key: Key, tensors: list[Tensor], root: nn.Module | None = None) -> list[Tensor]:
        """Return the weights that are computed, the last one first; from layers below the root if it is given."""
        columns, _, inverse, prior = key
        computed = self._parts(prior == BASE)[1]
        if not computed:
            return []
        # layers with the same numbers to compute, by what computes them
        groups: dict[Any, list[tuple[int, Any]]] = {}
        for i, (path, layer, compute, flipped) in enumerate(computed):
            here, which = layer if root is None else at(root, path), inverse != flipped
            of_many = _TOGETHER.get(compute)
            groups.setdefault((compute, which, i if of_many is None else of_many[1](here)), []).append((i, here))
        made: list[tuple[Tensor, ...]] = [()] * len(computed)
        # autocast would cast products of matrices
        casts = tensors[0].is_cpu and torch.is_autocast_enabled("cpu")
        with uncast(tensors[0]) if casts else contextlib.nullcontext():
            for (compute, which, _), group in groups.items():
                if len(group) == 1:
                    made[group[0][0]] = compute(group[0][1], which, columns)
                    continue
                results = _TOGETHER[compute][0]([layer for _, layer in group], which, columns)
                for (i, _), result in zip(group, results, strict=True):
                    made[i] = result
        return [tensor for tensors_of_layer in made for tensor in tensors_of_layer][::-1]

    def _parts(self, of_base: bool) -> tuple[list[int], list[Computed]]:
        """Return places and computed weights, with those of the base distribution or without."""
        if of_base or self.base is None:
            return self.places, self.computed
        return self.places[: self.base.places], self.computed[: self.base.computed]

    def waits(self, inverse: bool) -> bool:
        """Whether a batch has to initialise a layer."""
        return any([pending(layer, inverse != flipped) for _, layer, pending, flipped in self.starts])

    def call(self, x: Tensor, context: Tensor | None, repeats: int, key: Key, tensors: list[Tensor]) -> Result | None:
        """Return what the layers do, None if they have to run."""
        if self.starts and self.waits(key[2]):
            return None
        code = self.code(key, tensors)
        if code is None:
            return None
        result = run_program(x, context, repeats, self.weights(tensors, key), code)
        return None if self.checks and bool(result[1].isnan().any()) else result

    def call_layers(self, x: Tensor, given: tuple[Any, ...], inverse: bool) -> Result:
        """Return what the layers do, layer by layer."""
        total: Any = 0
        for _, layer in reversed(self.layers) if inverse else self.layers:
            x, logdet = call_layer(layer, x, given, inverse)
            total = logdet + total
        return x, total


def call_layer(layer: Any, x: Tensor, given: tuple[Any, ...], inverse: bool, lazy: bool = False) -> Result:
    if not lazy and not hasattr(type(layer), "inv"):
        result: Result = layer.inverse(x, *given) if inverse else layer(x, *given)
        return result
    # zuko's return their transform
    transform = layer(*given)
    y, logdet = (transform.inv if inverse else transform).call_and_ladj(x)
    return y, logdet.flatten(1).sum(1) if logdet.dim() > 1 else logdet


def why_not(x: Any, given: tuple[Any, ...], shared: bool = False) -> str:
    """Return why no operator can take these inputs here, empty if one can.

    `shared`: rows of x may share a row of the context.
    """
    if type(x) not in TENSORS or x.layout is not torch.strided or x.is_nested or x.dim() != 2:
        return "x is no matrix"
    if x.dtype not in (torch.float32, torch.float64):
        return f"x is {x.dtype}".replace("torch.", "")
    if under_transform():
        return "a transform of torch.func is active"
    if any_global_module_hook():
        return "there are hooks of all modules"
    if given:
        context = given[0]
        fit = len(given) == 1 and type(context) in TENSORS and context.layout is torch.strided and not context.is_nested
        if not fit or context.dim() != 2 or context.dtype is not x.dtype or context.device != x.device:
            return NO_CONTEXT
        if context.shape[1] == 0 or (not shared and context.shape[0] != x.shape[0]):
            return NO_CONTEXT
    if not has_kernel(x):
        return f"{x.device.type} has no kernel with pyflow.backend {_backend.current()!r}"
    return ""


def repeated(context: Tensor, lead: tuple[int, ...]) -> tuple[Tensor, int]:
    """Return the context (..., C) of rows with these leading dims as (R, C), and how often each row repeats.

    Row r of x has the row r // repeats % R.
    """
    own = (*[1] * (len(lead) + 1 - context.dim()), *context.shape[:-1])
    differ = [i for i, n in enumerate(own) if n != 1]
    first, last = (differ[0], differ[-1] + 1) if differ else (0, 0)
    block, size = lead[first:last], context.shape[-1]
    # no copy, unless two of its dims differ with one between them that it shares
    rows = context.reshape(*own[first:last], size).expand(*block, size).reshape(math.prod(block), size)
    return rows, max(1, math.prod(lead[last:]))


def has_kernel(x: Tensor) -> bool:
    """Whether programs have a kernel for tensors like x on the backend that is chosen."""
    # no GPU has run Triton's kernel of programs yet: it runs where it is asked for
    if x.device.type != "cpu" and _backend.current() == "auto":
        return False
    try:
        return not _backend.runs_reference("flow_program", x, cuda=False)
    # the layer raises this, with its own name
    except _backend.BackendUnavailable:
        return False


def fits(x: Tensor, tensors: list[Tensor]) -> bool:
    """Whether all are plain tensors of x's dtype on its device."""
    dtype = x.dtype
    if not TENSORS.issuperset(map(type, tensors)) or not all([each.dtype is dtype for each in tensors]):
        return False
    # costs half of a comparison of devices
    if x.is_cpu:
        return all([each.is_cpu for each in tensors])
    device = x.device
    return all([each.device == device for each in tensors])
