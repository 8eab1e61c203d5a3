"""Find the tensors inside the arguments of a stack of layers, and rebuild the arguments with other tensors."""

from __future__ import annotations

import copy
import enum
import functools
import itertools
import numbers
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._torch import tree_flatten, tree_unflatten

# how many levels of objects inside objects are searched
_DEPTH = 4
# types that can hold no tensor
_PLAIN = (
    numbers.Number, str, bytes, type(None), enum.Enum, np.ndarray, np.generic, torch.dtype, torch.device, torch.Size,
    torch.Generator, type,
)  # fmt: skip
# types whose attributes are not searched or copied
_CLOSED = (Tensor, nn.Module, types.FunctionType, types.MethodType, types.ModuleType, *_PLAIN)


class Context:
    """The tensors in arguments: passed directly, in containers, and in the attributes of objects."""

    def __init__(self, context: tuple, named: dict) -> None:
        self.context, self.named = context, named
        leaves, self._fill = _flatten((context, named), 0)
        self._where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.tensors = [leaves[i] for i in self._where]
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._closed = sorted({type(v).__name__ for v in self._leaves if not isinstance(v, _PLAIN)})

    def forget(self) -> None:
        """Drop the references to the arguments and their tensors; autograd saves the tensors."""
        del self.context, self.named, self.tensors

    def filled(self, tensors: Sequence[Tensor]) -> tuple[tuple, dict]:
        """Return (context, named) with `tensors` replaced by these."""
        leaves = [*self._leaves]
        for i, tensor in zip(self._where, tensors, strict=False):
            leaves[i] = tensor
        return self._fill(leaves)

    def check(self, outputs: Iterable[Tensor], known: Iterable[Tensor]) -> None:
        """Raise if `outputs` depend on a tensor that needs a gradient but is hidden in an object of the arguments."""
        if not self._closed:
            return
        known_ids = {id(t) for t in known}
        ahead = [o.grad_fn for o in outputs if o.grad_fn is not None]
        seen = {*ahead}
        while ahead:
            for node, _ in ahead.pop().next_functions:
                if node is None or node in seen:
                    continue
                if hasattr(node, "variable") and id(node.variable) not in known_ids:
                    raise RuntimeError(
                        "ReversibleSequential: context must not hide tensors that need a gradient, got one inside "
                        f"{', '.join(self._closed)}; pass the tensor itself, or detach it"
                    )
                seen.add(node)
                ahead.append(node)


def _flatten(tree: object, depth: int) -> tuple[list, Callable[[list], Any]]:
    """Return (leaves, function from leaves to the tree): torch's pytrees, extended to attributes of objects."""
    nodes, spec = tree_flatten(tree)
    flat: list = []
    parts: list[tuple[int, Callable[[list], Any]]] = []
    for node in nodes:
        leaves: list = [node]
        fill: Callable[[list], Any] = _first
        state = _attributes(node)
        if state and depth < _DEPTH:
            inside, make = _flatten(state, depth + 1)
            if any(isinstance(leaf, Tensor) for leaf in inside):
                leaves, fill = inside, functools.partial(_refilled, node, make)
        flat += leaves
        parts.append((len(leaves), fill))

    def fill_all(values: list) -> Any:
        rest = iter(values)
        return tree_unflatten([fill([*itertools.islice(rest, n)]) for n, fill in parts], spec)

    return flat, fill_all


def _first(values: list) -> object:
    return values[0]


def _attributes(node: object) -> dict[str, object]:
    if isinstance(node, _CLOSED):
        return {}
    slots = [name for kind in type(node).__mro__ for name in _slots(kind) if hasattr(node, name)]
    return {**{name: getattr(node, name) for name in slots}, **getattr(node, "__dict__", {})}


def _slots(kind: type) -> Sequence[str]:
    slots = vars(kind).get("__slots__", ())
    return [n for n in ((slots,) if isinstance(slots, str) else slots) if n not in ("__dict__", "__weakref__")]


def _refilled(node: object, make: Callable[[list], dict[str, object]], values: list) -> object:
    """A shallow copy of `node` with its attributes rebuilt from `values`."""
    twin = copy.copy(node)
    for name, value in make(values).items():
        # object.__setattr__ also works on frozen dataclasses
        object.__setattr__(twin, name, value)
    return twin
