"""The images that the demos train on, as integer pixels, and a Gaussian baseline for them."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from pyflow.flows import dequantize

from ..cli import Refused

NAMES = ("digits", "mnist", "cifar10")
# colour photographs that come with installed packages; of the stereo pair only the left image
SHIPPED = {
    "skimage": ("data", ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
TILE = 64
# the first FACES images of scikit-image's lfw_subset are faces, 25 x 25 pixels
FACES = 100
# images of a folder are resized to SIDE x SIDE
SIDE = 32
# a folder with more images is sampled evenly
MOST_PHOTOGRAPHS = 256
# photographs are reduced until their longer side has this many pixels
LONGEST_SIDE = 1024
# dequantised copies of every held-out image
DRAWS = 10


class DataMissing(Refused):
    """A data set is not available here; the text says why and what to do."""


@dataclass(frozen=True)
class Images:
    """Flattened images, (N, dim) uint8 with values below `levels`; `shape` is (H, W) or (H, W, 3) of one image."""

    train: Tensor
    validation: Tensor
    test: Tensor
    shape: tuple[int, ...]
    levels: int

    @property
    def dim(self) -> int:
        return self.train.shape[1]


def load(name: str, root: Path) -> Images:
    """Load one of NAMES with a fixed split; torchvision stores its downloads under `root`."""
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


def gallery(data: str, root: Path) -> Images:
    """Load one of NAMES, "faces", or the central squares of a folder's images; faces and folders hold out a fifth."""
    if data in NAMES:
        return load(data, root)
    pixels = _faces() if data == "faces" else torch.stack([_middle(file) for file in _images_in(Path(data))])
    if len(pixels) < 10:
        raise DataMissing(f"--data {data} must hold at least 10 images, got {len(pixels)}")
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    test, train = order.split([len(order) // 5, len(order) - len(order) // 5])
    return _images(pixels[train], pixels[:0], pixels[test], 256)


def _faces() -> Tensor:
    """(FACES, 25, 25) uint8."""
    folder = _package_folder("skimage")
    file = folder and folder / "data/lfw_subset.npy"
    if not file or not file.is_file():
        raise DataMissing("the faces of scikit-image are not here; pip install scikit-image, or use --data digits")
    return torch.from_numpy(np.load(file)[:FACES] * 255).round().to(torch.uint8)


def _middle(file: Path) -> Tensor:
    """Return the largest central square of an image, resized to (SIDE, SIDE, 3) uint8."""
    image = _opened(file)
    edge = min(image.size)
    left, top = ((length - edge) // 2 for length in image.size)
    square = image.resize((SIDE, SIDE), Image.Resampling.BOX, (left, top, left + edge, top + edge))
    return torch.from_numpy(np.array(square))


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


@dataclass(frozen=True)
class Photographs:
    """Non-overlapping tiles of photographs, (N, 3, TILE, TILE) uint8."""

    train: Tensor
    test: Tensor
    names: tuple[str, ...]


def photographs(folder: Path | None = None) -> Photographs:
    """Load the photographs of a folder, by default of scikit-image and scikit-learn, with a fixed split."""
    files = _shipped() if folder is None else _images_in(folder)
    parts: dict[int, tuple[str, Tensor]] = {}
    for file in files:
        pixels = _pixels(file)
        # skip duplicates: a copy could land on the other side of the split
        parts.setdefault(hash(pixels.numpy().tobytes()), (file.name, _tiles(pixels)))
    tiles = torch.cat([tiles for _, tiles in parts.values()])
    if len(tiles) < 10:
        raise DataMissing(
            f"--data {folder} must hold photographs for at least 10 tiles of {TILE} x {TILE} pixels, got {len(tiles)}"
        )
    order = torch.randperm(len(tiles), generator=torch.Generator().manual_seed(0))
    test, train = order.split([len(order) // 5, len(order) - len(order) // 5])
    names = tuple(name for name, tiles in parts.values() if len(tiles))
    return Photographs(tiles[train], tiles[test.sort().values], names)


def _shipped() -> list[Path]:
    files = []
    for package, (folder, names) in SHIPPED.items():
        root = _package_folder(package)
        if root is not None:
            files += [root / folder / name for name in names]
    files = [file for file in files if file.is_file()]
    if not files:
        raise DataMissing(
            "the photographs of scikit-image are not here; pip install scikit-image, or use --data FOLDER"
        )
    return files


def _package_folder(package: str) -> Path | None:
    """Return the folder of an installed package without importing it, so that nothing is downloaded."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _images_in(folder: Path) -> Sequence[Path]:
    if not folder.is_dir():
        raise DataMissing(f"--data {folder} is not a folder")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise DataMissing(f"--data {folder} holds no images ({', '.join(SUFFIXES)})")
    return files[:: -(-len(files) // MOST_PHOTOGRAPHS)]


def _opened(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except OSError as error:
        raise DataMissing(f"{file} cannot be read as an image: {error}") from error


def _pixels(file: Path) -> Tensor:
    """(3, H, W) uint8."""
    image = _opened(file)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return torch.from_numpy(np.array(image)).movedim(-1, 0)


def _tiles(pixels: Tensor) -> Tensor:
    """Cut (3, H, W) into (N, 3, TILE, TILE), row by row; the remainder at the right and the bottom is dropped."""
    return pixels.unfold(1, TILE, TILE).unfold(2, TILE, TILE).movedim(0, 2).flatten(0, 1).contiguous()


def noisy(images: Tensor, levels: int, device: torch.device, seed: int) -> Tensor:
    """Return DRAWS dequantisations of every image, (DRAWS N, dim), the same in every run."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([dequantize(images, levels, generator) for _ in range(DRAWS)]).to(device)


@dataclass(frozen=True)
class Gaussian:
    """Full-covariance Gaussian of the dequantised training images, with shrinkage chosen on the validation images."""

    mean: Tensor
    factor: Tensor

    @classmethod
    def fit(cls, train: Tensor, validation: Tensor, levels: int) -> Gaussian:
        x = train.double() / levels
        # add the exact mean and variance of the dequantisation noise
        mean, covariance = x.mean(0) + 0.5 / levels, torch.cov(x.mT)
        covariance.diagonal().add_(1 / (12 * levels**2))
        diagonal = covariance.diagonal()
        targets = (torch.diag(diagonal), torch.eye(len(diagonal), dtype=torch.float64) * diagonal.mean())
        candidates = [
            cls(mean, torch.linalg.cholesky((1 - a) * covariance + a * target))
            for target in targets
            for a in (1e-4, 1e-3, 3e-3, 0.01, 0.02, 0.05, 0.1, 0.2)
        ]
        return max(candidates, key=lambda candidate: candidate.log_prob(validation).mean().item())

    def log_prob(self, x: Tensor) -> Tensor:
        z = torch.linalg.solve_triangular(self.factor, (x.double().cpu() - self.mean).mT, upper=False)
        volume = self.factor.diagonal().log().sum() + 0.5 * len(self.mean) * math.log(2 * math.pi)
        return -0.5 * z.square().sum(0) - volume
