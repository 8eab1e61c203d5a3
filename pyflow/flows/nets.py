"""Small networks for the couplings of the flows."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from .. import _checks as check

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


class Conditional(nn.Sequential):
    """Layers that get x and the context (B, C) side by side along dim 1; every pixel of an image gets the same one."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        pixels = x.shape[2:]
        spread = context.reshape(*context.shape, *(1 for _ in pixels)).expand(-1, -1, *pixels)
        return super().forward(torch.cat((x, spread), 1))


def mlp(inputs: int, hidden: tuple[int, ...], outputs: int, context: int = 0) -> nn.Sequential:
    """Return linear layers with ReLU between them and none after the last; the first sees the context too."""
    widths = (inputs + context, *hidden, outputs)
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return (Conditional if context else nn.Sequential)(*layers[:-1])


def conv_net(inputs: int, hidden: int, outputs: int, context: int = 0) -> nn.Sequential:
    """Return 3x3, 1x1, 3x3 convolutions with ReLU between them; the last is initialised to 0."""
    first, middle = nn.Conv2d(inputs + context, hidden, 3, padding=1), nn.Conv2d(hidden, hidden, 1)
    kind = Conditional if context else nn.Sequential
    return kind(first, nn.ReLU(), middle, nn.ReLU(), zero_conv(hidden, outputs))


def zero_conv(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a 3x3 convolution initialised to 0."""
    return start_at_zero(nn.Conv2d(inputs, outputs, 3, padding=1))


def widths(op: str, hidden: object) -> tuple[int, ...]:
    """Return the hidden widths of an `mlp`, checked."""
    if isinstance(hidden, numbers.Number) or not isinstance(hidden, Sequence):
        raise TypeError(f"{op}: hidden must be a tuple of widths for vectors, got {type(hidden).__name__}")
    return tuple(check.at_least(op, "hidden", width, 1) for width in hidden)


def start_at_zero(layer: Layer) -> Layer:
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
