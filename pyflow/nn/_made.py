"""Masked networks of autoregressive layers, and the schedule that inverts a layer with one evaluation of every unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._torch import FakeTensor, forward_mode, transform
from ._held import HoldsNumbers

if TYPE_CHECKING:
    from ._typed import ModuleListOf

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "leaky_relu": F.leaky_relu, "elu": F.elu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}  # fmt: skip

# (y, numbers) -> (x, logdet) of k features: (k, N) and (k * P, N) -> (k, N) and (k, N)
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def rows_are_one(context: Tensor) -> bool:
    """Whether all rows of a context (..., C) share memory, as when samples are drawn for one context."""
    return context.dim() > 1 and all(
        n == 1 or step == 0 for n, step in zip(context.shape[:-1], context.stride()[:-1], strict=True)
    )


def first_row(context: Tensor) -> Tensor:
    """Return the first row of a context (..., C), with all its dims."""
    return context[(slice(1),) * (context.dim() - 1)]


class MaskedLinear(nn.Linear):
    """v = (weight * mask) h + bias [+ weight_c context]; the mask is a buffer of ones and zeros, not a state.

    Args:
        inputs, outputs: widths.
        context: number of context features, 0 for none.
        active: whether `MADE` applies its activation to the input.
        skip: whether `MADE` adds the input of the layer before: the end of a residual block.
    """

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, context: int = 0, active: bool = True, skip: bool = False) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("mask", torch.ones_like(self.weight, requires_grad=False), persistent=False)
        self.context = nn.Linear(context, outputs, bias=False) if context else None
        self.active, self.skip = active, skip

    def masked(self) -> Tensor:
        return self.weight * self.mask

    def forward(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        v = F.linear(h, self.masked(), self.bias)
        if self.context is None:
            return v
        assert context is not None
        return v + self.context(first_row(context) if rows_are_one(context) else context)


class MADE(HoldsNumbers):
    """Masked network: the numbers of a feature depend on the features before it in the order, and on the context.

    The units of a hidden layer take the degrees 1, ..., G - 1 in turn, where G is the number of generations, the
    distinct places in the order; with a context 0, ..., G - 1. A unit sees units of its degree and below, the numbers
    of the features of generation g see units of degree below g.

    Args:
        order: place of every feature; features of one place do not see each other.
        hidden: widths. With `residual` each is a residual block of two layers; a layer without activation goes before
            a block of another width than the last.
        count: numbers per feature, next to each other in the output.
    """

    held = ("order", "sorting")
    order: Tensor
    sorting: Tensor
    layers: ModuleListOf[MaskedLinear]
    generations: tuple[int, ...]

    def __init__(
        self, order: Sequence[int], hidden: Sequence[int], count: int, *, residual: bool, context: int, activation: str
    ) -> None:
        super().__init__()
        self.features, self.count, self.activation, self.context = len(order), count, activation, context
        self._start = tuple(order)
        width = hidden[0]
        # the first layer reads x as it is; a residual stream is read as it is by the last layer
        layers = [MaskedLinear(self.features, width, context, active=False)]
        for i, wide in enumerate(hidden):
            if not residual:
                layers += [MaskedLinear(width, wide)] if i else []
            else:
                layers += [MaskedLinear(width, wide, active=False)] if wide != width else []
                layers += [MaskedLinear(wide, wide, context), MaskedLinear(wide, wide, skip=True)]
            width = wide
        layers.append(MaskedLinear(width, self.features * count, active=not residual))
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]
        self.register_buffer("order", torch.empty(self.features, dtype=torch.float32))
        # the units of each layer, features first, in the order of their levels
        units = self.features + sum(layer.out_features for layer in layers[:-1])
        self.register_buffer("sorting", torch.empty(units, dtype=torch.float32), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset the order and the masks; a residual block starts close to the identity, the output at the bias."""
        self._arrange(self._start)
        for layer in self.layers:
            if layer.skip:
                nn.init.uniform_(layer.weight, -1e-3, 1e-3)
                nn.init.uniform_(layer.bias, -1e-3, 1e-3)
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the numbers of every feature, (..., D * count)."""
        act = ACTIVATIONS[self.activation]
        before, v = x, x
        for layer in self.layers:
            new = layer(act(v) if layer.active else v, context)
            before, v = v, new + before if layer.skip else new
        return v

    def invert(self, y: Tensor, context: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        """Return (x, logdet) for y (N, D), where `step` inverts features whose numbers are known.

        The numbers of generation g are those of units below level g, which are known once the features before are:
        no unit is evaluated twice. Units of level 0 see the context alone: if that is the same for all rows, they are
        evaluated for one.
        """
        alone = 1 if context is None or rows_are_one(context) else y.shape[0]
        context = context if context is None else context[:alone]
        sorting = self.sorting.long().split([ends[-1] for ends in self._ends])
        # the batch is the last dim: the units known at any time are one contiguous block
        sorted_y = y.t().index_select(0, sorting[0])
        numbers = (sorting[0][:, None] * self.count + torch.arange(self.count, device=y.device)).flatten()
        *hidden, last = (
            _Sorted(layer, units, inputs, context)
            for layer, inputs, units in zip(self.layers, sorting, (*sorting[1:], numbers), strict=True)
        )
        in_place = not (
            torch.is_grad_enabled() or torch.compiler.is_compiling() or transform() is not None or forward_mode()
        )
        # the values of each layer as the next one reads them, and before the activation where a block adds them later
        widths = [layer.in_features for layer in self.layers]
        read = [_Known(width, sorted_y, in_place) for width in widths]
        added = {k - 1: _Known(widths[k - 1], sorted_y, in_place) for k, layer in enumerate(self.layers) if layer.skip}
        act, ends, logdets, rows = ACTIVATIONS[self.activation], self._ends, [], alone
        for g in range(len(ends[0])):
            if g:
                some = slice(ends[0][g - 1], ends[0][g])
                known = read[-1].first(ends[-1][g - 1], rows)
                params = last(known, some.start * self.count, some.stop * self.count)
                x, logdet = step(sorted_y[some], params.expand(-1, y.shape[0]))
                read[0].add(x)
                logdets.append(logdet)
                rows = y.shape[0]
            for k, units in enumerate(hidden, 1):
                some = slice(ends[k][g - 1] if g else 0, ends[k][g])
                if some.start == some.stop:
                    continue
                v = units(read[k - 1].first(ends[k - 1][g], rows), some.start, some.stop)
                if self.layers[k - 1].skip:
                    # a block does not change the levels, so the units are in the same places
                    v = v + added[k - 2].values[some, :rows]
                if k in added:
                    added[k].add(v)
                read[k].add(act(v) if self.layers[k].active else v)
        return read[0].values.index_select(0, sorting[0].argsort()).t().contiguous(), torch.cat(logdets).sum(0)

    @torch.no_grad()
    def _arrange(self, order: Sequence[float]) -> None:
        """Fill the buffers for an order."""
        places = sorted(set(order))
        generation = torch.tensor([places.index(place) + 1 for place in order], device="cpu")
        self.generations = tuple(generation.tolist())
        most, least = len(places), 0 if self.context else min(1, len(places) - 1)
        degrees, level = generation, generation
        self._ends, sorting = [], []
        for i, layer in enumerate(self.layers):
            ends = [int((level <= g).sum()) for g in range(most + 1)]
            self._ends.append(ends)
            sorting.append(level.argsort(stable=True))
            if i == len(self.layers) - 1:
                mask = generation.repeat_interleave(self.count)[:, None] > degrees
            else:
                units = torch.arange(layer.out_features, device="cpu") % max(1, most - least) + least
                mask = units[:, None] >= degrees
                # the last generation that a unit can see through all layers before it
                level = torch.where(mask, level, 0).amax(1)
                degrees = units
            layer.mask.copy_(mask)
        self.order.copy_(generation - 1)
        self.sorting.copy_(torch.cat(sorting))

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)  # type: ignore[arg-type]
        if not self.order.is_meta and not isinstance(self.order, FakeTensor):
            self._arrange(self.order.tolist())


class _Sorted:
    """A layer with its units and inputs in the order of their levels, for values (units, N)."""

    def __init__(self, layer: MaskedLinear, units: Tensor, inputs: Tensor, context: Tensor | None) -> None:
        self.weight = layer.masked()[units[:, None], inputs]
        self.start = layer.bias[units][:, None]
        if layer.context is not None:
            assert context is not None
            self.start = torch.addmm(self.start, layer.context.weight[units], context.t())

    def __call__(self, h: Tensor, first: int, end: int) -> Tensor:
        """Return units first to end - 1 from the inputs in h, which are all that they see."""
        return torch.addmm(self.start[first:end], self.weight[first:end, : h.shape[0]], h)


class _Known:
    """Values of the first units, (units, N) from those of N rows or of one that stands for all.

    Written in place, or concatenated where a gradient or transform needs the old ones.
    """

    def __init__(self, total: int, like: Tensor, in_place: bool) -> None:
        self.in_place, self.count, self.rows = in_place, 0, like.shape[1]
        self.values = like.new_empty(total if in_place else 0, like.shape[1])

    def add(self, new: Tensor) -> None:
        end = self.count + new.shape[0]
        if self.in_place:
            self.values[self.count : end] = new
        else:
            new = new.expand(-1, self.rows)
            self.values = torch.cat((self.values, new)) if self.count else new
        self.count = end

    def first(self, n: int, rows: int) -> Tensor:
        return self.values[:n, :rows]
