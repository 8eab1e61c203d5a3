"""A whole flow in one call, and what of it is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..nn import ReversibleSequential
from ._fuser import Fuser, Fusing, explain
from ._lower import STACKS, Layers, Look, register
from ._watch import Path
from .base import Flow


def fuse(flow: nn.Module | Sequence[nn.Module], *, frozen: bool = False) -> Fused:
    """Run the layers of a flow in one call, where they have instructions."""
    return Fused(flow, frozen)


class Fused(Fusing):
    """The module that `fuse` returns."""

    flow: Any

    def __init__(self, flow: nn.Module | Sequence[nn.Module], frozen: bool = False) -> None:
        super().__init__()
        if isinstance(flow, (list, tuple)) or type(flow) in (nn.Sequential, nn.ModuleList):
            flow = ReversibleSequential(*_flat(flow), recompute=False)
        if not isinstance(flow, nn.Module) or not hasattr(flow, "inverse"):
            raise TypeError(
                f"fuse: flow must be a module with an inverse, or a list of them, got {type(flow).__name__}"
            )
        if frozen:
            flow = copy.deepcopy(flow).eval().requires_grad_(False)
        self.flow = flow
        if frozen:
            self._fuser = Fuser(self, frozen=True)
            if isinstance(flow, Flow):
                flow._fuser = Fuser(flow, frozen=True)

    def forward(self, x: Tensor, *context: Any, **named: Any) -> tuple[Tensor, Tensor]:
        result = self._result(x, context, named, False)
        return self.flow(x, *context, **named) if result is None else result

    def inverse(self, y: Tensor, *context: Any, **named: Any) -> tuple[Tensor, Tensor]:
        result = self._result(y, context, named, True)
        return self.flow.inverse(y, *context, **named) if result is None else result

    def explain(self) -> str:
        """Return a line for each run of fused layers and for each layer that is left, with the reason."""
        return explain(self.flow if isinstance(self.flow, Flow) else self)

    def _result(self, x: Any, context: tuple, named: dict, inverse: bool) -> tuple[Tensor, Tensor] | None:
        # flows check their arguments, and run their own programs
        if isinstance(self.flow, Flow) or named or not isinstance(x, Tensor) or x.is_nested or x.dim() != 2:
            return None
        return self._fuser.run(self, x, context, int(x.shape[1]), inverse)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            flow = self.__dict__.get("_modules", {}).get("flow")
            if flow is None or name.startswith("_"):
                raise
            return getattr(flow, name)


def _flat(layers: Any) -> list[Any]:
    return [each for layer in layers for each in (_flat(layer) if type(layer) is nn.Sequential else [layer])]


@register(STACKS, Fused)
def _fused(look: Look, path: Path, fused: Fused) -> Layers:
    yield (*path, "flow"), fused.flow
