"""`pyflow.accelerate`: modules of other packages get classes that run on pyflow's kernels, in place."""

from __future__ import annotations

import fnmatch
import textwrap
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from .._classes import PACKAGES, named, own_class, why_unknown
from .._torch import is_compiled
from ._fast import FAST, GAINS, record, said, swap
from ._verify import verified

Which = Iterable[str | type] | None


class Entry(NamedTuple):
    """An object of a model, and what became of it.

    Attributes:
        path: where it is in the model; "" is the model itself.
        kind: its class, with the package.
        reason: what runs in its place, or why it was left.
    """

    path: str
    kind: str
    reason: str


class Calls(NamedTuple):
    """How often an accelerated object ran, in eager mode.

    Attributes:
        path: where it is in the model.
        fast: calls that ran on kernels.
        fallback: calls that ran as in the package.
        reasons: of these, with their numbers.
    """

    path: str
    fast: int
    fallback: int
    reasons: dict[str, int]


class Report:
    """What `pyflow.accelerate` did; as a context manager it undoes this at the end.

    Attributes:
        replaced: the objects whose class has fast methods now.
        left: objects of packages that pyflow knows which run as before.
    """

    def __init__(
        self, kind: str, replaced: list[Entry], left: list[Entry], swapped: list[tuple[str, Any]],
        fell: dict[str, str],
    ) -> None:  # fmt: skip
        self.kind, self.replaced, self.left = kind, replaced, left
        # what did not run fast with the batch of `verify`, by path, with the reason
        self._fell = fell
        self._swapped = [(path, weakref.ref(each), type(each)) for path, each in swapped]

    def calls(self) -> list[Calls]:
        """Return how often each object ran fast, and how often as in its package; not under torch.compile."""
        counts = [(path, record(each)) for path, each, _ in self._alive()]
        return [Calls(path, of.fast, of.fallback.total(), dict(of.fallback)) for path, of in counts]

    def restore(self, copied: Any = None) -> None:
        """Give every object its own class again.

        Args:
            copied: a copy of the model, which is restored instead: copies of an accelerated model are accelerated.

        Raises:
            TypeError: copied is no module.
            RuntimeError: another class has been put over ours since, as by weight_norm or fully_shard; nothing is
                restored.
        """
        if copied is None:
            objects = [*self._alive()]
        else:
            found = [(path, each, _fast_class(each)) for path, each in _objects(copied, "restore: copied")]
            objects = [(path, each, kind) for path, each, kind in found if kind]
        for path, each, kind in objects:
            if type(each) not in (kind, own_class(kind)):
                raise RuntimeError(
                    f"restore: {_shown(path)} has got the class {type(each).__name__} since it was accelerated; "
                    "take that off first"
                )
        for _, each, kind in objects:
            each.__class__ = own_class(kind)
        if copied is None:
            self._swapped = []

    def _alive(self) -> Iterator[tuple[str, Any, type]]:
        for path, ref, kind in self._swapped:
            if (each := ref()) is not None:
                yield path, each, kind

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def __str__(self) -> str:
        if not self.replaced and not self.left:
            return f"{self.kind}: nothing to accelerate. Looked for\n" + "\n".join(
                textwrap.wrap(_known(), 118, initial_indent="  ", subsequent_indent="  ")
            )
        paths = [entry.path for entry in self.replaced]
        outer = [entry for entry in self.replaced if not _inside(entry.path, paths)]
        lines = [f"{self.kind}: {_count(len(self.replaced), 'object')} accelerated, {len(self.left)} left"]
        for entry in outer:
            inner = sum(_inside(path, [entry.path]) for path in paths)
            more = f" (and {_count(inner, 'layer')} in it, for calls of their own)" if inner else ""
            lines.append(f"  {_shown(entry.path)}: {entry.kind}{more}")
            reasons = entry.reason.splitlines()
            lines += [f"    {line}" for line in reasons]
            if entry.path in self._fell:
                lines.append(f"    ran as in its package with the batch of verify: {self._fell[entry.path]}")
            elif gain := GAINS.get(entry.kind):
                fuses = not reasons or any(": left, " not in line for line in reasons)
                lines.append(f"    expect {gain if fuses else 'no gain while all layers are left'}")
        lines += [f"  left: {_shown(entry.path)}: {entry.kind}: {entry.reason}" for entry in self.left]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Report: {len(self.replaced)} accelerated, {len(self.left)} left>"


