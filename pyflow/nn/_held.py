"""Buffers whose values survive casts and averaging of the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class HoldsNumbers(nn.Module):
    """A module whose buffers named in `held` stay at least float32 under casts and exact under averaging.

    They are floats: averaging of buffers truncates integers and fails on bools. state_dicts that store them as
    integers or bools still load.
    """

    held: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HoldsNumbers:
        before = {name: self._buffers[name] for name in self.held}
        super()._apply(fn, recurse)
        for name, value in before.items():
            cast = self._buffers[name]
            if cast is not None and value is not None and cast.element_size() < value.element_size():
                self._buffers[name] = value.to(cast.device, torch.float32)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in self.held:
            value, buffer = state_dict.get(prefix + name), self._buffers[name]
            if value is not None and buffer is not None:
                # with assign=True the loaded tensor becomes the buffer, so it needs the buffer's dtype
                state_dict[prefix + name] = value.to(buffer.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)
