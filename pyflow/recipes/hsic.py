"""Test features for dependence, train a classifier by the HSIC bottleneck, and compare its layers by CKA."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")

import itertools

from matplotlib import pyplot as plt
from sklearn.datasets import load_diabetes, load_digits, load_wine
from torch import Tensor, nn

from pyflow.nn import HSICBottleneck
from pyflow.stats import HSICTest, RepresentationComparison, compare_representations, hsic_test

from . import _demo
from ._demo import synchronize, threads

# level of the tests
LEVEL = 0.05
NETWORKS = ("HSIC bottleneck", "backpropagation", "head on untrained layers")


@dataclass(frozen=True)
class Settings:
    """The tests and the networks, which differ only in their training."""

    permutations: int = 2000
    width: int = 128
    depth: int = 4
    epochs: int = 30
    batch: int = 128
    rate: float = 1e-3
    beta: float = 100.0
    sigma: float = 5.0
    # CPU threads: layers and minibatches are small
    threads: int | None = 1


@dataclass(frozen=True)
class Feature:
    """Test of one feature: normalised HSIC with the target; `usual` is the 95 % quantile over permutations."""

    name: str
    hsic: float
    usual: float
    pvalue: float


@dataclass(frozen=True)
class Relevance:
    """The features of one data set by decreasing HSIC, and the p-values of their shuffled copies."""

    features: list[Feature]
    shuffled: list[float]


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 8 x 8 digits, pixels in [0, 1], and their labels."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--epochs", type=_demo.positive, help=f"training epochs of each network (default {Settings.epochs})"
    )
    parser.add_argument(
        "--permutations", type=_demo.positive, help=f"permutations of each test (default {Settings.permutations})"
    )
    _demo.add_arguments(
        parser, out="outputs/hsic.png", seed="permutations, weights and batches", quick="fewer permutations and epochs"
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status."""
    device = _demo.chosen_device(args)
    settings = Settings(permutations=200, epochs=6) if args.quick else Settings()
    given = {name: getattr(args, name) for name in ("epochs", "permutations") if getattr(args, name)}
    settings = replace(settings, **given)

    def work() -> dict[str, object]:
        with threads(settings.threads):
            return demo(settings, args, device)

    return _demo.run("hsic", args, work)


