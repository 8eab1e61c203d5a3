"""Scores of drawn images against real ones: a classifier's certainty, nearest-neighbour precision and recall."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _demo

# neighbours of the balls that stand for a set of images, as in Kynkaanniemi et al. 2019, arXiv:1904.06991
NEIGHBOURS = 3
# images at a time for the recall, which grows with their number
AT_A_TIME = 500
# probability from which the classifier is sure
SURE = 0.9
# share of the expected number of sure samples from which a class is present
PRESENT = 0.2


@dataclass(frozen=True)
class Scores:
    """Scores of one set of images.

    `sure` is the fraction to which the classifier gives a class a probability of at least SURE, `classes` the number of
    classes among them; `precision` is the fraction of images inside a ball of the held-out ones, `recall` the fraction
    of held-out ones inside a ball of AT_A_TIME images; `nearest` is the median distance to the nearest training image.
    """

    sure: float
    classes: int
    precision: float
    recall: float
    nearest: float


def scores(images: Tensor, classifier: nn.Module, train: Tensor, held_out: Tensor) -> Scores:
    """Score images (N, D) with a classifier, against training images (M, D) and held-out ones (K, D)."""
    with torch.no_grad():
        probability, label = classifier(images).softmax(1).max(1)
    sure = probability >= SURE
    counts = torch.bincount(label[sure])
    outputs = classifier(images[:1]).shape[1]
    return Scores(
        sure=sure.double().mean().item(),
        classes=int((counts >= PRESENT * len(images) / outputs).sum()),
        precision=covered(images, held_out),
        recall=statistics.mean(covered(held_out, part) for part in images.split(AT_A_TIME)),
        nearest=torch.cdist(images, train).amin(1).median().item(),
    )


def covered(points: Tensor, images: Tensor) -> float:
    """Return the fraction of points inside the ball of an image, which reaches its NEIGHBOURS-th nearest image."""
    # the nearest of all is the image itself
    radius = torch.cdist(images, images).kthvalue(NEIGHBOURS + 1, 1).values
    return (torch.cdist(points, images) <= radius).any(1).double().mean().item()


def digit_classifier(images: Tensor, labels: Tensor, steps: int) -> nn.Module:
    """Train a small convolutional net on digits (N, 64) in [-1, 1]."""
    net = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3),
        nn.Linear(1024, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10),
    ).to(images.device)  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), fused=images.device.type in ("cpu", "cuda"))
    with _demo.bar(steps, "classifier") as bar:
        for _ in range(steps):
            which = torch.randint(len(images), (128,), device=images.device)
            noisy = images[which] + 0.1 * torch.randn(128, 64, device=images.device)
            loss = F.cross_entropy(net(noisy), labels[which])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update()
    return net.eval()
