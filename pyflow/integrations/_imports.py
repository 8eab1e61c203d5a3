"""Calls a function once a package has been imported: what is not used is not imported either."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Loader(Loader):
    """Loads a module as another loader does, and then calls a function."""

    def __init__(self, loader: Loader, done: Callable[[], None]) -> None:
        self.loader, self.done = loader, done

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # what reads sources and resources asks the module for its loader
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.done()


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        self.waiting: dict[str, Callable[[], None]] = {}

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        done = self.waiting.get(name)
        if done is None:
            return None
        # a finder of the style before Python 3.4 has no find_spec
        others: list[Any] = [each for each in sys.meta_path if each is not self and hasattr(each, "find_spec")]
        found = (each.find_spec(name, path, target) for each in others)
        spec: ModuleSpec | None = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader, done)
        return spec


_FINDER = _Finder()


def waiting() -> list[str]:
    """Return the packages that are waited for."""
    return [*_FINDER.waiting]


def once_imported(package: str, done: Callable[[], None]) -> None:
    """Call `done` after a package has been imported for the first time, in place of what was to be called before."""
    _FINDER.waiting[package] = done
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def forget(package: str) -> None:
    """Call nothing when this package is imported."""
    _FINDER.waiting.pop(package, None)
    if not _FINDER.waiting and _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
