"""Multi-scale flow, the base class of RealNVP and Glow: part of z leaves the flow between stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from .base import Flow


class MultiScale(Flow):
    """Stages of invertible layers; after each but the last, half of the channels goes to z unchanged.

    Args:
        shape: shape of one x.
        stages: one invertible layer per scale.
        splits: empty, or one affine coupling for each scale but the last. Its inverse standardises the half that leaves
            by a mean and scale predicted from the half that goes on: a learned prior.
        prior: prior of z.
        context_features: size of the context that every layer gets after x, 0 for none.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        stages: Sequence[nn.Module],
        splits: Sequence[nn.Module],
        prior: str,
        context_features: int,
    ) -> None:
        super().__init__((math.prod(shape),), prior, context_features)
        self.shape, self._inverts_vectors = shape, len(shape) == 1
        self.stages, self.splits = nn.ModuleList(stages), nn.ModuleList(splits)
        self._parts: list[tuple[int, ...]] = []  # shapes of the parts of z
        for _ in stages[1:]:
            shape = (2 * shape[0], shape[1] // 2, shape[2] // 2)
            self._parts.append(shape)
        last = stages[-1]
        self._parts.append((4 * shape[0], shape[1] // 2, shape[2] // 2) if _squeezes(last) else shape)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        nats = self._program_log_prob(x, context)
        return super().log_prob(x, context) if nats is None else nats

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if (result := self._program(x, context)) is not None:
            return result
        name = type(self).__name__
        check.float_tensor(name, "x", x)
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"{name}: x must have the shape {_batched(self.shape)}, got {tuple(x.shape)}")
        self._check_dtype("x", x)
        given = self._given(context, x)
        stage: Any
        split: Any
        total: Any = 0
        parts = []
        for level, stage in enumerate(self.stages):
            x, logdet = stage(x, *given)
            total = logdet + total
            if level == len(self.stages) - 1:
                break
            if self.splits:
                split = self.splits[level]
                x, logdet = split.inverse(x, *given)
                total = logdet + total
            x, done = x.chunk(2, 1)
            parts.append(done.flatten(1))
        return torch.cat((*parts, x.flatten(1)), 1), total

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self._inverts_vectors and (result := self._program(z, context, inverse=True)) is not None:
            return result
        name = type(self).__name__
        check.float_tensor(name, "z", z)
        if tuple(z.shape[1:]) != self.latent_shape:
            raise ValueError(f"{name}: z must have the shape {_batched(self.latent_shape)}, got {tuple(z.shape)}")
        self._check_dtype("z", z)
        given = self._given(context, z)
        *parts, x = (
            part.unflatten(1, shape)
            for part, shape in zip(z.split([math.prod(s) for s in self._parts], 1), self._parts, strict=True)
        )
        stage: Any
        total: Any = 0
        for level, stage in reversed(list(enumerate(self.stages))):
            if level < len(parts):
                x = torch.cat((x, parts[level]), 1)
                if self.splits:
                    x, logdet = self.splits[level](x, *given)
                    total = logdet + total
            x, logdet = stage.inverse(x, *given)
            total = logdet + total
        return x, total


class Squeeze(nn.Module):
    """(B, C, H, W) -> (B, 4 C, H / 2, W / 2): every 2x2 block of pixels becomes four channels."""

    def forward(self, x: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        # pixel_unshuffle is slower on a CPU, and does not change the shape of an empty batch
        b, c, h, w = x.shape
        blocks = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
        return blocks.reshape(b, 4 * c, h // 2, w // 2), _zeros(x)

    def inverse(self, y: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        b, c, h, w = y.shape
        blocks = y.reshape(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
        return blocks.reshape(b, c // 4, 2 * h, 2 * w), _zeros(y)


def check_images(name: str, shape: tuple[int, ...], factor: int) -> None:
    """Raise ValueError unless `shape` is (C, H, W) with H and W divisible by `factor`."""
    if len(shape) != 3 or min(shape) < 1 or shape[1] % factor or shape[2] % factor:
        raise ValueError(f"{name}: shape must be (C, H, W) with H and W divisible by {factor}, got {shape}")


def _squeezes(stage: nn.Module) -> bool:
    return any(isinstance(m, Squeeze) for m in stage.modules())


def _zeros(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


def _batched(shape: tuple[int, ...]) -> str:
    return f"(B, {', '.join(map(str, shape))})"