def accelerate(model: Any, *, include: Which = None, exclude: Which = None, verify: Any = None) -> Report:
    """Let a model of another package run on pyflow's kernels: its modules get fast classes, in place.

    Parameters, buffers, hooks, optimisers, train and eval mode, state_dict, deepcopy and pickle are as before: a fast
    class is a subclass of the module's own, without state. A pickle holds the module's own class, so that it loads
    where pyflow is not installed (with weights_only=True allow `copyreg._reconstructor`).

    Args:
        model: a module, which may hold accelerated ones anywhere; a pipeline or a scheduler of diffusers.
        include: names, patterns of paths ("encoder.*") or classes: accelerate these only.
        exclude: the same: leave these.
        verify: a batch, or a tuple of arguments. The model runs it as it is and accelerated, and is accelerated only if
            outputs, log-determinants and gradients agree. A flow computes log_prob, other models are called. The report
            says what did not run fast with this batch.

    Returns:
        A report: print it; `replaced`, `left`, `calls()`, `restore()`; a context manager.

    Raises:
        TypeError: model is no module.
        ValueError: it is accelerated, compiled, scripted or sharded already; `verify` found a difference. The model is
            as it was.

    Notes:
        Whole flows of nflows, glasflow, normflows and zuko run as one program where every layer has an instruction, see
        `pyflow.flows.fuse`; else layer by layer. A call whose input a kernel does not take runs as in the package, and
        is counted with the reason. Modules are left that compute something else than in the tested releases.

    Example:
        >>> import torch
        >>> report = accelerate(torch.nn.Linear(2, 2))
        >>> report.replaced
        []
    """
    objects = [*_objects(model)]
    _check(model, objects)
    chosen = _chooser("include", include, True), _chooser("exclude", exclude, False)
    fell: dict[str, str] = {}
    if verify is not None:
        fell = verified(model, verify, lambda copied: accelerate(copied, include=include, exclude=exclude))
    replaced: list[Entry] = []
    left: list[Entry] = []
    swapped: list[tuple[str, Any]] = []
    for path, each in objects:
        kind = named(_class_below(each))
        if kind not in FAST:
            # what is in an object that was replaced or left goes with it
            within = _inside(path, [entry.path for entry in (*replaced, *left)])
            if kind.partition(".")[0] in PACKAGES and not within:
                left.append(Entry(path, kind, "its class has no fast methods"))
            continue
        reason = _why_left(path, each, *chosen)
        if not reason:
            try:
                swap(each)
            # its class forbids subclasses, or its objects have no __dict__
            except TypeError as error:
                reason = str(error)
        if reason:
            left.append(Entry(path, kind, reason))
        else:
            swapped.append((path, each))
            replaced.append(Entry(path, kind, said(each)))
    return Report(type(model).__name__, replaced, left, swapped, fell)


def _fast_class(each: Any) -> type | None:
    """Return the class of ours that an object has, perhaps below another one."""
    return next((base for base in type(each).__mro__ if own_class(base) is not base), None)


def _objects(model: Any, argument: str = "accelerate: model") -> Iterator[tuple[str, Any]]:
    """Yield path and object for a module and those in it, for what a pipeline has, or for a scheduler."""
    if isinstance(model, nn.Module):
        yield from _modules(model)
    elif isinstance(parts := getattr(model, "components", None), dict):
        for name, part in parts.items():
            yield from _modules(part, name) if isinstance(part, nn.Module) else [(name, part)]
    elif named(type(model)) in FAST:
        yield "", model
    else:
        raise TypeError(
            f"{argument} must be a torch.nn.Module, a pipeline of diffusers or a scheduler with fast methods, got "
            f"{type(model).__name__}"
        )


