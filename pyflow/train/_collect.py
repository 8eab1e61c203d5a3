"""Losses and metrics that are added anywhere inside a model and collected around its call."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import _checks as check
from .._torch import backward_id, outside_graphs
from ..reference import compute_dtype


class Collected:
    """Losses and metrics added while a `collect()` block was the innermost one.

    Attributes:
        losses: name -> sum of the losses with that name, in the order in which names were first added.
        metrics: name -> mean of the metrics with that name, without gradient.

    Notes:
        Both are copies in float32, or in float64 if a value is float64.
    """

    def __init__(self) -> None:
        self.losses: dict[str, Tensor] = {}
        self._metrics: dict[str, tuple[Tensor, int]] = {}
        self._unrecorded: set[str] = set()  # names of losses added while no graph was recorded
        self._backward = backward_id()  # id of the backward that opened the block, or -1

    @property
    def metrics(self) -> dict[str, Tensor]:
        return {name: total / count for name, (total, count) in self._metrics.items()}

    def total(self) -> Tensor:
        """Return the sum of all losses.

        Raises:
            RuntimeError: no loss was added.

        Notes:
            Warns of losses added where no graph is recorded, if another loss has a graph.
        """
        if not self.losses:
            raise RuntimeError("collect: the model added no loss; call pyflow.train.add_loss inside its forward")
        first, *rest = self.losses.values()
        total = sum(rest, first)
        if self._unrecorded and total.requires_grad:
            warnings.warn(
                f"collect: {', '.join(map(repr, sorted(self._unrecorded)))} cannot train, being added where no graph "
                "is recorded, as under no_grad or in reentrant checkpointing",
                stacklevel=2,
            )
        return total


class _Blocks(threading.local):
    """The open blocks of a thread, innermost last."""

    def __init__(self) -> None:
        self.open: list[Collected] = []


_blocks = _Blocks()


def innermost() -> Collected | None:
    """Return the innermost open block of this thread."""
    return _blocks.open[-1] if _blocks.open else None


_outside_the_graph = outside_graphs("the list behind collect() lives outside the graph")


@contextlib.contextmanager
def collect() -> Iterator[Collected]:
    """Collect the values given to `add_loss` and `add_metric` inside the block, in this thread.

    Notes:
        Blocks nest; the innermost one collects. Tensors on accelerators are not read, so nothing synchronises.

    Example:
        >>> with collect() as c:
        ...     add_loss(torch.tensor(2.0), "fit")
        ...     add_loss(torch.tensor(1.0), "fit")
        ...     add_metric(0.5, "share")
        >>> c.losses, c.metrics, c.total()
        ({'fit': tensor(3.)}, {'share': tensor(0.5000)}, tensor(3.))
    """
    collected = Collected()
    _blocks.open.append(collected)
    try:
        yield collected
    finally:
        _blocks.open.remove(collected)


@_outside_the_graph
def add_loss(value: Tensor | float, name: str) -> None:
    """Add a scalar to the losses called `name`; does nothing outside a `collect()` block.

    Args:
        value: a number, or a tensor of one element with the graph to differentiate through.
        name: name in progress bars and logs.

    Raises:
        TypeError: value is neither a real tensor nor a number; name is not a string.
        ValueError: value has more than one element; name is empty.

    Notes:
        A loss is not added a second time when activation checkpointing recomputes its forward. Use checkpointing with
        use_reentrant=False: the reentrant version runs the forward without a graph, so a loss inside cannot train, and
        `total` warns of it. A `ReversibleSequential` that recomputes refuses losses of its layers.
        Under torch.compile the graph breaks here, because the block lives outside the graph.
    """
    scalar = _scalar("add_loss", value, name)
    if scalar is not None:
        block = _blocks.open[-1]
        block.losses[name] = block.losses[name] + scalar if name in block.losses else scalar
        if isinstance(value, Tensor) and not torch.is_grad_enabled():
            block._unrecorded.add(name)


@_outside_the_graph
def add_metric(value: Tensor | float, name: str) -> None:
    """Add a scalar to the metrics called `name`, which are averaged; like `add_loss`, but without gradient."""
    scalar = _scalar("add_metric", value, name)
    if scalar is not None:
        metrics = _blocks.open[-1]._metrics
        total, count = metrics.get(name, (0, 0))
        metrics[name] = (total + scalar.detach(), count + 1)


def _scalar(op: str, value: object, name: object) -> Tensor | None:
    """Return the value as a 0-d tensor in the dtype of sums, or None if it is not collected."""
    if not isinstance(name, str):
        raise TypeError(f"{op}: name must be a string, got {type(name).__name__}")
    if not name:
        raise ValueError(f"{op}: name must not be empty")
    if not isinstance(value, Tensor):
        # a 0-d CPU tensor combines with tensors of any device
        value = torch.tensor(check.number(op, "value", value), dtype=torch.float32, device="cpu")
    if value.is_complex():
        raise TypeError(f"{op}: value must be real, got {check.short(value.dtype)}")
    if value.numel() != 1:
        raise ValueError(f"{op}: value must be a scalar, got shape {tuple(value.shape)}")
    # inside a backward that began after the block was opened, this forward is a recomputation
    if not _blocks.open or backward_id() != _blocks.open[-1]._backward:
        return None
    # a copy, since the caller may change the value in place
    return value.reshape(()).to(compute_dtype(value.dtype), copy=True)
