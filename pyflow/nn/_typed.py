"""Types for type checkers only; at run time the objects have torch's own types."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from torch import nn

if TYPE_CHECKING:
    M = TypeVar("M", bound=nn.Module)

    class ModuleListOf(nn.ModuleList, Generic[M]):
        """A ModuleList whose modules all have one type."""

        def __iter__(self) -> Iterator[M]: ...

        @overload
        def __getitem__(self, idx: slice) -> nn.ModuleList: ...
        @overload
        def __getitem__(self, idx: int) -> M: ...
        def __getitem__(self, idx: Any) -> Any: ...

    class InvertibleModule(nn.Module):
        """A layer with an inverse; only some layers have `rebuild`."""

        inverse: Callable[..., Any]
        rebuild: Callable[..., Any]
