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

from .._classes import named, own_class, own_method

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
        fast: calls that ran on kernels.
        fallback: calls that ran as in the package, by reason.
        made: what fast methods keep, by name.
    """

    def __init__(self) -> None:
        self.fast = 0
        self.fallback: Counter[str] = Counter()
        self.made: dict[str, Any] = {}


# by id, which dynamo can look up
RECORDS: dict[int, Record] = {}


def record(module: Any) -> Record:
    key = id(module)
    found = RECORDS.get(key)
    if found is None:
        found = RECORDS[key] = Record()
        weakref.finalize(module, RECORDS.pop, key, None)
    return found


def ran(module: Any) -> None:
    """Count a call that ran on kernels; a counter would break the graph of torch.compile."""
    if not torch.compiler.is_compiling():
        record(module).fast += 1


def fell(module: Any, reason: str) -> None:
    """Count a call that ran as in the package."""
    if not torch.compiler.is_compiling():
        record(module).fallback[reason] += 1


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
        def counted(self: Any, *args: Any, **named: Any) -> Any:
            result = function(self, *args, **named)
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


@functools.cache
def fast_class(kind: type) -> type:
    """Return the subclass of a class that has its fast methods, and neither state nor a constructor of its own.

    Raises:
        TypeError: the class cannot have subclasses.
    """
    space = {
        **fast_methods(kind), "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__,
        "_pyflow_own_class": kind, "__reduce_ex__": _reduce_ex, "__copy__": _copy, "__deepcopy__": _deepcopy,
    }  # fmt: skip
    return type(kind)(kind.__name__, (kind,), space)


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """Pickle as an object of the package's class, which loads where pyflow is not installed."""
    kind = own_class(type(self))
    if kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__:
        rebuild, args, *rest = kind.__reduce_ex__(self, protocol)
        return rebuild, tuple(kind if each is type(self) else each for each in args), *rest
    return copyreg._reconstructor, (kind, object, None), _state(self)  # type: ignore[attr-defined]


def _state(self: Any) -> Any:
    # Python 3.10 has no object.__getstate__
    get = getattr(self, "__getstate__", None)
    return vars(self) if get is None else get()


def _copy(self: Any) -> Any:
    own = own_class(type(self))
    return _again(self, own.__copy__(self) if hasattr(own, "__copy__") else _rebuilt(self, lambda state: state))


def _deepcopy(self: Any, memo: Any) -> Any:
    own = own_class(type(self))
    if hasattr(own, "__deepcopy__"):
        return _again(self, own.__deepcopy__(self, memo))
    return _again(self, _rebuilt(self, lambda state: copy.deepcopy(state, memo), memo))


def _rebuilt(self: Any, copied: Callable[[Any], Any], memo: Any = None) -> Any:
    rebuild, args, *rest = self.__reduce_ex__(4)
    new = rebuild(*args)
    if memo is not None:
        memo[id(self)] = new
    state = copied(rest[0]) if rest and rest[0] is not None else None
    if state is not None:
        if hasattr(new, "__setstate__"):
            new.__setstate__(state)
        else:
            vars(new).update(state)
    return new


def _again(self: Any, new: Any) -> Any:
    """Let a copy have the fast class too."""
    if type(new) is own_class(type(self)):
        new.__class__ = type(self)
    return new
