"""The schedule of an autoregressive inverse: which columns it knows after which, from the masks of its net alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import program as p

# the mask of a layer, (size, inputs); None for one without
Mask = Callable[[p.Dense], "Tensor | None"]


def autoregressive(net: p.Net, transform: p.Transform, context: int, mask: Mask) -> p.Autoregressive | None:
    """Return the instruction that solves x_c = transform(y_c; net(x)); None if the masks do not let it.

    Args:
        net, transform: see `pyflow.program.Autoregressive`; the net's masks need not have places among weights.
        context: columns of the program's context.
        mask: the mask of a layer of the net.
    """
    inputs = [*net.columns, *[-1] * (context if net.context else 0)]
    reach = torch.tensor([[i == c for c in transform.columns] for i in inputs], device="cpu")
    of_numbers = torch.tensor(p.columns_of_numbers(transform), device="cpu")
    reach = _reach(net.parts, reach.view(len(inputs), len(transform.columns)).float(), mask)
    n = len(transform.columns)
    depends = reach.new_zeros(n, n).index_add(0, of_numbers, reach) > 0
    generations = _longest_paths(depends)
    if generations is None:
        return None
    known = dict(zip(transform.columns, generations, strict=True))
    levels = torch.tensor([known.get(i, 0) for i in inputs], device="cpu")
    inverse = p.Autoregressive(net, transform, tuple(generations), ())
    found = _Levels(mask).settle(net.parts, levels, torch.tensor(p.number_levels(inverse), device="cpu"))
    return None if found is None else inverse._replace(levels=found)


def _reach(parts: Sequence[p.Part], reach: Tensor, mask: Mask) -> Tensor:
    """Return which columns each of the numbers depends on that the parts return, ones and zeros."""
    for part in parts:
        if isinstance(part, p.Dense):
            reach = (_mask(part, reach.shape[0], mask) @ reach).clamp(max=1)
        elif isinstance(part, p.Residual):
            reach = (reach + _reach(part.parts, reach, mask)).clamp(max=1)
        elif isinstance(part, p.Norm):
            reach = reach.amax(0, keepdim=True).expand_as(reach)
    return reach


def _mask(dense: p.Dense, inputs: int, mask: Mask) -> Tensor:
    found = mask(dense)
    if found is None:
        return torch.ones(dense.size, inputs, dtype=torch.float32, device="cpu")
    return (found.detach().cpu() != 0).float()


def _longest_paths(depends: Tensor) -> list[int] | None:
    """Return for each node of a graph 1 + the most of those that it depends on; None if there is a cycle."""
    found = torch.ones(len(depends), dtype=torch.int64, device="cpu")
    for _ in range(len(depends)):
        longer = torch.where(depends, found, 0).amax(1) + 1
        if torch.equal(longer, found):
            return found.tolist()
        found = longer
    return None


class _Levels:
    """The levels of the units of every layer: the highest generation in reach, or more where a sum needs it."""

    def __init__(self, mask: Mask) -> None:
        self.mask, self.settled = mask, True
        self.found: list[Tensor] = []
        self.least: dict[int, Tensor] = {}

    def settle(self, parts: Sequence[p.Part], inputs: Tensor, numbers: Tensor) -> tuple[p.Columns, ...] | None:
        """Return the levels of every layer but the last, whose units have the levels `numbers`; None if they cannot."""
        while True:
            self.found, self.settled = [], True
            last, source = self.walk(parts, inputs, -1)
            if not self.same(last, source, numbers):
                return None
            if self.settled:
                return tuple(tuple(each.tolist()) for each in self.found[:-1])

    def walk(self, parts: Sequence[p.Part], levels: Tensor, source: int) -> tuple[Tensor, int]:
        """Return the levels of what the parts return, and the layer that they come from, -1 for none."""
        for part in parts:
            if isinstance(part, p.Dense):
                reach = torch.where(_mask(part, len(levels), self.mask) > 0, levels, 0)
                levels = reach.amax(1) if reach.numel() else levels.new_zeros(part.size)
                source = len(self.found)
                levels = torch.maximum(levels, self.least.get(source, torch.zeros_like(levels)))
                self.found.append(levels)
            elif isinstance(part, p.Residual):
                more, end = self.walk(part.parts, levels, source)
                both = torch.maximum(levels, more)
                if not (self.same(levels, source, both) and self.same(more, end, both)):
                    return levels, -1
        return levels, source

    def same(self, levels: Tensor, source: int, wanted: Tensor) -> bool:
        """Raise the levels of a layer to those that are wanted; return whether they can be."""
        if torch.equal(levels, wanted):
            return True
        self.settled = False
        self.least[source] = wanted
        return source >= 0 and bool((levels <= wanted).all())
