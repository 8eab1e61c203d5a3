"""`pyflow.patch`: classes of other packages run on pyflow's kernels, whoever makes their objects."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
import warnings
from functools import partial
from types import TracebackType
from typing import Any

from .._classes import why_unknown
from ._fast import FAST, fast_methods
from ._imports import forget, once_imported, waiting

_LOCK = threading.Lock()
# what classes had before, by package and class; None for a method that a class inherits
_PATCHED: dict[str, dict[type, dict[str, Any]]] = {}


class Patch:
    """What `patch` did; as a context manager it undoes this at the end.

    Attributes:
        replaced: names of the classes that have fast methods now.
        left: classes that run as before, with the reason; packages that are not installed.
        waiting: packages that are patched once they are imported.
    """

    def __init__(self) -> None:
        self.replaced: list[str] = []
        self.left: list[tuple[str, str]] = []
        self._packages: list[str] = []

    @property
    def waiting(self) -> list[str]:
        return [name for name in self._packages if name in waiting()]

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # no names would be all packages
        if self._packages:
            unpatch(*self._packages)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} classes patched, {len(self.left)} left"]
        lines += [f"  {name}" for name in self.replaced]
        lines += [f"  left: {name}: {reason}" for name, reason in self.left]
        return "\n".join([*lines, *[f"  once it is imported: {name}" for name in self.waiting]])


def packages() -> list[str]:
    """Return the packages that have classes with fast methods."""
    return sorted({kind.partition(".")[0] for kind in FAST} | {"glasflow"})


def patch(*names: str) -> Patch:
    """Let classes of other packages run on pyflow's kernels: objects that exist, and those that will be made.

    Methods are set on the classes themselves, so that the order of imports does not matter. `unpatch`, or the end of
    the `with` block, sets what was there. Subclasses of a class run as they are.

    Args:
        names: of packages, which are imported; none: all, those that are not imported yet once they are.

    Returns:
        A report: print it; a context manager.

    Raises:
        ValueError: a package that pyflow does not know.

    Notes:
        A package that is not installed is named in the report. A method whose input a kernel does not take runs as in
        the package. Under torch.compile a flow runs as one program if it has run in eager mode before.

    Example:
        >>> with patch("zuko") as report:
        ...     pass
        >>> report.left
        []
    """
    known = packages()
    for name in names:
        if name not in known:
            raise ValueError(f"patch: packages are {', '.join(known)}, got {name!r}")
    result = Patch()
    for name in names:
        _patch(name, result)
    for name in [] if names else known:
        if name in sys.modules:
            _patch(name, result)
        elif name not in waiting() and _is_installed(name):
            result._packages.append(name)
            once_imported(name, partial(_patch_imported, name, result))
    return result


def unpatch(*names: str) -> None:
    """Undo `patch`, for some packages or for all."""
    with _LOCK:
        for name in names or [*_PATCHED, *waiting()]:
            forget(name)
            for kind, methods in _PATCHED.pop(name, {}).items():
                for method, before in methods.items():
                    if before is None:
                        delattr(kind, method)
                    else:
                        setattr(kind, method, before)


def patch_as_asked() -> None:
    """Patch what the environment variable PYFLOW_PATCH names, so that code needs no change; never raise."""
    names = [name for name in os.environ.get("PYFLOW_PATCH", "").replace(",", " ").split() if name]
    if not names:
        return
    try:
        patch(*([] if names == ["all"] else names))
    except Exception as error:
        # an import never fails
        warnings.warn(f"PYFLOW_PATCH={os.environ['PYFLOW_PATCH']!r} did nothing: {error}", stacklevel=2)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    # something else has its name among the modules
    except ValueError:
        return True


def _patch_imported(package: str, result: Patch) -> None:
    try:
        _patch(package, result)
    except Exception as error:
        # an import never fails
        warnings.warn(f"pyflow.patch did nothing to {package}: {error}", stacklevel=2)


def _patch(package: str, result: Patch) -> None:
    if package in _PATCHED:
        return
    # nothing is imported under the lock, which another thread may want while it imports
    try:
        importlib.import_module(package)
    # a package may fail in any way
    except Exception as error:
        result.left.append((package, f"it cannot be imported: {error}"))
        return
    own = {name: name for name in FAST if name.partition(".")[0] == package}
    vendored = {name: f"glasflow.{name}" for name in FAST if package == "glasflow" and name.startswith("nflows.")}
    found = {name: _found(where) for name, where in {**own, **vendored}.items()}
    with _LOCK:
        forget(package)
        # importing it may have been waited for
        if package not in _PATCHED:
            result._packages.append(package)
            _PATCHED[package] = {}
            for name, kind in found.items():
                _patch_class(name, kind, _PATCHED[package], result)


def _patch_class(name: str, kind: type | None, before: dict[type, dict[str, Any]], result: Patch) -> None:
    if kind is None:
        result.left.append((name, "it is not there"))
    elif reason := why_unknown(kind):
        result.left.append((name, reason))
    else:
        methods = fast_methods(kind)
        before[kind] = {method: vars(kind).get(method) for method in methods}
        for method, function in methods.items():
            setattr(kind, method, function)
        result.replaced.append(name)


def _found(name: str) -> type | None:
    module, _, kind = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), kind, None)
    except Exception:
        return None
    return found if isinstance(found, type) else None
