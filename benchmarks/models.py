"""Measure models of other packages as they are and after pyflow.accelerate: python -m pyflow.benchmarks.models

Both take turns in one run; times are medians of the rounds. Speed-ups that are aimed at stand in parentheses. A part of
a model is measured alone, forward and backward.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import pyflow

from . import machine, peer_flows
from .registry import Missing, peer
from .report import duration

HEAD = ("model", "what", "as it is", "accelerated", "faster")
Times = dict[str, float]  # seconds of each thing that a model does
Subject = Callable[[bool], Callable[[], Times]]  # whether it is accelerated -> what is measured

SIMULATIONS, EPOCHS, BATCH, DRAWS = 2000, 6, 200, 10_000


class Model(NamedTuple):
    """A model that is measured.

    Attributes:
        name: in the table.
        make: makes it, accelerated or not; what it returns is called in every round.
        aims: the speed-ups aimed at, for each thing it does.
    """

    name: str
    make: Subject
    aims: dict[str, float]


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def posterior(estimator: str, fast: bool) -> Callable[[], Times]:
    """Two moons, as sbi's own benchmark has them: training, samples and log-densities of a posterior."""
    inference, utils = peer("sbi", "sbi.inference"), peer("sbi", "sbi.utils")
    prior = utils.BoxUniform(-torch.ones(2), torch.ones(2))
    torch.manual_seed(0)
    theta = prior.sample((SIMULATIONS,))
    angle, radius = torch.pi * (torch.rand(SIMULATIONS) - 0.5), 0.01 * torch.randn(SIMULATIONS) + 0.1
    moon = torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], 1)
    x = moon + torch.stack([-theta.sum(1).abs(), theta[:, 1] - theta[:, 0]], 1) / 2**0.5
    seen = torch.zeros(1, 2)

    def measure() -> Times:
        torch.manual_seed(0)
        trainer = inference.NPE(prior, density_estimator=estimator, show_progress_bars=False)
        trainer.append_simulations(theta, x)
        times = {"training": timed(lambda: trainer.train(max_num_epochs=EPOCHS, training_batch_size=BATCH))}
        found = trainer.build_posterior()
        samples = found.sample((DRAWS,), x=seen, show_progress_bars=False)
        times["10,000 samples"] = timed(lambda: found.sample((DRAWS,), x=seen, show_progress_bars=False))
        times["log-density of 10,000"] = timed(lambda: found.log_prob(samples, x=seen))
        return times

    def patched() -> Times:
        with pyflow.patch("nflows", "zuko"):
            return measure()

    return patched if fast else measure


def tokenizer(fast: bool) -> Callable[[], Times]:
    """A convolutional autoencoder of images with a residual quantiser of four stages between."""
    quantisers = peer("vector-quantize-pytorch", "vector_quantize_pytorch")
    torch.manual_seed(0)
    quantiser = quantisers.ResidualFSQ(dim=64, levels=[8, 5, 5, 5], num_quantizers=4)
    if fast:
        pyflow.accelerate(quantiser)
    encoder = nn.Sequential(nn.Conv2d(3, 32, 4, 2, 1), nn.SiLU(), nn.Conv2d(32, 64, 4, 2, 1))
    decoder = nn.Sequential(nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(32, 3, 4, 2, 1))
    images, codes = torch.randn(32, 3, 64, 64), torch.randn(32, 256, 64, requires_grad=True)
    inputs, grad = [codes, *quantiser.parameters()], torch.randn(32, 256, 64)

    def step() -> None:
        h = encoder(images)
        flat = quantiser(h.flatten(2).transpose(1, 2))[0]
        (decoder(flat.transpose(1, 2).unflatten(2, h.shape[2:])) - images).square().mean().backward()

    return _with_part(step, lambda: torch.autograd.grad(quantiser(codes)[0], inputs, grad), "the quantiser alone")


def resnet(fast: bool) -> Callable[[], Times]:
    """A ResNet of nine convolutions with torch's spectral norm."""
    torch.manual_seed(0)
    model = _ResNet()
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        nn.utils.parametrizations.spectral_norm(layer)
    if fast:
        pyflow.accelerate(model)
    x = torch.randn(8, 3, 16, 16)
    grads = [torch.randn_like(layer.weight) for layer in layers]
    return _with_part(
        lambda: model(x).square().mean().backward(),
        lambda: torch.autograd.backward([layer.weight for layer in layers], grads),
        "spectral norm alone",
    )


def _with_part(whole: Callable[[], object], part: Callable[[], object], name: str) -> Callable[[], Times]:
    def measure() -> Times:
        each = [(timed(whole), timed(part)) for _ in range(7)]
        return dict(zip(("forward and backward", name), map(statistics.median, zip(*each, strict=True)), strict=True))

    measure()
    return measure


class _ResNet(nn.Module):
    """Four residual blocks of 128 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 128, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1))
            for _ in range(4)
        )
        self.last = nn.Linear(128, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            h = h + block(h)
        return self.last(h.mean((2, 3)))


MODELS = [
    Model(f"sbi NPE, {name}", lambda fast, name=name: posterior(name, fast), aims)  # type: ignore[misc]
    for name, aims in {
        "nsf": {"training": 2.5, "10,000 samples": 4.0}, "maf": {}, "zuko_nsf": {}, "zuko_maf": {}
    }.items()
] + [
    Model("ResidualFSQ tokenizer", tokenizer, {"the quantiser alone": 3.0}),
    Model("ResNet with spectral norm", resnet, {"spectral norm alone": 3.0}),
]  # fmt: skip


def lines(rounds: int) -> Iterator[str]:
    """Yield the lines of the table, measuring."""
    yield "| " + " | ".join(HEAD) + " |"
    yield "|---|---|" + "---:|" * (len(HEAD) - 2)
    for name, make, aims in MODELS:
        try:
            own, fast = make(False), make(True)
        except Missing as why:
            yield f"| {name} | {why} | – | – | – |"
            continue
        pairs = [(own(), fast()) for _ in range(rounds)]
        for what in pairs[0][0]:
            before, after = (statistics.median(pair[i][what] for pair in pairs) for i in (0, 1))
            aim = f" ({aims[what]:g}x)" if what in aims else ""
            yield f"| {name} | {what} | {duration(before)} | {duration(after)} | {before / after:.2f}x{aim} |"


def swapping(rounds: int) -> float:
    """Return the median seconds that accelerate takes for a neural spline flow of 16 layers."""
    flow, times = peer_flows.made("nflows NSF", (8, 64, 16, 1)), []
    for _ in range(rounds):
        began = time.perf_counter()
        report = pyflow.accelerate(flow)
        times.append(time.perf_counter() - began)
        report.restore()
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pyflow.benchmarks.models", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's number")
    parser.add_argument("--rounds", type=int, default=5, help="how often each model is measured (default 5)")
    parser.add_argument("--out", type=Path, help="file for the table, which is printed too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = args.out and args.out.resolve()
    text = [f"{name}: {fact}  " for name, fact in machine.facts("cpu", args.threads, None).items()] + [""]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # sbi writes logs where it runs, and warns that it has not converged
        warnings.simplefilter("ignore")
        os.chdir(folder)
        for line in lines(args.rounds):
            text.append(line)
            print(line, flush=True)
        text += ["", f"`accelerate` of a neural spline flow of 16 layers: {duration(swapping(args.rounds))} (50 ms)"]
        print(text[-1])
        os.chdir("/")
    if out:
        out.write_text("\n".join([*text, ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
