"""What the classes of other packages are made of, and whether that is what tests have run with.

A digest of a function has what it computes: neither its docstring, comments, annotations and place in the file, nor the
rest of the file, so that a release that changes other things leaves it known. It is the same for every Python.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import linecache
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeAlias

# what a function computes does not depend on these fields of its syntax tree
_WITHOUT_EFFECT = {"annotation", "returns", "ctx", "kind", "type_comment", "type_ignores", "type_params"}
_CONSTANTS = (int, float, str, type(None))

_Cached = type(functools.cache(len))

Definition: TypeAlias = "FunctionType | type"


def own_class(kind: Any) -> Any:
    """Return the class itself, for a class with fast methods the one of the package."""
    return kind.__dict__.get("_pyflow_own_class", kind)


def is_ours(method: Any) -> bool:
    """Whether a method of a package's class is one of pyflow.integrations."""
    # a wrapper of our method by functools.wraps copies its attributes
    return isinstance(method, FunctionType) and method.__globals__["__name__"] == "pyflow.integrations._fast"


def definitions(kind: type, packages: frozenset[str], apart: frozenset[str]) -> dict[str, list[Definition]]:
    """Return, by name, a class of a package, its bases, their methods, and what these use of the same package.

    Classes `apart` are left out with their methods.
    """
    found: dict[str, list[Definition]] = {}
    seen: set[int] = set()
    queue: list[Any] = [kind]
    while queue:
        each = queue.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if (parts := _parts(each, packages)) is not None:
            queue += parts
            continue
        if not isinstance(each, (FunctionType, type)):
            each = type(each)
        each = own_class(each) if isinstance(each, type) else each
        name = f"{each.__module__}.{each.__qualname__}"
        if name.partition(".")[0] not in packages or each.__module__ not in sys.modules or name in apart:
            continue
        same = found.setdefault(name, [])
        if each not in same:
            same.append(each)
        if isinstance(each, type):
            queue += [*each.__mro__[1:], *[v.__dict__["_pyflow_own"] if is_ours(v) else v for v in vars(each).values()]]
        else:
            queue += _used(each)
    return found


def known(name: str, same: list[Definition], digests: frozenset[str]) -> bool:
    """Whether the definitions of one name, such as the getter and the setter of a property, are among the digests."""
    # the whole file first, which takes no parser
    return file_digest(same[0].__module__) in digests or digest(name, same) in digests


@functools.cache
def file_digest(module: str) -> str:
    """Return the digest of a module's file; empty if there is none."""
    path = getattr(sys.modules[module], "__file__", None)
    if path is None or not Path(path).is_file():
        return ""
    # git may have changed the ends of lines
    return _digest(module, Path(path).read_bytes().replace(b"\r\n", b"\n").decode(errors="replace"))


def digest(name: str, same: list[Definition]) -> str:
    """Return the digest of the definitions of one name."""
    texts = [_class_text(each) if isinstance(each, type) else _function_text(each) for each in same]
    return _digest(name, *sorted(texts)) if all(texts) else ""


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def _parts(value: Any, packages: frozenset[str]) -> list[Any] | None:
    """Return what a table, a descriptor, a partial or another package's wrapper holds; None for what counts itself."""
    if isinstance(value, dict):
        return [*value.values()]
    if isinstance(value, (list, tuple)):
        return [*value]
    if isinstance(value, (staticmethod, classmethod)):
        return [value.__func__]
    if isinstance(value, property):
        return [value.fget, value.fset, value.fdel]
    if isinstance(value, functools.cached_property):
        return [value.func]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, FunctionType) and _package(value) in packages:
        # exec has made those of a dataclass, from its fields
        return [] if value.__code__.co_filename.startswith("<") else None
    if isinstance(value, (FunctionType, _Cached)):
        # named as what it wraps, but its source is that of torch, of Python or of a hub
        return [value.__wrapped__] if hasattr(value, "__wrapped__") else []
    return None


def _package(function: FunctionType) -> str:
    """Return the package that a function's source is from."""
    return str(function.__globals__["__name__"]).partition(".")[0]


def _used(function: FunctionType) -> Iterator[Any]:
    """Yield a function's defaults, what it wraps, and the globals that it uses, also those of modules among them."""
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    if (inner := getattr(function, "__wrapped__", None)) is not None:
        yield inner
    names = _names(function.__code__)
    modules = [vars(sys.modules[function.__module__])]
    while modules:
        space = modules.pop()
        for value in [space[name] for name in names if name in space]:
            if not isinstance(value, ModuleType):
                yield value
            elif value.__name__.partition(".")[0] == function.__module__.partition(".")[0]:
                # a package may have modules of its own
                modules.append(vars(value))


def _names(code: CodeType) -> set[str]:
    """Return the names of globals and attributes in a function and in those within it."""
    return {*code.co_names}.union(*[_names(const) for const in code.co_consts if isinstance(const, CodeType)])


def _class_text(kind: type) -> str:
    constants = {k: v for k, v in vars(kind).items() if not k.startswith("__") and isinstance(v, _CONSTANTS)}
    return repr(([f"{base.__module__}.{base.__qualname__}" for base in kind.__bases__], sorted(constants.items())))


def _function_text(function: FunctionType) -> str:
    """Return the function's syntax tree and the numbers that it takes from its module; empty without its source."""
    nodes = _nodes(inspect.getsourcefile(function) or "").get(function.__code__.co_firstlineno, [])
    space, names = function.__globals__, _names(function.__code__)
    numbers = {name: space[name] for name in names if type(space.get(name)) in (int, float)}
    return repr(([_tree(node) for node in nodes], sorted(numbers.items()))) if nodes else ""


@functools.cache
def _nodes(path: str) -> dict[int, list[ast.AST]]:
    """Return the functions of a file by their first line, that of a decorator if there is one."""
    found: dict[int, list[ast.AST]] = {}
    for node in ast.walk(ast.parse("".join(linecache.getlines(path)))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            decorators = getattr(node, "decorator_list", ())
            found.setdefault(min([node.lineno, *[each.lineno for each in decorators]]), []).append(node)
    return found


def _tree(node: Any) -> Any:
    """Return a syntax tree as tuples, without what has no effect and what versions of Python write in other ways."""
    if isinstance(node, list):
        # an annotation alone does nothing
        return [_tree(each) for each in node if not isinstance(each, ast.AnnAssign) or each.value]
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.JoinedStr):
        texts = "".join(str(each.value) for each in node.values if isinstance(each, ast.Constant))
        return texts, [_tree(each.value) for each in node.values if isinstance(each, ast.FormattedValue)]
    if isinstance(node, ast.AnnAssign) and node.value:
        node = ast.Assign([node.target], node.value)
    fields = []
    for name, value in ast.iter_fields(node):
        if name == "body" and _is_documented(node):
            value = value[1:]
        if name not in _WITHOUT_EFFECT and value not in (None, []):
            fields.append((name, _tree(value)))
    return (type(node).__name__, *fields)


def _is_documented(node: ast.AST) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node, False) is not None
