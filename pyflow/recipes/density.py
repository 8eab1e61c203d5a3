"""Fit densities of a target given features and of all columns of a table: flows, a Gaussian, nflows and zuko."""

from __future__ import annotations

import argparse
import copy
import importlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

from pyflow.flows import MAF, NSF
from pyflow.flows.base import Flow

from . import _demo
from ._demo import synchronize
from ._loops import follow
from ._tables import Gaussian, Rows, Table, load, standardised

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

SPLITS = 5
BATCH, RATE, DECAY, AVERAGE = 64, 3e-3, 0.3, 0.98
SAMPLES = 10_000
COLORS = {"NSF": "#0a58a5", "MAF": "#d97706", "Gaussian": "0.45"}


@dataclass
class Fitted:
    """A flow of whitened rows, trained on one split, with its figures."""

    flow: Flow
    gaussian: Gaussian
    nats: dict[str, float]
    pit: dict[str, list[float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=_demo.positive, help="largest number of epochs (default 120)")
    _demo.add_arguments(parser, out="outputs/density.png", seed="splits, weights and batches", device="cpu")


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status."""

    def work() -> dict[str, object]:
        # two threads gain nothing on layers this small
        with _demo.threads(1):
            return demo(args, args.epochs or (4 if args.quick else 120), 2 if args.quick else SPLITS)

    return _demo.run("density", args, work)


def demo(args: argparse.Namespace, epochs: int, splits: int) -> dict[str, object]:
    """Fit, compare, time, draw; returns the metrics."""
    tables = load()
    results: dict[str, Any] = {"seed": args.seed, "backend": args.backend, "epochs": epochs, "splits": splits}
    kept: dict[str, list[dict[str, Fitted]]] = {}
    for table in tables:
        n, (dim, context) = len(table.x), table.sizes
        given = f" given {context} features" if context else ""
        print(f"{table.name}: density of {dim} column(s){given}, {n} rows, {splits} splits in 70, 10 and 20 %")
        with _demo.bar(splits * 2 * epochs, table.name) as bar:
            kept[table.name] = [split(table, args.seed + i, epochs, args.device, bar.update) for i in range(splits)]
        results[table.name] = scores(kept[table.name])
        print(rows_of(results[table.name]))
    samples = 1000 if args.quick else SAMPLES
    results["samples"], results["seconds"] = samples, paces(tables[1], args.device, samples, 1 if args.quick else 2)
    print(pace_table(results["seconds"], samples))
    picture(tables, kept, results, args)
    return results


def split(table: Table, seed: int, epochs: int, device: str, update: Callable[[], Any]) -> dict[str, Fitted]:
    """Fit every model to one split; columns are standardised by the training rows."""
    n = len(table.x)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split([n * 7 // 10, n * 8 // 10])
    rows = standardised(table, parts)
    baseline = Gaussian.fit(rows[0], rows[1])
    test_x, test_c = rows[2]
    plain = baseline.log_prob(test_x, test_c).mean().item()
    fitted = {}
    for name, make in flows(*table.sizes).items():
        torch.manual_seed(seed)
        whitened = [moved(baseline, part, device) for part in rows]
        flow = fit(make().to(device), whitened[0], whitened[1], epochs, update)
        with torch.no_grad():
            z = flow(*whitened[2])[0].double().cpu()
            nats = flow.log_prob(*whitened[2]).double().mean().item() - baseline.logdet
        pit = {name: uniforms(z), "Gaussian": uniforms(baseline.whiten(test_x, test_c))}
        fitted[name] = Fitted(flow, baseline, {name: nats, "Gaussian": plain}, pit)
    return fitted


def flows(dim: int, context: int) -> dict[str, Callable[[], Flow]]:
    options: dict[str, Any] = {"hidden": (32, 32), "context_features": context, "layers": 4}
    return {"NSF": lambda: NSF(dim, **options), "MAF": lambda: MAF(dim, **options)}


def moved(gaussian: Gaussian, rows: Rows, device: str) -> tuple[Tensor, ...]:
    """Return whitened rows and their context, if any, in float32 on the device."""
    x, context = rows
    values = (gaussian.whiten(x, context),) if context is None else (gaussian.whiten(x, context), context)
    return tuple(v.float().to(device) for v in values)


def uniforms(z: Tensor) -> list[float]:
    """Return the normal distribution function of z: uniform numbers where the density is right."""
    return (0.5 * (1 + torch.erf(z / math.sqrt(2)))).flatten().tolist()


def fit(
    flow: Flow, train: tuple[Tensor, ...], validation: tuple[Tensor, ...], epochs: int, update: Callable[[], Any]
) -> Flow:
    """Return the flow with the averaged weights that score best on the validation rows."""
    # an ActNorm that sees whitened rows changes little
    loss_of(flow, train)
    average = copy.deepcopy(flow).eval()
    best, best_loss, steps = copy.deepcopy(average.state_dict()), math.inf, 0
    step = stepper(flow)
    total = epochs * (len(train[0]) // BATCH)
    for _ in range(epochs):
        for index in torch.randperm(len(train[0]))[: len(train[0]) // BATCH * BATCH].split(BATCH):
            step(tuple(v[index] for v in train), RATE * 0.5 * (1 + math.cos(math.pi * steps / total)))
            steps += 1
            follow(average, flow, max(1 - AVERAGE, 9 / (10 + steps)))
        with torch.no_grad():
            loss = loss_of(average, validation).item()
        if loss < best_loss:
            best, best_loss = copy.deepcopy(average.state_dict()), loss
        update()
    average.load_state_dict(best)
    return average


def loss_of(flow: Any, rows: tuple[Tensor, ...]) -> Tensor:
    return -flow.log_prob(*rows).mean()


def stepper(model: nn.Module, loss: Callable[..., Tensor] = loss_of) -> Callable[[tuple[Tensor, ...], float], None]:
    """Return a function (rows, learning rate) that takes one optimiser step."""
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=DECAY)

    def step(rows: tuple[Tensor, ...], rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss(model, rows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()

    return step


def scores(splits: list[dict[str, Fitted]]) -> dict[str, dict[str, float]]:
    """Return mean and standard error of held-out nats over the splits, and of the gain over the Gaussian."""
    result = {}
    for name in ("NSF", "MAF", "Gaussian"):
        own = [fitted.get(name, fitted["NSF"]).nats[name] for fitted in splits]
        gain = [fitted.get(name, fitted["NSF"]).nats[name] - fitted["NSF"].nats["Gaussian"] for fitted in splits]
        result[name] = {"nats": statistics.mean(own), "error": error_of(own), "gain": statistics.mean(gain),
                        "gain_error": error_of(gain)}  # fmt: skip
    return result


def error_of(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def rows_of(result: dict[str, dict[str, float]]) -> str:
    lines = [f"{'held-out nats per row':<24}{'mean ± s.e.':>16}{'over the Gaussian':>22}"]
    for name, r in result.items():
        lines.append(f"{name:<24}{r['nats']:>9.3f} ± {r['error']:.3f}{r['gain']:>+14.3f} ± {r['gain_error']:.3f}")
    return "\n".join(lines) + "\n"


def paces(table: Table, device: str, samples: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return median seconds of an epoch and of many samples, all contenders in turn, of packages that are here."""
    x = (table.x - table.x.mean(0)) / table.x.std(0)
    x, dim = x.float().to(device), table.x.shape[1]
    runs = {}
    for name, (make, loss, draw) in contenders(dim, samples).items():
        try:
            model = make().to(device)
        except ModuleNotFoundError:
            continue
        step = stepper(model, loss)

        def epoch(step: Any = step) -> None:
            for rows in x.split(BATCH):
                step((rows,), 1e-4)

        runs[name] = (epoch, lambda model=model, draw=draw: draw(model))
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    for _ in range(rounds):
        for name, calls in runs.items():
            for times, call in zip(seconds[name], calls, strict=True):
                times.append(timed(call, torch.device(device)))
    return {name: {"epoch": statistics.median(a), "samples": statistics.median(b)} for name, (a, b) in seconds.items()}


def contenders(
    dim: int, samples: int
) -> dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], Callable[[Any], Any]]]:
    """Return (maker, loss, draw) of autoregressive flows of the same size."""
    width, layers = 32, 4

    def zuko(name: str) -> Callable[[], nn.Module]:
        return lambda: getattr(importlib.import_module("zuko").flows, name)(
            dim, transforms=layers, hidden_features=(width, width)
        )  # fmt: skip

    def nflows() -> nn.Module:
        kind = importlib.import_module("nflows.flows").MaskedAutoregressiveFlow
        return kind(dim, width, layers, 1, use_residual_blocks=False)

    def ours(flow: Any) -> Tensor:
        return flow.sample(samples)

    @torch.no_grad()
    def theirs(flow: Any) -> Tensor:
        return flow.sample(samples) if hasattr(flow, "sample") else flow().sample((samples,))

    def lazily(flow: Any, rows: tuple[Tensor, ...]) -> Tensor:
        return loss_of(flow(), rows)

    sizes: dict[str, Any] = {"layers": layers, "hidden": (width, width)}
    return {
        "MAF, pyflow": (lambda: MAF(dim, **sizes), loss_of, ours),
        "MAF, nflows": (nflows, loss_of, theirs),
        "MAF, zuko": (zuko("MAF"), lazily, theirs),
        "NSF autoregressive, pyflow": (lambda: NSF(dim, autoregressive=True, **sizes), loss_of, ours),
        "NSF autoregressive, zuko": (zuko("NSF"), lazily, theirs),
        "NSF coupling, pyflow": (lambda: NSF(dim, **sizes), loss_of, ours),
    }


