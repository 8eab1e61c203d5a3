"""What a look at modules found, in flat lists that every call compares with what is there now."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import has_hooks

Path = tuple[str, ...]

# a look at a module holds only while none of these is filled; dynamo does not trace it
_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MODULES = itemgetter("_modules")


class Watch:
    """The modules below a root, their tensors, and what of them must stay for a program to be theirs.

    It refers to the dicts of modules rather than to their entries, so that a call finds what replaced them; the root is
    passed to every call, since it owns the watch.
    """

    def __init__(self, root: nn.Module) -> None:
        self.kind, self.length = type(root), len(vars(root))
        self.children_of_root = [*root._modules.values()]
        self.modules: list[nn.Module] = []
        self.paths: list[Path] = []
        self.kinds: list[type] = []
        self.counts: list[int] = []  # of modules inside
        self.forwards: dict[Any, Callable[..., Any]] = {}  # of classes
        self.spaces: list[dict[str, Any]] = []  # the modules' __dict__
        self.lengths: list[int] = []
        self.quiet: list[dict[str, Any]] = []  # those without hooks, and with
        self.hooked: list[dict[str, Any]] = []
        self.parents: list[dict[str, Any]] = []
        self.children: list[list[nn.Module | None]] = []
        self.options: list[tuple[nn.Module | None, Path, Callable[[Any], Any], Any]] = []
        self.attributes: list[tuple[dict[str, Any], str]] = []  # options that are entries of a module's __dict__
        self.values: list[Any] = []
        self.named: list[tuple[Path, str]] = []  # the same by path
        self.absent: list[tuple[dict[str, Any], str, str]] = []  # parameters and buffers that are None
        self.tensors: list[tuple[dict[str, Any], str, str]] = []  # parameters and buffers
        self.sites: list[tuple[Path, str]] = []  # the same by path
        self.shapes: list[torch.Size] = []
        self.read: list[_Read] = []

    def module(self, path: Path, module: nn.Module) -> None:
        if not path:
            return
        space = vars(module)
        self.modules.append(module)
        self.paths.append(path)
        self.kinds.append(type(module))
        self.counts.append(len(module._modules))
        self.forwards[type(module)] = type(module).forward
        self.spaces.append(space)
        # a forward of the module's own is one more entry
        self.lengths.append(len(space))
        (self.hooked if has_hooks(module) else self.quiet).append(space)
        if module._modules:
            self.parents.append(space)
            self.children.append([*module._modules.values()])

    def option(self, path: Path, module: nn.Module, get: Callable[[Any], Any]) -> Any:
        """Return get(module), which must stay."""
        value = get(module)
        self.options.append((module if path else None, path, get, dict(value) if isinstance(value, dict) else value))
        return value

    def attribute(self, path: Path, module: nn.Module, name: str) -> Any:
        """Return an entry of the __dict__ of a module below the root, which must stay: a quicker `option`."""
        value = vars(module)[name]
        self.attributes.append((vars(module), name))
        self.values.append(value)
        self.named.append((path, name))
        return value

    def tensor(self, path: Path, module: nn.Module, kind: str, name: str) -> int:
        """Return the place of one of a module's "_parameters" or "_buffers" among all, -1 if it is None."""
        value = vars(module)[kind][name]
        if value is None:
            self.absent.append((vars(module), kind, name))
            return -1
        self.tensors.append((vars(module), kind, name))
        self.sites.append((path, name))
        self.shapes.append(value.shape)
        return len(self.tensors) - 1

    def buffer(self, path: Path, module: nn.Module, name: str) -> Tensor:
        """Return a buffer, or a tensor beside them, that nobody trains and whose values must stay: a mask, indices."""
        self.read.append(_Read(vars(module), name))
        return self.read[-1].tensor

    def forget(self, count: int) -> None:
        """Keep the first tensors only."""
        del self.tensors[count:], self.sites[count:], self.shapes[count:]

    def weights(self, root: nn.Module) -> list[Tensor] | None:
        """Return the tensors as they are now; None if a module, a hook, an option or a shape has changed."""
        try:
            same = (
                type(root) is self.kind
                and len(vars(root)) == self.length
                and [*map(type, self.modules)] == self.kinds
                and [*map(len, self.spaces)] == self.lengths
                and all([kind.forward is forward for kind, forward in self.forwards.items()])
                and not any(chain.from_iterable(map(_HOOKS, self.quiet)))
                and all([any(_HOOKS(space)) for space in self.hooked])
                and [*root._modules.values()] == self.children_of_root
                and [*map(len, map(_MODULES, self.spaces))] == self.counts
                and [[*space["_modules"].values()] for space in self.parents] == self.children
                and [space[name] for space, name in self.attributes] == self.values
                and all([get(root if m is None else m) == value for m, _, get, value in self.options])
                and all([space[kind][name] is None for space, kind, name in self.absent])
                and all([each.stays() for each in self.read])
            )
            if same:
                weights = [space[kind][name] for space, kind, name in self.tensors]
                if [weight.shape for weight in weights] == self.shapes:
                    return weights
        # a tensor or an option is gone, or a number is several now
        except (AttributeError, KeyError, RuntimeError):
            pass
        return None

    def traced_weights(self, root: nn.Module) -> list[Tensor]:
        """Return the tensors in a trace of dynamo, which guards what it reads: here every class and option.

        It does not guard the values of buffers that were read.
        """
        assert len(root._modules) == len(self.children_of_root)
        for path, kind, count in zip(self.paths, self.kinds, self.counts, strict=True):
            module = at(root, path)
            assert len(module._modules) == count and type(module) is kind
        for _, path, get, value in self.options:
            assert get(at(root, path)) == value
        for (path, name), value in zip(self.named, self.values, strict=True):
            assert getattr(at(root, path), name) == value
        return [getattr(at(root, path), name) for path, name in self.sites]


class _Read:
    """A buffer, or another tensor of a module, whose values were read.

    They are taken to stay while it is the same tensor of the same version, as one that is moved, loaded or written to
    in place is not; what writes through `.data` or numpy is not seen. An inference tensor has no version. One that
    requires a gradient is no constant any more.
    """

    def __init__(self, space: dict[str, Any], name: str) -> None:
        self.space, self.name = space, name
        self.tensor = self.now()
        self.version, self.values = _version(self.tensor), self.tensor.tolist()
        self.requires_grad = self.tensor.requires_grad

    def now(self) -> Tensor:
        buffers = self.space["_buffers"]
        found: Tensor = (buffers if self.name in buffers else self.space)[self.name]
        return found

    def stays(self) -> bool:
        tensor = self.now()
        if tensor.requires_grad != self.requires_grad:
            return False
        if tensor is self.tensor and 0 <= _version(tensor) == self.version:
            return True
        # DistributedDataParallel writes the same values at every call
        self.tensor, self.version = tensor, _version(tensor)
        return bool(self.tensor.tolist() == self.values)


def at(root: nn.Module, path: Path) -> Any:
    module: Any = root
    for name in path:
        module = getattr(module, name)
    return module


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def owned(path: Path, module: nn.Module) -> Any:
    """Return what a root may keep of a module at this path below it: a proxy of the root itself."""
    return module if path else weakref.proxy(module)
