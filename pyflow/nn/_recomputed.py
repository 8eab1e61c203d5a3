"""Which forward of a root is recomputed in a backward, wherever the loss came from.

Activation checkpointing (use_reentrant=False) repeats a block of a forward, or a region around whole forwards. It keeps
a frame from forward to recomputation, which tells the forward. Where another frame is on top, as in nested checkpoints,
the autograd node that needs the recomputed tensors tells it: nodes are numbered in the order of their making.
"""

from __future__ import annotations

import collections
import itertools
import sys
import threading
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from .. import _checks as check
from .._torch import backward_id, checkpoint_frame, current_node, next_node_number

# a weight and its u and v
Normalised = tuple[Tensor, Tensor | None, Tensor | None]

# the key of a forward in the metadata of nodes
_KEY = "pyflow.nn.apply_spectral_norm"

_GONE = "apply_spectral_norm: the weights of the recomputed forward are gone, call checkpoint with use_reentrant=False"


class Connected:
    """The normalised weights of a forward, with their graph."""

    def __init__(self, weights: list[Normalised]) -> None:
        self.weights = weights


class Forward:
    """What the recomputation of one forward of a root needs; its nodes keep it alive.

    Neither a node nor a module may be reached from here: nodes refer to it, where no garbage collector sees cycles.
    """

    def __init__(self, first: int, weights: list[Normalised]) -> None:
        self.first, self.end = first, sys.maxsize  # the numbers of its nodes
        self._weights = [
            (w.detach().requires_grad_(w.requires_grad), _detached(u), _detached(v)) for w, u, v in weights
        ]
        self._connected: weakref.ref[Connected] | None = None

    def made(self, number: int) -> bool:
        return self.first <= number < self.end

    def vectors(self, place: int) -> tuple[Tensor | None, Tensor | None]:
        return self._weights[place][1:]

    def weight(self, place: int) -> Tensor:
        """The weight for a recomputation, with its graph if that is at hand: only reentrant checkpoints need it."""
        connected = None if self._connected is None else self._connected()
        if connected is not None:
            return connected.weights[place][0]
        weight = self._weights[place][0]
        if weight.requires_grad and _reentrant(current_node()):
            raise RuntimeError(_GONE)
        return weight

    def connect(self, connected: Connected) -> None:
        self._connected = weakref.ref(connected)

    def leads_to(self, node: Node) -> bool:
        """Whether `node` came from weights of this forward."""
        ahead, seen = [node], {node}
        while ahead:
            node = ahead.pop()
            if self in _notes(node):
                return True
            for before, _ in node.next_functions:
                if before is not None and before not in seen and before._sequence_nr() >= self.first:
                    seen.add(before)
                    ahead.append(before)
        return False


class _Region:
    """The forwards inside one checkpoint, in their order, and how many of them a backward has repeated."""

    def __init__(self) -> None:
        self.forwards: list[Forward] = []
        self._backward, self._repeated = -1, 0

    def repeated(self) -> Forward | None:
        """Return the forward that is repeated now."""
        if self._backward != backward_id():
            self._backward, self._repeated = backward_id(), 0
        self._repeated += 1
        return self.forwards[self._repeated - 1] if self._repeated <= len(self.forwards) else None


class Forwards:
    """The forwards of one root whose graphs are alive."""

    def __init__(self) -> None:
        self._alive: weakref.WeakValueDictionary[int, Forward] = weakref.WeakValueDictionary()
        self._numbers = itertools.count()
        self._running: dict[int, Forward] = {}  # by thread
        self._blocks: weakref.WeakKeyDictionary[object, Forward] = weakref.WeakKeyDictionary()
        self._regions: weakref.WeakKeyDictionary[object, _Region] = weakref.WeakKeyDictionary()
        self._last: tuple[Forward, Connected] | None = None
        # the numbers of nodes of forwards that may be gone
        self._spans: collections.deque[range] = collections.deque(maxlen=1000)

    def __reduce__(self) -> tuple[type[Forwards], tuple[()]]:
        # a copy has had no forwards
        return Forwards, ()

    def begin(self, first: int, weights: list[Normalised]) -> None:
        """Note a forward with gradients, whose nodes are numbered from `first`."""
        forward = self._alive[next(self._numbers)] = Forward(first, weights)
        self._running[threading.get_ident()] = forward
        for node in _nodes(weight for weight, _, _ in weights):
            _notes(node).append(forward)
        frame = checkpoint_frame()
        if frame is not None:
            self._regions.setdefault(frame, _Region()).forwards.append(forward)

    def enter(self) -> None:
        """Note the block in which a layer of the running forward is called."""
        forward = self._running.get(threading.get_ident())
        frame = None if forward is None or check.in_backward() else checkpoint_frame()
        if forward is not None and frame is not None and frame not in self._regions:
            self._blocks[frame] = forward

    def finish(self, weights: list[Normalised], outputs: list[Tensor]) -> None:
        """Note the end of this thread's forward; its outputs and, until the next one, we keep the graph of weights."""
        forward = self._running.pop(threading.get_ident(), None)
        if forward is None:
            return
        forward.end = next_node_number()
        self._spans.append(range(forward.first, forward.end))
        connected = Connected(weights)
        forward.connect(connected)
        self._last = forward, connected
        # a node of a weight would keep itself alive
        for node in _nodes(outputs) - _nodes(weight for weight, _, _ in weights):
            _notes(node).extend(self._last)

    def of_block(self) -> Forward | None:
        """Return the forward of which a layer is recomputed, or None if the layer was called without the root.

        Raises if only a reentrant checkpoint is left of it: that keeps no node of the weights.
        """
        frame, node = checkpoint_frame(), current_node()
        block = None if frame is None else self._blocks.get(frame)
        if block is not None or node is None:
            return block
        number = node._sequence_nr()
        made = [forward for forward in self._all() if forward.made(number)]
        if len(made) > 1:
            # every thread counts its nodes from 0
            made = [forward for forward in made if forward.leads_to(node)]
        if not made and any(number in span for span in [*self._spans]):
            raise RuntimeError(_GONE)
        return made[0] if made else None

    def of_root(self) -> Forward | None:
        """Return the forward of the whole root that is recomputed, or None if it is not known."""
        frame, node = checkpoint_frame(), current_node()
        region = None if frame is None else self._regions.get(frame)
        repeated = None if region is None else region.repeated()
        if repeated is not None or node is None or _reentrant(node):
            return repeated
        # the node may be made after the root's forward, by what follows it in the region
        begun = [forward for forward in self._all() if forward.first <= node._sequence_nr()]
        return max(begun, key=lambda forward: forward.first, default=None)

    def _all(self) -> list[Forward]:
        # a list at once: other threads may begin forwards
        return [forward for ref in self._alive.valuerefs() if (forward := ref()) is not None]


def _detached(vector: Tensor | None) -> Tensor | None:
    return vector.detach() if vector is not None and vector.requires_grad else vector


def _nodes(tensors: Iterable[Tensor]) -> set[Node]:
    return {tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None}


def _notes(node: Any) -> list[object]:
    """What lives as long as the node."""
    return node.metadata.setdefault(_KEY, [])


def _reentrant(node: Node | None) -> bool:
    return type(node).__name__ == "CheckpointFunctionBackward"
