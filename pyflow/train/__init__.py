"""Loss-only training: a model adds losses and metrics in its forward, and the training loop collects them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._collect import Collected, add_loss, add_metric, collect

if TYPE_CHECKING:
    # at run time it is imported on first use, because lightning is optional
    from ._lightning import LossOnlyModule

__all__ = ["Collected", "LossOnlyModule", "add_loss", "add_metric", "collect"]


def __getattr__(name: str) -> object:
    if name != "LossOnlyModule":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from ._lightning import LossOnlyModule
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lightning":
            raise
        raise ImportError(
            "pyflow.train.LossOnlyModule needs the package lightning: pip install 'pyflow-kernels[train]'"
        ) from error
    return LossOnlyModule