def _modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield modules, and those of their hooks that are objects with fast methods."""
    for path, module in model.named_modules(prefix=prefix):
        yield path, module
        for hook in module._forward_pre_hooks.values():
            if named(type(hook)) in FAST:
                yield f"{path}.{type(hook).__name__}".removeprefix("."), hook


def _check(model: Any, objects: list[tuple[str, Any]]) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"accelerate: model must not be scripted or traced, got {type(model).__name__}")
    for path, each in objects:
        if own_class(type(each)) is not type(each):
            raise ValueError(
                f"accelerate: {_shown(path)} is accelerated already; call restore() of its report first, for a copy "
                "restore(copy)"
            )
        if is_compiled(each):
            raise ValueError(f"accelerate: {_shown(path)} is compiled already; accelerate it before")
        if any(base.__name__ in ("FSDPModule", "FullyShardedDataParallel") for base in type(each).__mro__):
            raise ValueError(f"accelerate: {_shown(path)} is sharded already; accelerate it before")


def _chooser(name: str, which: Which, default: bool) -> Callable[[str, Any], bool]:
    """Return whether an object is among those that the caller names."""
    if which is None:
        return lambda path, each: default
    which = [which] if isinstance(which, (str, type)) else list(which)
    for one in which:
        if not isinstance(one, (str, type)):
            raise TypeError(f"accelerate: {name} must hold names, patterns or classes, got {type(one).__name__}")

    def chosen(path: str, each: Any) -> bool:
        kind = own_class(type(each))
        names = path, kind.__name__, named(kind)
        return any(
            kind is one if isinstance(one, type) else any(fnmatch.fnmatchcase(name, one) for name in names)
            for one in which
        )

    return chosen


def _why_left(path: str, each: Any, included: Callable[[str, Any], bool], excluded: Callable[[str, Any], bool]) -> str:
    """Return why an object with fast methods runs as it is, empty if it need not."""
    if not included(path, each):
        return "it is not among those to include"
    if excluded(path, each):
        return "it is among those to exclude"
    if isinstance(each, torch.jit.ScriptModule):
        return "it is scripted or traced"
    if isinstance(each, nn.Module) and parametrize.is_parametrized(each):
        return "it has parametrizations"
    if isinstance(each, nn.modules.lazy.LazyModuleMixin):
        return "its parameters are not initialised"
    kind = type(each)
    # helpers of the fast methods too
    own = [name for name in vars(each) if callable(getattr(kind, name, None))]
    if own:
        return f"it has its own {own[0]}"
    for base in kind.__mro__:
        for name, function in vars(base).items():
            # super(self.__class__, self) of a subclass calls itself
            words = getattr(getattr(function, "__code__", None), "co_names", ())
            if base is not nn.Module and "super" in words and "__class__" in words:
                return f"its method {name} uses super(self.__class__, self)"
    return why_unknown(kind)


def _class_below(each: Any) -> type:
    """Return the class of an object, without that of its parametrizations."""
    kind = type(each)
    return kind.__mro__[1] if isinstance(each, nn.Module) and parametrize.is_parametrized(each) else kind


def _inside(path: str, outer: Iterable[str]) -> bool:
    return any(path != each and (not each or path.startswith(f"{each}.")) for each in outer)


def _shown(path: str) -> str:
    return path or "the model"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _known() -> str:
    packages: dict[str, list[str]] = {}
    for kind in FAST:
        packages.setdefault(kind.partition(".")[0], []).append(kind.rpartition(".")[2])
    return "; ".join(f"{package}: {', '.join(sorted({*kinds}))}" for package, kinds in packages.items())
