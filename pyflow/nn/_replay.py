"""State that the recomputation of a forward in its backward restores, and a check of the rebuilt inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import _checks as check
from .._torch import DisableAutocast, FakeTensor, is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from .reversible import ReversibleSequential


class Replay:
    """Random state, autocast state and training flags of a forward, and a fingerprint of every layer's input."""

    def __init__(self, x: Tensor, stack: ReversibleSequential) -> None:
        # drawing with fake tensors leaves the random state unchanged, so there is nothing to replay
        self.device, self.rng = x.device, stack.preserve_rng and not isinstance(x, FakeTensor)
        kinds = [k for k in {"cpu", x.device.type} if torch.amp.is_autocast_available(k)]
        self.casts = [(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds]
        self.modes = [(module, module.training) for module in stack.modules()]
        self.drawn: list[list[Tensor] | None] = []  # random state before each layer; None if it drew nothing
        self.prints: list[Tensor | None] = []
        self.directions: dict[tuple[int, torch.dtype], Tensor] = {}
        self.last = self._read()

    @contextlib.contextmanager
    def conditions(self) -> Iterator[None]:
        """Restore the forward's autocast; turn off the autocast and parametrization caches, since a weight cached
        without a graph must not be reused by a forward that needs one.
        """
        cached, parametrize._cache_enabled = parametrize._cache_enabled, 0
        try:
            with contextlib.ExitStack() as stack:
                for kind, enabled, dtype in self.casts:
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
                yield
        finally:
            parametrize._cache_enabled = cached

    def record(self, x: Tensor) -> bool:
        """Record a layer's input fingerprint and the random state before it; return whether the layer drew numbers."""
        self.prints.append(self._print(x))
        state = self._read()
        drew = not all(map(torch.equal, state, self.last))
        self.drawn.append(self.last if drew else None)
        if drew:
            self.last = state
        return drew

    @contextlib.contextmanager
    def resume(self) -> Iterator[None]:
        """Restore the forward's conditions and training flags; on exit restore the caller's flags and random state."""
        before = self._read()
        changed = [(module, module.training, then) for module, then in self.modes if module.training != then]
        try:
            for module, _, then in changed:
                module.training = then
            with self.conditions():
                yield
        finally:
            for module, now, _ in changed:
                module.training = now
            if any(self.drawn):
                self._write(before)

    def rewind(self, i: int) -> None:
        """Set the random state that layer i started from, if it drew numbers."""
        state = self.drawn[i]
        if state is not None:
            self._write(state)

    def verify(self, i: int, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        """Raise if x, rebuilt from y, is not the input that layer i had, within the accuracy of its inverse."""
        seen, found = self.prints[i], self._print(x)
        if seen is None or found is None or not seen.numel():
            return
        eps, features = torch.finfo(x.dtype).eps, x.numel() // seen.numel()
        # fast path: compares fingerprints only, without reading x and y
        if bool(torch.dist(found, seen, 1) <= eps**0.4 * seen.abs().sum()):
            return
        # nansum skips rows that are not finite; where |x| << |y| the inverse recovers few digits of x
        distance = (found.double() - seen.double()).square().nansum().sqrt() * features**0.5
        off = float(distance / (_norm(x) + eps**0.2 * _norm(y)))
        if off > eps**0.4:
            raise RuntimeError(
                f"ReversibleSequential: layer {i}, {type(layer).__name__}, must rebuild its input from its output, got "
                f"one that is off by {off:.1g}: what it computes has changed since its forward (state that its forward "
                "moves, random numbers that are not torch's) or its inverse is inaccurate; use recompute=False"
            )

    def _print(self, x: Tensor) -> Tensor | None:
        """Fingerprint of x, one random-like projection per sample; None where values must not be read."""
        if not check.values_are_checked(x) or not x.is_floating_point() or is_traceable_wrapper_subclass(x):
            return None
        rows = x.detach().flatten(1) if x.dim() > 1 else x.detach()[..., None]
        key = rows.shape[-1], x.dtype
        if key not in self.directions:
            # a chirp has a flat spectrum: it detects smooth and rough differences alike
            chirp = torch.arange(key[0], dtype=torch.float64, device=x.device).square().mul(0.7).cos()
            self.directions[key] = (chirp * (2 / max(key[0], 1)) ** 0.5).to(x.dtype)
        with DisableAutocast():
            return rows @ self.directions[key]

    def _read(self) -> list[Tensor]:
        if not self.rng:
            return []
        state = [torch.get_rng_state()]
        if self.device.type not in ("cpu", "meta"):
            state.append(torch.get_device_module(self.device).get_rng_state(self.device))
        return state

    def _write(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        if len(state) > 1:
            torch.get_device_module(self.device).set_rng_state(state[1], self.device)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.detach().nan_to_num(), dtype=torch.float64)