def timed(call: Callable[[], Any], device: torch.device) -> float:
    # one thread: the CPU time does not depend on what else a machine runs
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    synchronize(device)
    began = clock()
    call()
    synchronize(device)
    return clock() - began


def pace_table(seconds: dict[str, dict[str, float]], samples: int) -> str:
    lines = [f"{'breast cancer, 4 layers of 2 x 32':<36}{'epoch':>10}{f'{samples:,} samples':>18}"]
    for name, times in seconds.items():
        lines.append(f"{name:<36}{times['epoch']:>8.3f} s{times['samples']:>16.3f} s")
    return "\n".join(lines)


def picture(
    tables: list[Table], kept: dict[str, list[dict[str, Fitted]]], results: dict[str, Any], args: argparse.Namespace
) -> None:
    """Draw gains over the Gaussian, conditional densities, calibration, and samples beside data."""
    figure, ((gains, curves), (pit, cloud)) = plt.subplots(2, 2, figsize=(12, 8.6), layout="constrained")
    figure.suptitle("Densities of tables by normalising flows", fontsize=13, fontweight="bold", x=0.01, ha="left")
    names = [(table.name, model) for table in tables for model in ("NSF", "MAF")]
    for i, (table, model) in enumerate(names):
        r = results[table][model]
        gains.barh(i, r["gain"], xerr=2 * r["gain_error"], color=COLORS[model], height=0.6, capsize=3)
        gains.text(0.98, i - 0.38, f"{r['gain']:+.3f} ± {r['gain_error']:.3f}", transform=gains.get_yaxis_transform(),
                   ha="right", fontsize=8)  # fmt: skip
    gains.set_yticks(range(len(names)), [f"{model}, {table}" for table, model in names])
    gains.set_ylim(len(names) - 0.5, -0.7)
    gains.axvline(0, color="0.3", lw=0.8)
    gains.set(title="Held-out nats per row over the Gaussian, ± 2 standard errors")
    gains.set_xscale("symlog", linthresh=0.05)
    draw_conditionals(curves, tables[0], kept[tables[0].name][0]["NSF"])
    for model in ("NSF", "MAF", "Gaussian"):
        values = np.sort([u for f in kept[tables[0].name] for u in f.get(model, f["NSF"]).pit[model]])
        share = np.arange(1, len(values) + 1) / len(values)
        distance = np.abs(share - values).max()
        pit.plot(values, share - values, color=COLORS[model], lw=1.2, label=f"{model}, largest {distance:.3f}")
    pit.axhline(0, color="0.3", lw=0.8)
    title = (
        "Calibration given the features: share of held-out targets\nbelow each predicted quantile, less the quantile"
    )
    pit.set(title=title, xlabel="quantile")
    pit.legend(fontsize=8, frameon=False)
    draw_cloud(cloud, tables[1], kept[tables[1].name][0]["NSF"], args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=130)
    plt.close(figure)


