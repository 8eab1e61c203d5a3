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
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
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
# packages whose wrappers leave a method what it is
_DECORATORS = ("torch", "functools", "contextlib", "huggingface_hub")
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
    method: Callable[..., Any] = getattr(own_class(kind), name)
    return method.__dict__["_pyflow_own"] if _is_ours(method) else method


def _is_ours(method: Any) -> bool:
    # a wrapper of our method by functools.wraps copies its attributes
    return isinstance(method, FunctionType) and method.__globals__["__name__"] == "pyflow.integrations._fast"


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
                if not _is_ours(value) and not _of_package(value, each.__module__):
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
    for name in sorted(_modules_of(kind), key=lambda name: (name != kind.__module__, name)):
        package = name.partition(".")[0]
        if _digest(sys.modules[name]) not in _sources().get(name, ()):
            _warn(package)
            return f"the source of {name} is not that of {PACKAGES[package]} {' or '.join(TESTED[package])}"
    return ""


def _modules_of(kind: Any) -> set[str]:
    """Return the modules of packages that hold a class, its bases, and what their methods use of the same package."""
    found, seen, queue = set(), set(), [*kind.__mro__]
    while queue:
        each = queue.pop()
        name = getattr(each, "__module__", None) or ""
        if id(each) in seen or name.partition(".")[0] not in PACKAGES or name not in sys.modules:
            continue
        seen.add(id(each))
        found.add(name)
        if isinstance(each, type):
            queue += [*each.__mro__, *[v.__dict__["_pyflow_own"] if _is_ours(v) else v for v in vars(each).values()]]
        elif isinstance(each := inspect.unwrap(each), FunctionType):
            queue += _used(each)
    return found


def _used(function: FunctionType) -> Iterator[Any]:
    """Yield what a function uses of the globals of its module, and of modules among them."""
    codes, names = [function.__code__], set()
    while codes:
        code = codes.pop()
        names |= {*code.co_names}
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]
    yield from function.__defaults__ or ()
    modules = [vars(sys.modules[function.__module__])]
    while modules:
        space = modules.pop()
        for value in [space[name] for name in names if name in space]:
            if isinstance(value, ModuleType):
                # a package may have modules of its own
                if value.__name__.partition(".")[0] == function.__module__.partition(".")[0]:
                    modules.append(vars(value))
            else:
                yield value


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
        modules |= _modules_of(kind)
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
