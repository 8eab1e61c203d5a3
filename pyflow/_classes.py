"""Classes of other packages: their names in our tables, and whether their source is one that we know.

`python -c "from pyflow import _classes; _classes.print_sources()"` prints pyflow/_sources.py for the packages that are
installed; what it has of others stays.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
import textwrap
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any

from ._definitions import Definition, definitions, digest, file_digest, is_ours, known
from ._definitions import own_class as own_class

# packages whose classes are known by name, and the distributions that bring them
PACKAGES = {
    "nflows": "nflows", "glasflow": "glasflow", "normflows": "normflows", "zuko": "zuko", "sbi": "sbi",
    "dingo": "dingo-gw", "vector_quantize_pytorch": "vector-quantize-pytorch", "diffusers": "diffusers",
}  # fmt: skip
# classes that rules meet inside of those in the tables
_INSIDE = (
    "nflows.transforms.orthogonal.HouseholderSequence",
    "normflows.flows.reshape.Split",
    "normflows.flows.reshape.Merge",
)
# what files and hubs are for
_APART = frozenset({"diffusers.configuration_utils.ConfigMixin", "diffusers.utils.hub_utils.PushToHubMixin"})
# packages whose wrappers leave a method what it is
_DECORATORS = ("torch", "functools", "contextlib", "huggingface_hub")
# the releases that tests have run with
TESTED = {
    "nflows": ("0.13", "0.14"), "glasflow": ("0.4.0", "0.4.1"), "normflows": ("1.7.2", "1.7.3"),
    "zuko": ("1.5.0", "1.6.0"), "sbi": ("0.27.0",), "dingo": ("0.10.3",),
    "vector_quantize_pytorch": ("1.28.3", "1.32.0"), "diffusers": ("0.35.2", "0.42.0", "0.42.1"),
}  # fmt: skip


def named(kind: Any) -> str:
    """Return the name of a class in the tables; glasflow carries a copy of nflows."""
    kind = own_class(kind)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return name.removeprefix("glasflow.") if name.startswith("glasflow.nflows.") else name


def own_method(kind: Any, name: str) -> Callable[..., Any]:
    """Return a method of a class as it is without ours."""
    method: Callable[..., Any] = getattr(own_class(kind), name)
    return method.__dict__["_pyflow_own"] if is_ours(method) else method


def why_unknown(kind: Any) -> str:
    """Return why a class may do something else than the one that tests have run with; empty if it does not."""
    kind = own_class(kind)
    # others may replace methods at any time
    replaced = _replaced(kind)
    return f"its method {replaced} has been replaced" if replaced else _why_unknown(kind)


def _replaced(kind: Any) -> str:
    """Return the name of a method that is not the one of the class's source; empty if there is none."""
    for each in kind.__mro__:
        package = each.__module__.partition(".")[0]
        if package == "torch" and not _of_package(vars(each).get("forward"), each.__module__):
            return "forward"
        if package in PACKAGES and each.__module__ in sys.modules:
            for name, value in vars(each).items():
                if not is_ours(value) and not _of_package(value, each.__module__):
                    return name
    return ""


def _of_package(value: Any, module: str) -> bool:
    """Whether an attribute of a class may be one that its module has written there."""
    value = getattr(value, "__func__", value)  # of a static or a class method
    value = value.fget if isinstance(value, property) else value
    if not isinstance(value, FunctionType):
        # a mock, a partial, a function in C
        return not callable(value) or isinstance(value, type)
    while (inner := getattr(value, "__wrapped__", None)) is not None:
        # a decorator of torch or of Python, not somebody's around the method
        if value.__globals__.get("__name__", "").partition(".")[0] not in (*_DECORATORS, module.partition(".")[0]):
            return False
        value = inner
    return bool(value.__module__ == module)


@functools.cache
def _why_unknown(kind: Any) -> str:
    # the class's own module first
    made_of = sorted(_made_of(kind).items(), key=lambda pair: (pair[1][0].__module__ != kind.__module__, pair[0]))
    for name, same in made_of:
        if not known(name, same, _digests()):
            package = name.partition(".")[0]
            _warn(package)
            return f"the source of {name} is not that of {PACKAGES[package]} {' or '.join(TESTED[package])}"
    return ""


def _made_of(kind: type) -> dict[str, list[Definition]]:
    return definitions(kind, frozenset(PACKAGES), _APART)


@functools.cache
def _digests() -> frozenset[str]:
    from ._sources import DIGESTS

    return frozenset(DIGESTS.split())


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


def sources() -> dict[str, list[Definition]]:
    """Return, by name, what all classes of installed packages are made of that the tables name."""
    from .flows import _peers
    from .flows.lower import look
    from .integrations import _fast

    tables = (*look.TABLES, _peers.STANDS, _fast.FAST)
    names = {kind for table in tables for kind in table if isinstance(kind, str)} | {*_INSIDE}
    names |= {f"glasflow.{name}" for name in names if name.startswith("nflows.")}
    found: dict[str, list[Definition]] = {}
    for name in names:
        module, _, qualname = name.rpartition(".")
        if name.partition(".")[0] not in PACKAGES:
            continue
        try:
            kind = getattr(importlib.import_module(module), qualname)
        except (ImportError, AttributeError):
            continue
        found |= _made_of(kind)
    return found


def print_sources() -> None:
    """Print the table with the digests of the installed packages added."""
    found = sources()
    files = {file_digest(same[0].__module__) for same in found.values()}
    digests = {*_digests(), *files, *[digest(name, same) for name, same in found.items()]}
    print('"""Digests of what pyflow knows of other packages, written by `_classes.print_sources`."""')
    print('\nDIGESTS = """')
    print(textwrap.fill(" ".join(sorted(digests)), 120))
    print('"""')