@torch.no_grad()
def draw_conditionals(axes: Axes, table: Table, fitted: Fitted) -> None:
    """Draw the density of the standardised target for three patients, with what was observed."""
    x, context = ((v - v.mean(0)) / v.std(0) for v in (table.x, table.context) if v is not None)
    device = next(fitted.flow.parameters()).device
    line = torch.linspace(-3, 3.5, 400, dtype=torch.float64)[:, None]
    order = fitted.gaussian.center(context)[:, 0].argsort()
    for share, color in zip((0.05, 0.5, 0.95), plt.get_cmap("viridis")((0.1, 0.5, 0.8)), strict=True):
        row = int(order[int(share * len(order))])
        given = context[row].expand(len(line), -1)
        z = fitted.gaussian.whiten(line, given).float().to(device)
        density = (fitted.flow.log_prob(z, given.float().to(device)).double().cpu() - fitted.gaussian.logdet).exp()
        axes.plot(line, density, color=color, lw=1.5)
        axes.plot(line, fitted.gaussian.log_prob(line, given).exp(), color=color, lw=0.9, ls="--")
        axes.plot(x[row], 0, "^", color=color, ms=9, clip_on=False)
    axes.set(title="Progression of three patients given features:\nNSF (lines), Gaussian (dashed), observed (marks)",
             xlabel="standard deviations", ylim=(0, None))  # fmt: skip


@torch.no_grad()
def draw_cloud(axes: Axes, table: Table, fitted: Fitted, seed: int) -> None:
    """Draw two columns of the data, of samples of the flow and of the Gaussian."""
    x = (table.x - table.x.mean(0)) / table.x.std(0)
    i, j = table.features.index("mean radius"), table.features.index("mean area")
    sampled = fitted.gaussian.color(fitted.flow.sample(len(x), seed=seed).cpu(), None)
    plain = fitted.gaussian.color(torch.randn(len(x), x.shape[1], generator=torch.Generator().manual_seed(seed)), None)
    for values, color, label in ((plain, COLORS["Gaussian"], "Gaussian"), (sampled, COLORS["NSF"], "NSF"),
                                 (x, "crimson", "data")):  # fmt: skip
        axes.plot(values[:, i], values[:, j], ".", ms=3.5, alpha=0.6, color=color, label=label)
    axes.set(title="Two of 30 columns: data and samples", xlabel="mean radius", ylabel="mean area")
    axes.legend(fontsize=8, frameon=False, markerscale=2)
