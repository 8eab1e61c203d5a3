"""Arguments that a stack of layers hands on: the tensors inside, and the same arguments with others in their place."""

from __future__ import annotations

import copy
import enum
import itertools
import numbers
import types
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

# objects inside objects are opened so far down
_DEPTH = 4
# what can hold no tensor
_PLAIN = (
    numbers.Number, str, bytes, type(None), enum.Enum, np.ndarray, np.generic, torch.dtype, torch.device, torch.Size,
    torch.Generator, type,
)  # fmt: skip
# whose attributes are not for us to copy
_CLOSED = (Tensor, nn.Module, types.FunctionType, types.MethodType, types.ModuleType, *_PLAIN)


class Context:
    """The tensors in arguments: as they are, in containers, and in the attributes of objects."""

    def __init__(self, context: tuple, named: dict) -> None:
        self.context, self.named = context, named
        leaves, self._fill = _flatten((context, named), 0)
        self._where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.tensors = [leaves[i] for i in self._where]
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._closed = sorted({type(v).__name__ for v in self._leaves if not isinstance(v, _PLAIN)})

    def forget(self) -> None:
        """Let go of the arguments and their tensors, which autograd holds."""
        del self.context, self.named, self.tensors

    def filled(self, tensors: Sequence[Tensor]) -> tuple[tuple, dict]:
        """The arguments with these in the places of `tensors`."""
        leaves = [*self._leaves]
        for i, tensor in zip(self._where, tensors, strict=False):
            leaves[i] = tensor
        return self._fill(leaves)

    def check(self, outputs: Iterable[Tensor], known: Iterable[Tensor]) -> None:
        """No object in the arguments holds another tensor that needs a gradient, as far as `outputs` depend on it."""
        if not self._closed:
            return
        known = {id(t) for t in known}
        ahead = [o.grad_fn for o in outputs if o.grad_fn is not None]
        seen = {*ahead}
        while ahead:
            for node, _ in ahead.pop().next_functions:
                if node is None or node in seen:
                    continue
                if hasattr(node, "variable") and id(node.variable) not in known:
                    raise RuntimeError(
                        f"ReversibleSequential: context must show its tensors, got {', '.join(self._closed)} with one "
                        "inside that needs a gradient; pass that tensor, or detach it"
                    )
                seen.add(node)
                ahead.append(node)


def _flatten(tree: object, depth: int) -> tuple[list, Callable[[list], object]]:
    """(leaves, what makes the tree of leaves): as torch's pytrees, and into objects that have tensors inside."""
    nodes, spec = tree_flatten(tree)
    flat, parts = [], []
    for node in nodes:
        leaves, fill = [node], _first
        state = _attributes(node)
        if state and depth < _DEPTH:
            inside, make = _flatten(state, depth + 1)
            if any(isinstance(leaf, Tensor) for leaf in inside):
                leaves, fill = inside, lambda values, node=node, make=make: _copied(node, make(values))
        flat += leaves
        parts.append((len(leaves), fill))

    def fill_all(values: list) -> object:
        values = iter(values)
        return tree_unflatten([fill([*itertools.islice(values, n)]) for n, fill in parts], spec)

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


def _copied(node: object, attributes: dict[str, object]) -> object:
    twin = copy.copy(node)
    for name, value in attributes.items():
        # frozen dataclasses too
        object.__setattr__(twin, name, value)
    return twin
