"""The parametrization of spectral normalisation, and hooks of a root that normalise all its layers in one call."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks as check
from .._torch import next_node_number, tracing, transform, under_transform
from ..ops import spectral_normalize
from ._context import Context
from ._recomputed import Forward, Forwards, Normalised

if TYPE_CHECKING:
    from ._typed import ModuleListOf


class SpectralNorm(nn.Module):
    """The parametrization W / sigma(W), with the buffers of torch's spectral_norm."""

    _u: Tensor | None
    _v: Tensor | None

    def __init__(self, weight: Tensor, dim: int, n_iter: int, through_iteration: bool) -> None:
        super().__init__()
        self.dim, self.n_iter, self.through_iteration = dim, n_iter, through_iteration
        self._given: dict[int, Normalised] = {}  # by thread, while the root's forward runs
        self.forwards, self.place = Forwards(), 0  # the forwards of the root, and the layer's place in them
        if weight.dim() > 1 and not through_iteration:
            matrix = self.matrix(weight.detach())
            for name, size in (("_u", matrix.shape[0]), ("_v", matrix[0].numel())):
                self.register_buffer(name, F.normalize(weight.new_empty(size).normal_(), dim=0))

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight with its output dim first."""
        return weight.movedim(self.dim, 0) if self.dim else weight

    def vectors(self, matrix: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the starting (u, v) of the power iteration; (None, None) for a vector."""
        if matrix.dim() == 1:
            return None, None
        if self.through_iteration:
            return matrix.new_ones(matrix.shape[0]), matrix.new_ones(matrix[0].numel())
        return self._u, self._v

    @property
    def rounds(self) -> int:
        """Power iterations of this forward; with buffers u and v none in eval mode and in recomputation."""
        moves = self.training and not check.in_backward()
        return self.n_iter if moves or self.through_iteration else 0

    @property
    def given(self) -> Normalised | None:
        """What the root's forward in this thread has computed for this layer."""
        if torch.compiler.is_compiling():
            # one shared entry under compile, whether the root is inside the graph or around it
            return next(iter(self._given.values()), None)
        return self._given.get(threading.get_ident())

    def give(self, normalised: Normalised | None) -> None:
        """Set (or with None clear) the normalised weight that forwards in this thread return."""
        thread = 0 if torch.compiler.is_compiling() else threading.get_ident()
        if normalised is None:
            self._given.pop(thread, None)
        else:
            self._given[thread] = normalised

    @property
    def held(self) -> Tensor | None:
        """The normalised weight, if the root has computed it, in this forward or in the one that is recomputed."""
        given = self.given
        if given is not None:
            if not torch.compiler.is_compiling():
                self.forwards.enter()
            return given[0]
        forward = self.forwards.of_block() if check.in_backward() else None
        return None if forward is None else forward.weight(self.place)

    def forward(self, weight: Tensor) -> Tensor:
        held = self.held
        return normalize([(self, weight)], self.rounds)[0][0] if held is None else held

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_given": {}}

    def extra_repr(self) -> str:
        return f"dim={self.dim}, n_iter={self.n_iter}, through_iteration={self.through_iteration}"


def normalize(layers: list[tuple[SpectralNorm, Tensor]], rounds: int, again: Forward | None = None) -> list[Normalised]:
    """Return the normalised weights of layers on one device and update their u and v.

    `again`: use the u and v of this forward.
    """
    matrices = [norm.matrix(weight) for norm, weight in layers]
    vectors = [norm.vectors(matrix) for (norm, _), matrix in zip(layers, matrices, strict=True)]
    through = layers[0][0].through_iteration
    if again is not None and not through:
        vectors = [again.vectors(norm.place) for norm, _ in layers]
    normalised, u, v, _ = spectral_normalize(
        matrices, [a for a, _ in vectors], [b for _, b in vectors], n_iter=rounds, through_iteration=through
    )
    if rounds and not through:
        # in place, so that DDP broadcasts the buffers; the backward uses the new tensors u and v
        with torch.no_grad():
            for (a, b), new_a, new_b in zip(vectors, u, v, strict=True):
                if a is not None and b is not None and new_a is not None and new_b is not None:
                    _write(new_a, a)
                    _write(new_b, b)
    weights = [
        weight.movedim(0, norm.dim) if norm.dim else weight
        for (norm, _), weight in zip(layers, normalised, strict=True)
    ]
    return list(zip(weights, u, v, strict=True))


def _write(values: Tensor, buffer: Tensor) -> None:
    """Copy into a buffer, also within torch.func transforms, which refuse copy_ into a captured tensor but not out=."""
    if under_transform():
        torch.mul(values, 1, out=buffer)
    else:
        buffer.copy_(values)


if TYPE_CHECKING:

    class Normed(ModuleListOf[SpectralNorm]):
        """A ParametrizationList with a SpectralNorm; for type checkers only."""

        original: Tensor


class Together:
    """Hooks of the root: normalise all layers in one call before its forward, and clear the weights after it."""

    def __init__(self, layers: list[Normed]) -> None:
        self.layers, self.forwards = layers, Forwards()
        for place, norm in enumerate(self.norms):
            norm.forwards, norm.place = self.forwards, place

    @property
    def norms(self) -> list[SpectralNorm]:
        return [layer[0] for layer in self.layers]

    def before(self, root: nn.Module, args: object) -> None:
        recomputed = check.in_backward()
        again = self.forwards.of_root() if recomputed else None
        notes = not recomputed and not torch.compiler.is_compiling() and torch.is_grad_enabled() and _plain()
        first = next_node_number() if notes else 0
        groups: dict[tuple[torch.device, int], list[tuple[SpectralNorm, Tensor]]] = {}
        for layer in self.layers:
            norm, weight = layer[0], layer.original
            groups.setdefault((weight.device, norm.rounds), []).append((norm, weight))
        for (_, rounds), layers in groups.items():
            for (norm, _), normalised in zip(layers, normalize(layers, rounds, again), strict=True):
                norm.give(normalised)
        if notes:
            self.forwards.begin(first, self.given)

    def after(self, root: nn.Module, args: object, output: object) -> None:
        given = self.given
        for norm in self.norms:
            norm.give(None)
        if not torch.compiler.is_compiling() and not check.in_backward():
            self.forwards.finish(given, [output] if isinstance(output, Tensor) else Context((output,), {}).tensors)

    @property
    def given(self) -> list[Normalised]:
        """What this thread's forward has computed; empty if it raised before."""
        given = [norm.given for norm in self.norms]
        return [normalised for normalised in given if normalised is not None]


def _plain() -> bool:
    """Whether neither a torch.func transform nor torch.jit.trace runs."""
    return transform() is None and not tracing()