def demo(settings: Settings, args: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """Test, train, compare, draw; returns the metrics."""
    began = time.perf_counter()
    wine, diabetes = load_wine(), load_diabetes()
    names = {"s1": "s1 cholesterol", "s2": "s2 LDL", "s3": "s3 HDL", "s4": "s4 chol./HDL", "s5": "s5 triglycerides",
             "s6": "s6 glucose"}  # fmt: skip
    tests = {
        f"wine: {len(wine.data)} wines, the target is one of 3 cultivars": relevance(
            wine.data, wine.target, wine.feature_names, "delta", settings, args.seed, device
        ),
        f"diabetes: {len(diabetes.data)} patients, the target is disease progression after a year": relevance(
            diabetes.data, diabetes.target, [names.get(name, name) for name in diabetes.feature_names], "rbf", settings,
            args.seed, device,
        ),
    }  # fmt: skip
    for title, tested in tests.items():
        print(f"\n{title}; {settings.permutations:,} permutations each\n{feature_table(tested)}")

    digits = load(device)
    print(
        f"\ndigits: {len(digits.x):,} for training, {len(digits.test_x)} held out; "
        f"{settings.depth} layers of width {settings.width}, {settings.epochs} epochs"
    )
    models: dict[str, HSICBottleneck] = {}
    curves: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for name in NETWORKS:
        models[name] = build(settings, args.seed).to(device)
        curves[name], seconds[name] = train(models[name], name, digits, settings, args.seed)
    print(f"\n{'held-out accuracy':<28}{'':>8}{'s/epoch':>10}")
    for name, curve in curves.items():
        print(f"{name:<28}{curve[-1]:>8.1%}{seconds[name]:>10.3f}")
    print(
        "only backpropagation passes gradients between layers; in all three a linear head is trained on the last layer"
    )

    comparison = compare(models["HSIC bottleneck"], models["backpropagation"], digits.test_x)
    alike = comparison.cka.diagonal().tolist()
    pairs = ", ".join(f"{name} {value:.2f}" for name, value in zip(comparison.layers1, alike, strict=True))
    print(f"\nCKA between the same layers of HSIC bottleneck and backpropagation, held-out digits: {pairs}")
    picture(tests, curves, comparison, settings, args.out)
    return {
        "seed": args.seed, "device": str(device), "backend": args.backend, "settings": asdict(settings),
        "tests": {title.partition(":")[0]: asdict(tested) for title, tested in tests.items()},
        "accuracy": curves, "epoch_seconds": seconds, "cka": comparison.cka.tolist(),
        "total_seconds": time.perf_counter() - began,
    }  # fmt: skip


def relevance(
    x: np.ndarray, y: np.ndarray, names: Sequence[str], kernel_y: str, settings: Settings, seed: int,
    device: torch.device,
) -> Relevance:  # fmt: skip
    """Test every feature against the target, and a shuffled copy of it, which is independent of the target."""
    target = torch.from_numpy(y).to(device)
    rng = np.random.default_rng(seed)

    def test(column: np.ndarray, seed: int) -> HSICTest:
        return hsic_test(
            torch.from_numpy(column).to(device), target, kernel_y=kernel_y, permutations=settings.permutations,
            seed=seed, normalize=True, progress=False,
        )  # fmt: skip

    features, shuffled = [], []
    for number, name in enumerate(_demo.tracked(names, "testing", "feature")):
        column = x[:, number]
        result = test(column, seed)
        usual = float(np.quantile(result.null, 1 - LEVEL))
        features.append(Feature(name.replace("_", " "), result.statistic, usual, result.pvalue))
        shuffled.append(test(rng.permutation(column), seed).pvalue)
    return Relevance(sorted(features, key=lambda feature: -feature.hsic), shuffled)


def feature_table(tested: Relevance) -> str:
    lines = [f"{'feature':<32}{'HSIC':>8}{'95 % of null':>14}{'p':>9}"]
    lines += [
        f"{f.name:<32}{f.hsic:>8.3f}{f.usual:>14.3f}{f.pvalue:>9.4f}  "
        + ("depends" if f.pvalue <= LEVEL else "no dependence found")
        for f in tested.features
    ]
    found = sum(p <= LEVEL for p in tested.shuffled)
    lines.append(
        f"the same features shuffled: p <= {LEVEL} for {found} of {len(tested.shuffled)} ({LEVEL:.0%} expected)"
    )
    return "\n".join(lines)


def load(device: torch.device) -> Digits:
    """Load the digits with a fixed split."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    test, rest = order.split([360, len(order) - 360])
    x = (torch.from_numpy(data.data).float() / 16).to(device)
    y = torch.from_numpy(data.target).long().to(device)
    return Digits(x[rest], y[rest], x[test], y[test])


def build(settings: Settings, seed: int) -> HSICBottleneck:
    """Return the network; its initial weights depend only on the seed."""
    torch.manual_seed(seed)
    widths = [64, *[settings.width] * settings.depth]
    layers = [nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
    adam = partial(torch.optim.Adam, lr=settings.rate)
    return HSICBottleneck(
        layers, nn.Linear(settings.width, 10), beta=settings.beta, sigma=settings.sigma, optimizer=adam
    )


def stepper(model: HSICBottleneck, name: str, settings: Settings) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function (x, y) -> loss of the head that takes one step of the named training."""
    if name == "HSIC bottleneck":
        return lambda x, y: model.update(x, y)[-1]
    assert model.head is not None
    trained = model if name == "backpropagation" else model.head
    optimizer = torch.optim.Adam(trained.parameters(), lr=settings.rate)

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def train(model: HSICBottleneck, name: str, digits: Digits, settings: Settings, seed: int) -> tuple[list[float], float]:
    """Return (held-out accuracy after every epoch, seconds per epoch)."""
    step = stepper(model, name, settings)
    generator = torch.Generator().manual_seed(seed)
    curve, seconds, steps = [], 0.0, len(digits.x) // settings.batch
    with _demo.bar(settings.epochs * steps, name) as bar:
        for _ in range(settings.epochs):
            began = time.perf_counter()
            model.train()
            order = torch.randperm(len(digits.x), generator=generator)
            for rows in order[: steps * settings.batch].split(settings.batch):
                loss = step(digits.x[rows], digits.y[rows])
                bar.update()
            synchronize(digits.x.device)
            seconds += time.perf_counter() - began
            curve.append(accuracy(model, digits.test_x, digits.test_y))
            bar.set_postfix_str(f"loss {loss.item():.3f}, held-out accuracy {curve[-1]:.1%}")
    return curve, seconds / settings.epochs


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    return (model(x).argmax(1) == y).float().mean().item()


def compare(first: HSICBottleneck, second: HSICBottleneck, x: Tensor) -> RepresentationComparison:
    names = [*(f"layers.{i}" for i in range(len(first.layers))), "head"]
    result = compare_representations(first, second, x.split(120), layers1=names, layers2=names)
    shown = (*(f"layer {i + 1}" for i in range(len(first.layers))), "head")
    return replace(result, layers1=shown, layers2=shown)


def picture(
    tests: dict[str, Relevance],
    curves: dict[str, list[float]],
    comparison: RepresentationComparison,
    settings: Settings,
    out: Path,
) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(13, 9.5), layout="constrained", facecolor="white")
    for panel, (title, tested) in zip(axes[0], tests.items(), strict=True):
        features = tested.features
        rows = range(len(features))
        colours = ["#c2552d" if f.pvalue <= LEVEL else "0.75" for f in features]
        panel.barh(rows, [f.hsic for f in features], color=colours)
        panel.plot([f.usual for f in features], rows, "k|", markersize=11, label=f"{1 - LEVEL:.0%} of permutations")
        panel.set_yticks(rows, [f.name for f in features], fontsize=8)
        panel.invert_yaxis()
        edge = max(max(f.hsic, f.usual) for f in features)
        for row, f in zip(rows, features, strict=True):
            panel.text(max(f.hsic, f.usual) + 0.015 * edge, row, f"p = {f.pvalue:.2g}", va="center", fontsize=8)
        panel.set_xlim(0, 1.2 * edge)
        panel.set_xlabel("normalised HSIC with the target")
        panel.set_title(title, fontsize=10)
        panel.legend(loc="lower right", frameon=False, fontsize=8)
    for name, curve in curves.items():
        axes[1, 0].plot(range(1, len(curve) + 1), curve, label=f"{name}: {curve[-1]:.1%}")
    axes[1, 0].set_xlabel("epoch")
    axes[1, 0].set_ylabel("held-out accuracy")
    axes[1, 0].set_title(f"digits, {settings.depth} layers of width {settings.width}", fontsize=10)
    axes[1, 0].grid(alpha=0.3)
    axes[1, 0].legend(loc="lower right", frameon=False)
    comparison.heatmap(axes[1, 1], names=("HSIC bottleneck", "backpropagation"))
    axes[1, 1].set_title("similarity of the layers (linear CKA, held out)", fontsize=10)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    plt.close(figure)
