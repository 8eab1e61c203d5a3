"""Base class of the flows of vectors: a stack of layers, any leading dims."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..nn import ReversibleSequential
from ..reference.flow_program import of_rows
from ._run import repeated
from ._watch import Path
from .base import Flow
from .lower import Layers, Look


class VectorFlow(Flow):
    """Invertible layers of (B, dim), for x (..., dim) with a Gaussian prior.

    Args:
        dim: size of x.
        layers: invertible layers; each gets the context as its first argument after x.
        context_features: size of the context, 0 for none.
        reversible: recompute activations in backward.
    """

    def __init__(self, dim: int, layers: Sequence[nn.Module], context_features: int, reversible: bool) -> None:
        super().__init__((dim,), "gaussian", context_features)
        self.dim = dim
        reversible = check.flag(type(self).__name__, "reversible", reversible)
        self.stack = ReversibleSequential(*layers, recompute=reversible)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the log-density of each x (..., dim) in nats, given its context, whose leading dims broadcast."""
        if (nats := self._program_log_prob(x, context)) is not None:
            return nats
        return super().log_prob(x, context)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if (result := self._program(x, context)) is not None:
            return result
        rows, given, lead = self._rows("x", x, context)
        z, logdet = self.stack(rows, *given)
        return z.reshape(*lead, self.dim), logdet.reshape(lead)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if (result := self._program(z, context, inverse=True)) is not None:
            return result
        rows, given, lead = self._rows("z", z, context)
        x, logdet = self.stack.inverse(rows, *given)
        return x.reshape(*lead, self.dim), logdet.reshape(lead)

    def _program(
        self, x: Any, context: Any, inverse: bool = False, prior: str | None = None
    ) -> tuple[Tensor, Tensor] | None:
        rows, given, lead, repeats = self._shared("z" if inverse else "x", x, context)
        result = self._fuser.run(self, rows, given, self.dim, inverse, prior, repeats)
        if result is None:
            return None
        y, logdet = result
        return y if prior else y.reshape(*lead, self.dim), logdet.reshape(lead)

    def _rows(self, label: str, x: Any, context: Any) -> tuple[Tensor, tuple[Tensor, ...], tuple[int, ...]]:
        """Return x (B, dim), the arguments after it, (B, context_features) if any, and the dims that B stands for."""
        x, given, lead, repeats = self._shared(label, x, context)
        self._check_dtype(label, x)
        return x, tuple([of_rows(context, x.shape[0], repeats) for context in given]), lead

    def _shared(self, label: str, x: Any, context: Any) -> tuple[Tensor, tuple[Tensor, ...], tuple[int, ...], int]:
        """Return the same with a context (R, context_features), of which row r of x has the row r // repeats % R."""
        name = type(self).__name__
        check.float_tensor(name, label, x)
        if x.dim() == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"{name}: {label} must have the shape (..., {self.dim}), got {tuple(x.shape)}")
        lead = x.shape[:-1]
        context = check.context(name, context, self.context_features, lead, x.device)
        if context is None:
            return x.reshape(math.prod(lead), self.dim), (), lead, 1
        lead = torch.broadcast_shapes(lead, context.shape[:-1])
        context, repeats = repeated(context.to(x.dtype), lead)
        return x.expand(*lead, -1).reshape(math.prod(lead), self.dim), (context,), lead, repeats


def stack_of(look: Look, path: Path, flow: VectorFlow) -> Layers:
    """Yield the stack of a flow of vectors: their rule for STACKS."""
    yield (*path, "stack"), flow.stack
