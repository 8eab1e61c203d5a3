"""Lightning module for models that add their own losses."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import lightning
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import _checks as check
from ._collect import Collected, collect

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler


class LossOnlyModule(lightning.LightningModule):
    """Train a model on the losses that it adds in its forward; its output is ignored.

    The bar shows every named loss and metric as its running mean over the epoch, and `loss`, the sum of the losses.
    Loggers receive the means of the epoch as train/NAME, val/NAME and test/NAME. Means are over samples: the size of a
    batch is the number of rows of the first tensor in it, at any depth, that has at least one dim.

    Args:
        model: calls `pyflow.train.add_loss` in its forward. It gets a tuple or list as positional arguments, a dict or
            UserDict (as from Hugging Face) as keywords, and any other batch, also a PackedSequence, as its only
            argument.
        optimizer: function of a list of parameters that returns an optimizer, or any other value that Lightning's
            configure_optimizers may return.

    Raises:
        TypeError: model is not a module, or optimizer is not callable.
        RuntimeError: at the first training step, if the model adds no loss. Validation and test need no loss.
        ValueError: at a step, if a loss and a metric share a name, or if a metric, or one of several losses, is called
            "loss".

    Example:
        >>> from functools import partial
        >>> import torch
        >>> module = LossOnlyModule(nn.Linear(2, 1), partial(torch.optim.Adam, lr=1e-3))
        >>> type(module.configure_optimizers()).__name__
        'Adam'
    """

    def __init__(self, model: nn.Module, optimizer: Callable[[list[nn.Parameter]], OptimizerLRScheduler]) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"LossOnlyModule: model must be a module, got {type(model).__name__}")
        check.function("LossOnlyModule", "optimizer", optimizer)
        self.model = model
        self._optimizer_of = optimizer
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def forward(self, batch: object) -> object:
        # a PackedSequence is a tuple by type, but one argument
        if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
            return self.model(*batch)
        return self.model(**batch) if isinstance(batch, (dict, UserDict)) else self.model(batch)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return self._optimizer_of([p for p in self.model.parameters() if p.requires_grad])

    def on_train_epoch_start(self) -> None:
        self._sums, self._counts = {}, {}

    def training_step(self, batch: object, batch_idx: int) -> Tensor:
        with collect() as collected:
            self(batch)
        loss, size = collected.total(), _batch_size(batch)
        for name, value in _named(collected, loss).items():
            self._sums[name] = self._sums.get(name, 0) + value * size
            self._counts[name] = self._counts.get(name, 0) + size
            mean = self._sums[name] / self._counts[name]
            self.log(name, mean, prog_bar=True, logger=False, on_step=True, on_epoch=False)
            self.log(f"train/{name}", value, on_step=False, on_epoch=True, sync_dist=True, batch_size=size)
        return loss

    # with several loaders Lightning appends /dataloader_idx_N to the names
    def validation_step(self, batch: object, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: object, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: object) -> None:
        with collect() as collected:
            self(batch)
        size = _batch_size(batch)
        total = collected.total() if collected.losses else None
        for name, value in _named(collected, total).items():
            self.log(f"{stage}/{name}", value, prog_bar=True, sync_dist=True, batch_size=size)


def _named(collected: Collected, total: Tensor | None) -> dict[str, Tensor]:
    losses, metrics = collected.losses, collected.metrics
    for name in metrics:
        if name in losses:
            raise ValueError(f"LossOnlyModule: a loss and a metric must have different names, got two of {name!r}")
    if "loss" in metrics or ("loss" in losses and len(losses) > 1):
        raise ValueError("LossOnlyModule: only the sum of the losses must be called 'loss', got another value")
    values = {**losses, **metrics} if total is None else {**losses, **metrics, "loss": total}
    return {name: value.detach() for name, value in values.items()}


def _batch_size(batch: object) -> int:
    """Return the number of rows of the first tensor with a dim, or 1 if there is none."""
    return next(_sizes(batch), 1)


def _sizes(batch: object) -> Iterator[int]:
    if isinstance(batch, PackedSequence):
        # data has one row per element of every sequence; the first batch size is the number of sequences
        yield int(batch.batch_sizes[0]) if len(batch.batch_sizes) else 0
    elif isinstance(batch, Tensor):
        if batch.dim():
            yield batch.size(0)
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _sizes(value)
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from _sizes(value)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from _sizes(getattr(batch, field.name))
