"""Losses and metrics, added anywhere inside a model, gathered around its call."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import _checks as check
from ..reference import compute_dtype


class Collected:
    """What was added while a `collect()` block was the innermost one.

    Attributes:
        losses: name -> sum of the losses of that name, in the order of their first appearance.
        metrics: name -> mean of the metrics of that name, without gradient.

    Notes:
        Both are float32 (float64 where a value is), whatever the dtype of the values, and copies of them.
    """

    def __init__(self) -> None:
        self.losses: dict[str, Tensor] = {}
        self._metrics: dict[str, tuple[Tensor, int]] = {}
        self._unrecorded: set[str] = set()  # names of losses that were added while no graph was recorded
        self._backward = torch._C._current_graph_task_id()  # the one that the block was opened in, or -1

    @property
    def metrics(self) -> dict[str, Tensor]:
        return {name: total / count for name, (total, count) in self._metrics.items()}

    def total(self) -> Tensor:
        """The sum of all losses.

        Raises:
            RuntimeError: nothing was added.

        Notes:
            Warns of losses that were added where no graph is recorded, when others can train.
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
    """The block of this thread that receives."""
    return _blocks.open[-1] if _blocks.open else None


_outside_the_graph = torch.compiler.disable(reason="the list behind collect() lives outside the graph")


@contextlib.contextmanager
def collect() -> Iterator[Collected]:
    """Gather what `add_loss` and `add_metric` are given inside the block, in this thread.

    Notes:
        Blocks nest; the innermost one receives. Tensors on accelerators are not read, nothing waits.

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
    """Add a scalar to the losses of this name; outside a `collect()` block nothing happens.

    Args:
        value: a tensor of one element, in the graph that it will be minimised through, or a number.
        name: what it is called in bars and logs.

    Raises:
        TypeError: value is neither a real tensor nor a number; name is not a string.
        ValueError: value has more than one element; name is empty.

    Notes:
        A block that activation checkpointing recomputes during the backward does not add again. Use it with
        use_reentrant=False: the reentrant one runs the block without a graph, so a loss inside cannot train, and
        `total` warns of it. A `ReversibleSequential` that recomputes refuses losses of its layers.
        Under torch.compile the surrounding graph breaks here, because the block lives outside the graph.
    """
    scalar = _scalar("add_loss", value, name)
    if scalar is not None:
        block = _blocks.open[-1]
        block.losses[name] = block.losses[name] + scalar if name in block.losses else scalar
        if isinstance(value, Tensor) and not torch.is_grad_enabled():
            block._unrecorded.add(name)


@_outside_the_graph
def add_metric(value: Tensor | float, name: str) -> None:
    """Add a scalar to the metrics of this name, which are averaged; as `add_loss`, but without gradient."""
    scalar = _scalar("add_metric", value, name)
    if scalar is not None:
        metrics = _blocks.open[-1]._metrics
        total, count = metrics.get(name, (0, 0))
        metrics[name] = (total + scalar.detach(), count + 1)


def _scalar(op: str, value: object, name: object) -> Tensor | None:
    """The value as a 0-d tensor in the dtype of sums; None where it is not collected."""
    if not isinstance(name, str):
        raise TypeError(f"{op}: name must be a string, got {type(name).__name__}")
    if not name:
        raise ValueError(f"{op}: name must not be empty")
    if not isinstance(value, Tensor):
        # joins tensors of any device
        value = torch.tensor(check.number(op, "value", value), dtype=torch.float32, device="cpu")
    if value.is_complex():
        raise TypeError(f"{op}: value must be real, got {check.short(value.dtype)}")
    if value.numel() != 1:
        raise ValueError(f"{op}: value must be a scalar, got shape {tuple(value.shape)}")
    # in a backward that began inside the block: a part that is recomputed
    if not _blocks.open or torch._C._current_graph_task_id() != _blocks.open[-1]._backward:
        return None
    # a copy: what was added may be changed in place later
    return value.reshape(()).to(compute_dtype(value.dtype), copy=True)
