"""The images the recipes train on, as integer pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor

NAMES = ("digits", "mnist", "cifar10")


class DataMissing(RuntimeError):
    """A data set that cannot be had here; the text says why and what to do."""


@dataclass(frozen=True)
class Images:
    """Flat integer images, (N, dim) uint8 with values below `levels`; `shape` is one image's (H, W) or (H, W, 3)."""

    train: Tensor
    validation: Tensor
    test: Tensor
    shape: tuple[int, ...]
    levels: int

    @property
    def dim(self) -> int:
        return self.train.shape[1]


def load(name: str, root: Path) -> Images:
    """One of NAMES. The split is the same every time; torchvision keeps its files under `root`."""
    if name == "digits":
        pixels = torch.from_numpy(load_digits().images).to(torch.uint8)
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
        test, validation, train = order.split([360, 180, len(order) - 540])
        return _images(pixels[train], pixels[validation], pixels[test], 17)
    pixels, test = _torchvision(name, root)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return _images(pixels[order[5000:]], pixels[order[:5000]], test, 256)


def _images(train: Tensor, validation: Tensor, test: Tensor, levels: int) -> Images:
    return Images(train.flatten(1), validation.flatten(1), test.flatten(1), tuple(train.shape[1:]), levels)


def _torchvision(name: str, root: Path) -> tuple[Tensor, Tensor]:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataMissing(
            f"--data {name} is read through torchvision, which does not import here ({error}); "
            "pip install torchvision, or use --data digits"
        ) from error
    source = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[name]
    try:
        parts = [source(str(root), train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise DataMissing(f"--data {name} could not be loaded or downloaded into {root}: {error}") from error
    train, test = (torch.as_tensor(part.data) for part in parts)
    return train, test
