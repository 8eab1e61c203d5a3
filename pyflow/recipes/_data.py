"""The images the recipes train on, as integer pixels."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from ._demo import Refused

NAMES = ("digits", "mnist", "cifar10")
# colour photographs that lie in the installed packages, no download; of the stereo pair only the left one
SHIPPED = {
    "skimage": ("data", ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
TILE = 64
# the first of scikit-image's file are faces, 25 x 25 pixels; a folder's images are brought to SIDE x SIDE
FACES, SIDE = 100, 32
# of a folder, evenly picked; a photograph's longer side is reduced to so many pixels
MOST_PHOTOGRAPHS, LONGEST_SIDE = 256, 1024


class DataMissing(Refused):
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


def gallery(data: str, root: Path) -> Images:
    """One of NAMES, "faces", or the images of a folder, the middle of each; of the last two a fifth is held out."""
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
    spec = importlib.util.find_spec("skimage")
    file = spec and Path(spec.origin).parent / "data/lfw_subset.npy"
    if not file or not file.is_file():
        raise DataMissing("the faces of scikit-image are not here; pip install scikit-image, or use --data digits")
    return torch.from_numpy(np.load(file)[:FACES] * 255).round().to(torch.uint8)


def _middle(file: Path) -> Tensor:
    """(SIDE, SIDE, 3) uint8: the largest square in the middle of an image, reduced or enlarged."""
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
    """Tiles cut from photographs side by side, (N, 3, TILE, TILE) uint8: no pixel is in two of them."""

    train: Tensor
    test: Tensor
    names: tuple[str, ...]


def photographs(folder: Path | None = None) -> Photographs:
    """The photographs of a folder, or those of scikit-image and scikit-learn; the same split every time."""
    files = _shipped() if folder is None else _images_in(folder)
    parts = {}
    for file in files:
        pixels = _pixels(file)
        # a second copy of a photograph could fall on the other side of the split
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
        # found, not imported: what is missing is seen before anything tries to download it
        spec = importlib.util.find_spec(package)
        if spec is not None:
            files += [Path(spec.origin).parent / folder / name for name in names]
    files = [file for file in files if file.is_file()]
    if not files:
        raise DataMissing(
            "the photographs of scikit-image are not here; pip install scikit-image, or use --data FOLDER"
        )
    return files


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
    """(N, 3, TILE, TILE), in rows from the top left; a remainder at the right and the bottom is left out."""
    return pixels.unfold(1, TILE, TILE).unfold(2, TILE, TILE).movedim(0, 2).flatten(0, 1).contiguous()
