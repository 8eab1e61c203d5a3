"""Classes of other packages that run on pyflow's ops: their fast methods, and the classes that have these."""

from __future__ import annotations

import copy
import copyreg
import functools
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from .._classes import named, own_class, own_method
from ..flows._fuser import Fuser

Method = Callable[..., Any]
F = TypeVar("F", bound=Method)

# by qualified name of the class, then by name of the method
FAST: dict[str, dict[str, Method]] = {}
# what a report says of an object, and what a user may expect of its class
SAYS: dict[str, Callable[[Any], str]] = {}
GAINS: dict[str, str] = {}


class Falls(NamedTuple):
    """What a fast method returns where the class's own method has to run, and why."""

    reason: str


# what a fast method returns that has counted the reason itself
LEFT = Falls("")


class Record:
    """What pyflow keeps of an object whose class has fast methods: nothing of it is in the object.

    Attributes:
        kind: name of the class.
        fast: calls that ran on kernels.
        fallback: calls that ran as in the package, by reason.
        fuser: runs a module as a program.
        made: what other fast methods keep, by name.
    """

    def __init__(self, of: Any) -> None:
        self.kind = named(type(of))
        self.fast = 0
        self.fallback: Counter[str] = Counter()
        self.fuser = Fuser(of if isinstance(of, nn.Module) else None)
        self.made: dict[str, Any] = {}


# by id, which dynamo can look up
RECORDS: dict[int, Record] = {}
# of objects that are gone
_GONE: dict[str, tuple[int, Counter[str]]] = {}


def record(of: Any) -> Record:
    key = id(of)
    found = RECORDS.get(key)
    if found is None:
        # threads may make one each
        made = Record(of)
        found = RECORDS.setdefault(key, made)
        if found is made:
            weakref.finalize(of, _forget, key)
    return found


def _forget(key: int) -> None:
    _add(_GONE, RECORDS.pop(key))


def _add(to: dict[str, tuple[int, Counter[str]]], of: Record) -> None:
    fast, fallback = to.get(of.kind, (0, Counter()))
    to[of.kind] = fast + of.fast, fallback + of.fallback


def totals() -> dict[str, tuple[int, Counter[str]]]:
    """Return for each class how many calls ran on kernels, and how many as in the package, by reason."""
    total = dict(_GONE)
    for each in [*RECORDS.values()]:
        _add(total, each)
    return total


def ran(of: Any) -> None:
    """Count a call that ran on kernels; a counter would break the graph of torch.compile."""
    if not torch.compiler.is_compiling():
        record(of).fast += 1


def fell(of: Any, reason: str) -> None:
    """Count a call that ran as in the package."""
    if not torch.compiler.is_compiling():
        record(of).fallback[reason] += 1


def has_its_own(each: Any, methods: tuple[str, ...]) -> bool:
    """Whether one of the methods has been set on the object itself."""
    space = each.__dict__
    return any([name in space for name in methods])


def said(each: Any) -> str:
    """Return what runs in place of an object's own methods."""
    return SAYS[named(type(each))](each)


def fast(*kinds: str, name: str | None = None, says: str = "", gain: str = "") -> Callable[[F], F]:
    """Register a fast method of classes.

    The function gets what the method gets. It returns the method's result, or `Falls` before it has changed anything.

    Args:
        kinds: qualified names of the classes.
        name: of the method, if it is not the function's.
        says: what runs in place of the class's own methods.
        gain: what a user may expect, as it was measured.
    """

    def add(function: F) -> F:
        @functools.wraps(function)
        def counted(self: Any, *args: Any, **given: Any) -> Any:
            result = function(self, *args, **given)
            if type(result) is not Falls:
                ran(self)
            return result

        for kind in kinds:
            FAST.setdefault(kind, {})[name or function.__name__] = counted
            if says:
                SAYS[kind] = lambda _: says
            if gain:
                GAINS[kind] = gain
        return function

    return add


def fast_methods(kind: type) -> dict[str, Method]:
    """Return the methods of a class that run its fast ones where they can; none for a class that has none."""
    return {name: _method(kind, name) for name in FAST.get(named(kind), ())}


@functools.cache
def _method(kind: type, name: str) -> Method:
    own, quick = own_method(kind, name), FAST[named(kind)][name]

    @functools.wraps(own)
    def method(self: Any, *args: Any, **given: Any) -> Any:
        # a subclass may mean something else
        if own_class(type(self)) is not kind:
            return own(self, *args, **given)
        result = quick(self, *args, **given)
        if type(result) is not Falls:
            return result
        if result.reason:
            fell(self, result.reason)
        return own(self, *args, **given)

    vars(method)["_pyflow_own"] = own
    return method


def swap(each: Any) -> None:
    """Give an object the fast class of its own.

    Raises:
        TypeError: its class forbids it.
    """
    kind: Any = type(each)
    each.__class__ = _fast_class(kind)
    record(each)


@functools.cache
def _fast_class(kind: type) -> type:
    """Return the subclass of a class that has its fast methods, and neither state nor a constructor of its own."""
    space = {
        **fast_methods(kind), "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__,
        "_pyflow_own_class": kind, "__reduce_ex__": _reduce_ex, "__copy__": _copy, "__deepcopy__": _deepcopy,
    }  # fmt: skip
    return type(kind)(kind.__name__, (kind,), space)


def _below(kind: type) -> type:
    """Return the class of the package below a fast one, over which another may lie, as that of parametrizations."""
    return next(own_class(each) for each in kind.__mro__ if own_class(each) is not each)


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """Pickle as an object of the package's class, which loads where pyflow is not installed."""
    kind = _below(type(self))
    if own_class(type(self)) is not kind:
        return kind.__reduce_ex__(self, protocol)  # type: ignore[call-arg]
    if any(getattr(kind, name) is not getattr(object, name) for name in ("__reduce__", "__reduce_ex__")):
        rebuild, args, *rest = kind.__reduce_ex__(self, protocol)
        return rebuild, tuple([kind if each is type(self) else each for each in args]), *rest
    # Python 3.10 has no object.__getstate__
    state = self.__getstate__() if hasattr(self, "__getstate__") else vars(self)
    return copyreg._reconstructor, (kind, object, None), state  # type: ignore[attr-defined]


def _copy(self: Any) -> Any:
    own = _below(type(self))
    return _like(self, own.__copy__(self) if hasattr(own, "__copy__") else _rebuilt(self, None))


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    own = _below(type(self))
    return _like(self, own.__deepcopy__(self, memo) if hasattr(own, "__deepcopy__") else _rebuilt(self, memo))


def _rebuilt(self: Any, memo: dict[int, Any] | None) -> Any:
    """Return a copy as the module `copy` makes it, deep with a memo."""
    kind = type(self)
    if own_class(kind) is kind:
        # a class over ours, which torch's parametrizations forbid to pickle
        new, state = kind.__new__(kind), vars(self)
    else:
        rebuild, args, *rest = self.__reduce_ex__(4)
        new, state = rebuild(*args), rest[0] if rest else None
    if memo is not None:
        memo[id(self)] = new
        state = copy.deepcopy(state, memo)
    if hasattr(new, "__setstate__"):
        new.__setstate__(state)
    else:
        vars(new).update(state)
    return new


def _like(self: Any, new: Any) -> Any:
    # if no other class lies over ours
    if type(new) is own_class(type(self)) is not type(self):
        swap(new)
    return new
