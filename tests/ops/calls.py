"""Calls of the public operations with drawn shapes, strides, dtypes, options and wrong arguments.

`calls(op)` is a hypothesis strategy. The file of a family in fuzz/ draws the calls of its operations; those of an
operation whose arguments are tensors of one shape, flags, numbers and event_dims are drawn from its signature.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

import pyflow

Draw = Callable[[st.SearchStrategy], object]

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LENGTHS = (1, 2, 3, 5, 8, 17, 33, 64, 130)
SPREADS = (1.0, 0.0, 0.05, 8.0, 1e3, 1e-6)
MARGIN = 64  # elements around every tensor that must stay as they are

# what is put in the place of an argument to see it refused
WRONG = (
    None, True, "text", "", (), -1, 0, 1, 2**70, -0.5, math.nan, math.inf, 1e40, 1e-46, 1j, object(), torch.float16,
    torch.zeros(3, dtype=torch.complex64), torch.zeros(2, 3, dtype=torch.int32), torch.zeros(3, dtype=torch.bool),
    torch.zeros(()), torch.tensor(7), torch.zeros(0), torch.zeros(2, 2, device="meta"), torch.zeros(2, 3).to_sparse(),
)  # fmt: skip


@dataclass
class Call:
    """One call: what it is given, and how its answer is held to the reference's."""

    op: str
    args: list[object]
    options: dict[str, object] = field(default_factory=dict)
    exact: bool = False  # bit for bit
    rounds: Callable[[], Iterator[Call]] | None = None  # calls whose digits count as well, within rounding
    scale: Callable[[], float] | None = None  # what errors are relative to beside the answer; else the largest input
    unitless: bool = False  # the unit of its inputs cancels, so that gradients are relative to scale / input

    def tensors(self) -> list[Tensor]:
        return list(tensors_in([self.args, self.options]))

    def __repr__(self) -> str:
        arguments = [*map(shown, self.args), *(f"{name}={shown(value)}" for name, value in self.options.items())]
        return f"{self.op}({', '.join(arguments)})"


def tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def shown(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return repr(value)
    grad = ", grad" * value.requires_grad
    return f"<{str(value.dtype)[6:]} {tuple(value.shape)} strides {value.stride()} on {value.device}{grad}>"


class Hand:
    """Draws tensors and numbers; the first of every choice is the plainest, which is what hypothesis shrinks to."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw

    def one(self, *choices: object) -> object:
        return self.draw(st.sampled_from(choices))

    def maybe(self) -> bool:
        return self.draw(st.booleans())

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def batch(self) -> int:
        return self.one(*LENGTHS, 0)

    def shape(self, least: int = 1, most: int = 4) -> tuple[int, ...]:
        """Few enough elements to be quick, some of these shapes without any."""
        shape: tuple[int, ...] = ()
        for _ in range(self.number(least, most)):
            room = 4096 // max(1, math.prod(shape))
            shape += (self.one(*(n for n in LENGTHS if n <= room or n == 1), 0),)
        return shape

    def dtype(self) -> torch.dtype:
        return self.one(*FLOATS)

    def values(self, shape: tuple[int, ...]) -> Tensor:
        """Normal, in one of the spreads, sometimes with a NaN, an infinity or a zero in it; float64."""
        source = torch.Generator().manual_seed(self.number(0, 2**31))
        values = self.one(*SPREADS) * torch.randn(shape, generator=source, dtype=torch.float64)
        if values.numel() and self.one(False, False, False, False, True):
            values.view(-1)[self.number(0, values.numel() - 1)] = self.one(0.0, math.nan, math.inf, -math.inf)
        return values

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype | None = None, grad: bool | None = None) -> Tensor:
        """In any layout that a view can have."""
        dtype = dtype or self.dtype()
        values = self.values(shape).to(dtype)
        tensor = self.laid_out(values)
        return tensor.requires_grad_() if (self.maybe() if grad is None else grad) else tensor

    def laid_out(self, values: Tensor) -> Tensor:
        """The values as a view into larger memory, of which `base` finds all."""
        order = self.draw(st.permutations(range(values.dim()))) if self.maybe() else list(range(values.dim()))
        steps = [self.one(1, 1, 1, 2, 3) for _ in order]
        if values.dim() and self.one(False, False, False, True):
            # stride 0, as expand gives it
            dim = self.number(0, values.dim() - 1)
            values = values.narrow(dim, 0, min(1, values.shape[dim])).expand(values.shape)
            stretched = dim
        else:
            stretched = None
        strides, room = [0] * values.dim(), 1
        for dim in order:
            if dim != stretched:
                strides[dim], room = room * steps[dim], room * steps[dim] * max(1, values.shape[dim])
        memory = torch.full((room + 2 * MARGIN,), 77, dtype=values.dtype)
        view = memory.as_strided(values.shape, strides, MARGIN)
        if stretched is not None:
            view.narrow(stretched, 0, min(1, values.shape[stretched])).copy_(
                values.narrow(stretched, 0, min(1, values.shape[stretched]))
            )
        else:
            view.copy_(values)
        return view

    def mask(self, shape: tuple[int, ...]) -> Tensor | None:
        if self.maybe():
            return None
        kept = [n if self.maybe() else 1 for n in shape][self.number(0, len(shape)) :]
        source = torch.Generator().manual_seed(self.number(0, 2**31))
        mask = torch.rand(kept, generator=source) < self.one(0.5, 0.0, 1.0)
        return mask.to(self.one(torch.bool, torch.bool, torch.float32, torch.int32))

    def seed(self, batch: int | None = None) -> int | Tensor:
        """A number, a tensor, or one stream per sample."""
        number = self.number(0, 2**63 - 1)
        kinds = ("number", "tensor") if batch is None else ("number", "tensor", "streams")
        kind = self.one(*kinds)
        if kind == "streams":
            return pyflow.ops.sample_seeds(number, batch, self.one(0, 7, 2**40))
        return torch.tensor(number) if kind == "tensor" else number

    def step(self) -> int | Tensor:
        step = self.one(0, 1, 2**32 - 1, 2**32, 2**56 - 1)
        return torch.tensor(step) if self.maybe() else step

    def streams(self, shape: tuple[int, ...]) -> dict[str, object]:
        return {"seed": self.seed(shape[0]), "step": self.step()}

    def scalar(self, batch: int, *numbers: float) -> float | Tensor:
        """A number, the same as a tensor, or one per sample."""
        kind, number = self.one("number", "tensor", "per sample"), self.one(*numbers)
        if kind == "number":
            return number
        dtype = self.one(torch.float32, torch.float64)
        if kind == "tensor":
            return torch.tensor(number, dtype=dtype, requires_grad=self.maybe())
        return torch.linspace(0.5, 1.0, batch, dtype=dtype).mul_(number).requires_grad_(self.maybe())


DRAWERS: dict[str, Callable[[Hand], Call]] = {}


def drawer(function: Callable[[Hand], Call]) -> Callable[[Hand], Call]:
    """Of the operation with the function's name."""
    DRAWERS[function.__name__] = function
    return function


# annotation of an argument -> what is drawn for it
KINDS: dict[str, Callable[[Hand, tuple[int, ...]], object]] = {
    "Tensor": lambda hand, shape: hand.tensor(shape),
    "Tensor | None": lambda hand, shape: None if hand.maybe() else hand.tensor(shape),
    "bool": lambda hand, shape: hand.maybe(),
    "float": lambda hand, shape: hand.one(1.0, 0.5, 2, 30.0),
    # event_dims
    "int | None": lambda hand, shape: hand.one(None, *range(len(shape) + 1)),
}


def by_signature(op: str) -> Callable[[Hand], Call] | None:
    """The drawer of an operation without its own; None if it has arguments of other kinds."""
    parameters = inspect.signature(getattr(pyflow.ops, op)).parameters.values()
    if any(p.annotation not in KINDS for p in parameters):
        return None

    def drawn(hand: Hand) -> Call:
        shape = hand.shape()
        named = {p.name: KINDS[p.annotation](hand, shape) for p in parameters}
        given = [named.pop(p.name) for p in parameters if p.kind is not p.KEYWORD_ONLY]
        return Call(op, given, named)

    return drawn


@st.composite
def calls(draw: Draw, op: str) -> Call:
    """A call of this operation, one in five with something wrong in it."""
    hand = Hand(draw)
    call = DRAWERS[op](hand)
    if hand.one(False, False, False, False, True):
        # a flag may be anything that is true or false
        flags = {name for name, value in call.options.items() if isinstance(value, bool)}
        place = hand.one(*range(len(call.args)), *sorted(call.options.keys() - flags))
        (call.args if isinstance(place, int) else call.options)[place] = hand.one(*WRONG)
        call.rounds = call.scale = None
    return call
