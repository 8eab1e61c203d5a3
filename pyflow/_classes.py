"""Classes of other packages: their names in our tables, and whether their source is one that we know.

`python -c "from pyflow import _classes; _classes.print_sources()"` prints pyflow/_sources.py for the packages that are
installed; what it has of others stays.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

# packages whose classes are known by name, and the distributions that bring them
PACKAGES = {
    "nflows": "nflows", "glasflow": "glasflow", "normflows": "normflows", "zuko": "zuko", "sbi": "sbi",
    "dingo": "dingo-gw", "vector_quantize_pytorch": "vector-quantize-pytorch", "diffusers": "diffusers",
}  # fmt: skip
# modules of classes that rules meet inside of those in the tables
_INSIDE = (
    "nflows.transforms.orthogonal.HouseholderSequence",
    "normflows.flows.reshape.Split",
    "normflows.flows.reshape.Merge",
)
# the releases that tests have run with
TESTED = {
    "nflows": ("0.14",), "glasflow": ("0.4.1",), "normflows": ("1.7.3",), "zuko": ("1.6.0",), "sbi": ("0.27.0",),
    "dingo": ("0.10.3",), "vector_quantize_pytorch": ("1.32.0",), "diffusers": ("0.42.1",),
}  # fmt: skip


def own_class(kind: Any) -> Any:
    """Return the class itself, for a class with fast methods the one of the package."""
    return kind.__dict__.get("_pyflow_own_class", kind)


def named(kind: Any) -> str:
    """Return the name of a class in the tables; glasflow carries a copy of nflows."""
    kind = own_class(kind)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return name.removeprefix("glasflow.") if name.startswith("glasflow.nflows.") else name


def own_method(kind: Any, name: str) -> Callable[..., Any]:
    """Return a method of a class as it is without ours."""
    method = getattr(own_class(kind), name)
    own: Callable[..., Any] = getattr(method, "_pyflow_own", method)
    return own


def why_unknown(kind: Any) -> str:
    """Return why a class may do something else than the one that tests have run with; empty if it does not."""
    return _why_unknown(own_class(kind))


@functools.cache
def _why_unknown(kind: Any) -> str:
    for each in kind.__mro__:
        package = each.__module__.partition(".")[0]
        if package not in PACKAGES or each.__module__ not in sys.modules:
            continue
        module = sys.modules[each.__module__]
        if _digest(module) not in _sources().get(each.__module__, ()):
            _warn(package)
            return f"the source of {each.__module__} is not that of {PACKAGES[package]} {' or '.join(TESTED[package])}"
        for name, value in vars(each).items():
            ours = hasattr(value, "_pyflow_own")
            if isinstance(value, FunctionType) and not ours and inspect.unwrap(value).__module__ != each.__module__:
                return f"its method {name} has been replaced"
    return ""


@functools.cache
def _sources() -> dict[str, tuple[str, ...]]:
    from ._sources import SOURCES

    return SOURCES


@functools.cache
def _digest(module: ModuleType) -> str:
    path = getattr(module, "__file__", None)
    if path is None or not Path(path).is_file():
        return ""
    # git may have changed the ends of lines
    text = Path(path).read_bytes().replace(b"\r\n", b"\n")
    return hashlib.sha256(text).hexdigest()[:12]


@functools.cache
def _warn(package: str) -> None:
    """Say once that a package is not one of the releases that tests have run with."""
    try:
        version = importlib.metadata.version(PACKAGES[package])
    except importlib.metadata.PackageNotFoundError:
        version = "without a version"
    if version not in TESTED[package]:
        tested = " and ".join(TESTED[package])
        warnings.warn(
            f"pyflow was tested with {PACKAGES[package]} {tested}, this is {version}: classes whose source has changed "
            "run as they are",
            stacklevel=2,
        )


def modules() -> set[str]:
    """Return the modules of all classes that the tables name, and of their bases."""
    from .flows import _peers
    from .flows.lower import look
    from .integrations import _fast

    tables = (look.RULES, look.STACKS, look.BASES, look.NETS, look.PARTS, _peers.STANDS, _fast.FAST)
    names = {kind for table in tables for kind in table if isinstance(kind, str)} | {*_INSIDE}
    names |= {f"glasflow.{name}" for name in names if name.startswith("nflows.")}
    modules = set()
    for name in names:
        module, _, qualname = name.rpartition(".")
        if name.partition(".")[0] not in PACKAGES:
            continue
        try:
            kind = getattr(importlib.import_module(module), qualname)
        except (ImportError, AttributeError):
            continue
        modules |= {each.__module__ for each in kind.__mro__ if each.__module__.partition(".")[0] in PACKAGES}
    return modules


def print_sources() -> None:
    """Print the table with the digests of the installed packages added."""
    table = {name: {*digests} for name, digests in _sources().items()}
    for name in modules():
        table.setdefault(name, set()).add(_digest(importlib.import_module(name)))
    print('"""Digests of the modules of other packages that pyflow knows, written by `_classes.print_sources`."""')
    print("\nSOURCES: dict[str, tuple[str, ...]] = {")
    for name in sorted(table):
        print(f'    "{name}": ({", ".join(repr(each) for each in sorted(table[name]))},),'.replace("'", '"'))
    print("}")
