"""Buffers whose numbers must come through whatever is done to buffers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class HoldsNumbers(nn.Module):
    """A module with buffers that casts leave in float32, and averages of buffers as they are.

    They are floats, since averages truncate integers and know no bools; state_dicts that have them so still load.
    """

    held: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HoldsNumbers:
        before = {name: self._buffers[name] for name in self.held}
        super()._apply(fn, recurse)
        for name, value in before.items():
            cast = self._buffers[name]
            if cast.element_size() < value.element_size():
                self._buffers[name] = value.to(cast.device, torch.float32)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        for name in self.held:
            value = state_dict.get(prefix + name)
            if value is not None:
                # assign=True would make it the buffer
                state_dict[prefix + name] = value.to(self._buffers[name].dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)
