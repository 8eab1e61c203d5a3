"""Estimate densities of real tables, some given features, with NSF, MAF and a Gaussian; the same in nflows and zuko."""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from . import _demo, _density_picture, _peers, _tabular
from ._demo import synchronize, threads
from ._density_picture import GAUSSIAN, GRID, Key, Report
from ._loops import cosine_rate, follow
from ._peers import Density
from ._tabular import Part, Whitened

# 97.5 % quantiles of Student's t for the mean of n splits
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}


@dataclass(frozen=True)
class Settings:
    """Flows and training, the same for every library."""

    layers: int = 3
    hidden: tuple[int, ...] = (32, 32)
    epochs: int = 60
    patience: int = 20
    batch: int = 64
    rate: float = 2e-3
    warmup: int = 10
    # AdamW's weight decay of the matrices: a few hundred rows overfit without it
    decay: float = 15.0
    # decay of the running average of the weights, which is scored and kept
    average: float = 0.95
    splits: int = _tabular.FOLDS
    # rounds in which all flows are timed in turn
    rounds: int = 9
    samples: int = 10_000
    # CPU threads: two gain nothing on layers this small
    threads: int | None = 1


SETTINGS = {
    "diabetes": Settings(layers=2, epochs=40, decay=8.0),
    "wine": Settings(epochs=80),
    "breast-cancer": Settings(epochs=40),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", nargs="+", choices=_tabular.NAMES, default=["diabetes", "wine"],
        help="one or more (default diabetes wine); all ship with scikit-learn",
    )  # fmt: skip
    parser.add_argument("--epochs", type=_demo.positive, help="largest number of epochs; training may stop earlier")
    _demo.add_arguments(
        parser, out="outputs/density.png", seed="weights, batches and samples", quick="few epochs, two splits"
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status."""
    device = _demo.chosen_device(args)
    settings = {name: SETTINGS[name] for name in dict.fromkeys(args.data)}
    if args.quick:
        settings = {name: replace(each, epochs=3, splits=2, rounds=1) for name, each in settings.items()}
    if args.epochs:
        settings = {name: replace(each, epochs=args.epochs) for name, each in settings.items()}

    def work() -> dict[str, object]:
        with threads(next(iter(settings.values())).threads if device.type == "cpu" else None):
            return demo(settings, args, device)

    return _demo.run("density", args, work)


def demo(settings: Mapping[str, Settings], args: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """Train every flow on every split of every table, time them, draw; returns the metrics."""
    began = time.perf_counter()
    libraries, missing = _peers.installed()
    for line in missing:
        print(line, file=sys.stderr)
    reports = []
    for name, chosen in settings.items():
        report = study(_tabular.load(name), chosen, libraries, args.seed, device)
        print(f"\n{text(report)}")
        reports.append(report)
    _density_picture.draw(args.out, reports, Settings.samples, args.seed)
    return {
        "data": list(settings), "seed": args.seed, "device": str(device), "backend": args.backend,
        "libraries": libraries, "settings": {name: asdict(chosen) for name, chosen in settings.items()},
        "tables": {report.table.name: metrics(report) for report in reports},
        "total_seconds": time.perf_counter() - began,
    }  # fmt: skip


def study(
    table: _tabular.Table, settings: Settings, libraries: Sequence[str], seed: int, device: torch.device
) -> Report:
    """Fit and score everything on every split of a table."""
    keys: list[Key] = [(kind, library) for kind in _peers.KINDS for library in libraries]
    whitened = [Whitened.of(split, device) for split in _tabular.splits(table, settings.splits)]
    nats: dict[Key, list[float]] = {key: [] for key in [GAUSSIAN, *keys]}
    latents: dict[Key, list[Tensor]] = {key: [] for key in nats}
    fitted: dict[Key, Density] = {}
    with _demo.bar(len(whitened) * len(keys) * settings.epochs, table.name) as bar:
        for number, data in enumerate(whitened):
            test = data.test
            # in z the Gaussian is the standard one
            latents[GAUSSIAN].append(test.x.cpu())
            raw = data.gaussian.log_prob(data.split.test.x, data.split.test.context)
            nats[GAUSSIAN].append(raw.mean().item() - data.split.scale.log().sum().item())
            for key in keys:
                bar.set_postfix_str(f"split {number + 1}, {key[0]} of {key[1]}")
                torch.manual_seed(seed + number)
                density = build(key, table, settings).to(device)
                density = fit(density, data, settings, seed + number, bar)
                nats[key].append(mean_log_prob(density, test) - data.volume)
                with torch.no_grad():
                    latents[key].append(density.latent(*test.all()).cpu())
                if number == 0:
                    fitted[key] = density
    seconds = paces(fitted, whitened[0], settings, seed)
    return Report(table, whitened[0], fitted, nats, {key: torch.cat(parts) for key, parts in latents.items()}, seconds)


def build(key: Key, table: _tabular.Table, settings: Settings) -> Density:
    kind, library = key
    return _peers.build(library, kind, table.dim, table.context_features, settings.layers, settings.hidden)


def fit(density: Density, data: Whitened, settings: Settings, seed: int, bar: tqdm) -> Density:
    """Return the density with the averaged weights that score best on the validation rows."""
    start(density, data)
    step = stepper(density, settings)
    average, best_nats, best_epoch = copy.deepcopy(density), -math.inf, 0
    best: dict[str, Tensor] | None = None
    generator = torch.Generator().manual_seed(seed)
    taken, steps = 0, settings.epochs * batch_count(data.train, settings)
    for epoch in range(1, settings.epochs + 1):
        for x, context in batches(data.train, settings, generator):
            step(x, context, cosine_rate(taken, settings.rate, settings.warmup, steps))
            taken += 1
            follow(average, density, max(1 - settings.average, 9 / (10 + taken)))
        nats = mean_log_prob(average, data.validation)
        if nats > best_nats:
            best, best_nats, best_epoch = copy.deepcopy(average.state_dict()), nats, epoch
        bar.update()
        if epoch - best_epoch >= settings.patience:
            break
    bar.update(settings.epochs - epoch)
    assert best is not None, "the validation likelihood was never finite"
    average.load_state_dict(best)
    return average


@torch.no_grad()
def start(density: Density, data: Whitened) -> None:
    """Initialise every ActNorm as the identity, which is what whitened rows need."""
    z = torch.randn(1024, data.train.x.shape[1], generator=torch.Generator().manual_seed(0)).to(data.train.x)
    context = None if data.train.context is None else data.train.context[:1].expand(len(z), -1)
    density.train()
    density.log_prob((z - z.mean(0)) / z.std(0), context)


def stepper(density: Density, settings: Settings) -> Callable[[Tensor, Tensor | None, float], None]:
    """Return a function (x, context, learning rate) that takes one optimiser step."""
    matrices = [p for p in density.parameters() if p.dim() > 1]
    vectors = [p for p in density.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": settings.decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.rate, fused=vectors[0].device.type in ("cpu", "cuda"))

    def step(x: Tensor, context: Tensor | None, rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = -density.log_prob(x, context).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(density.parameters(), 10.0)
        optimizer.step()

    return step


def batch_count(train: Part, settings: Settings) -> int:
    return max(1, round(len(train.x) / settings.batch))


def batches(train: Part, settings: Settings, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the rows in random order in batches of nearly equal size."""
    order = torch.randperm(len(train.x), generator=generator).to(train.x.device)
    for rows in order.tensor_split(batch_count(train, settings)):
        yield train.batch(rows)


@torch.no_grad()
def mean_log_prob(density: Density, part: Part) -> float:
    return density.log_prob(*part.all()).double().mean().item()


def paces(
    fitted: Mapping[Key, Density], data: Whitened, settings: Settings, seed: int
) -> dict[Key, tuple[float, float]]:
    """Return the seconds of a training epoch and of drawing the samples: medians of rounds in which all take turns."""
    context = None if data.test.context is None else data.test.context[0]
    work: dict[Key, tuple[Callable[[], object], Callable[[], object]]] = {}
    for key, density in fitted.items():
        step = stepper(copy.deepcopy(density), settings)

        def epoch(step: Callable[[Tensor, Tensor | None, float], None] = step) -> None:
            for x, given in batches(data.train, settings, torch.Generator().manual_seed(seed)):
                step(x, given, 0.0)

        def draw(density: Density = density) -> None:
            with torch.no_grad():
                density.sample(settings.samples, context)

        work[key] = epoch, draw
    taken: dict[Key, tuple[list[float], list[float]]] = {key: ([], []) for key in work}
    for number in range(settings.rounds + 1):
        for key, calls in work.items():
            for call, seconds in zip(calls, taken[key], strict=True):
                synchronize(data.train.x.device)
                began = time.perf_counter()
                call()
                synchronize(data.train.x.device)
                # the first round warms up
                if number:
                    seconds.append(time.perf_counter() - began)
    return {key: (statistics.median(epochs), statistics.median(draws)) for key, (epochs, draws) in taken.items()}


def summary(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def differences(report: Report, first: Key, second: Key) -> list[float]:
    """Return first minus second on every split."""
    return [a - b for a, b in zip(report.nats[first], report.nats[second], strict=True)]


def text(report: Report) -> str:
    """Return the table of nats, of differences on the same splits, and of times."""
    splits = len(report.nats[GAUSSIAN])
    lines = [
        report.table.title,
        f"{f'held out, {splits} splits':<20}{'nats':>18}{'over Gaussian':>20}{'pyflow less it':>20}{'':>22}"
        f"{'ms/epoch':>10}{'ms/10,000':>12}",
    ]
    for key, nats in report.nats.items():
        mean, error = summary(nats)
        line = f"{' '.join(part for part in key if part):<20}{f'{mean:.3f} ± {error:.3f}':>18}"
        if key in report.seconds:
            mean, error = summary(differences(report, key, GAUSSIAN))
            line += f"{f'{mean:+.3f} ± {error:.3f}':>20}"
            verdict = against = ""
            if key[1] != "pyflow":
                mean, error = summary(differences(report, (key[0], "pyflow"), key))
                against = f"{mean:+.3f} ± {error:.3f}"
                verdict = "equal within noise" if abs(mean) <= max(STUDENT[splits] * error, 5e-4) else "different"
            epoch, draw = report.seconds[key]
            line += f"{against:>20}{verdict:>22}{1e3 * epoch:>10.1f}{1e3 * draw:>12.1f}"
        lines.append(line)
    return "\n".join(lines)


def metrics(report: Report) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, nats in report.nats.items():
        mean, error = summary(nats)
        off = _tabular.deviation(report.latents[key], GRID).abs()
        entry: dict[str, object] = {
            "nats": nats, "mean": mean, "standard_error": error, "largest_deviation": off.max().item(),
        }  # fmt: skip
        if key in report.seconds:
            entry["over_gaussian"] = summary(differences(report, key, GAUSSIAN))
            entry["epoch_seconds"], entry["sample_seconds"] = report.seconds[key]
            if key[1] != "pyflow":
                entry["pyflow_minus_it"] = summary(differences(report, (key[0], "pyflow"), key))
        found[" ".join(part for part in key if part)] = entry
    return {"rows": len(report.table.x), "columns": report.table.dim, "densities": found}
