"""The picture of the density demo: a row of panels for each table, and times below."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.gridspec import GridSpec
from torch import Tensor

from ._peers import KINDS, Density
from ._tabular import Table, Whitened, band, deviation

# (kind, library)
Key = tuple[str, str]

GAUSSIAN: Key = ("Gaussian", "")
GRID = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
COLOURS = {"NSF": "#2a9d6f", "MAF": "#c2552d", "Gaussian": "#6c757d"}
LIBRARY_COLOURS = {"pyflow": "#2a9d6f", "nflows": "#e09f3e", "zuko": "#3a6ea5"}
PATIENTS = 7


@dataclass(frozen=True)
class Report:
    """What was found for one table.

    Args:
        data: the first split, and `fitted` the flows trained on it.
        nats: mean log-density of a held-out raw row on every split.
        latents: z of every held-out row of all splits.
        seconds: of a training epoch and of drawing samples.
    """

    table: Table
    data: Whitened
    fitted: Mapping[Key, Density]
    nats: Mapping[Key, list[float]]
    latents: Mapping[Key, Tensor]
    seconds: Mapping[Key, tuple[float, float]]


def draw(out: Path, reports: Sequence[Report], count: int, seed: int) -> None:
    """Write the picture; `count` samples were timed."""
    rows = len(reports)
    height = 0.75 + 4.3 * rows + 2.9
    figure = plt.figure(figsize=(15, height), facecolor="white")
    figure.text(0.02, 1 - 0.3 / height, "Densities of real tables", fontsize=15, fontweight="bold", va="center")
    splits = len(reports[0].nats[GAUSSIAN])
    figure.text(
        0.02, 1 - 0.6 / height, f"{splits} splits; every score is of rows that training did not see; seed {seed}",
        fontsize=10, color="0.35", va="center",
    )  # fmt: skip
    top = 1 - 1.4 / height
    for number, report in enumerate(reports):
        upper = top - 4.3 * number / height
        lower = upper - 3.15 / height
        figure.text(0.02, upper + 0.42 / height, f"{report.table.name}: {report.table.title}", fontsize=12, va="center")
        joint = report.table.context is None
        left = GridSpec(1, 2 if joint else 1, figure, left=0.05, right=0.45, top=upper, bottom=lower, wspace=0.12)
        if joint:
            samples([figure.add_subplot(left[0, k]) for k in (0, 1)], report, seed)
        else:
            ridges(figure.add_subplot(left[0, 0]), report)
        middle = GridSpec(1, 1, figure, left=0.53, right=0.725, top=upper, bottom=lower)
        scores(figure.add_subplot(middle[0, 0]), report)
        right = GridSpec(1, 1, figure, left=0.79, right=0.985, top=upper, bottom=lower)
        calibration(figure.add_subplot(right[0, 0]), report)
    below = GridSpec(1, 2, figure, left=0.11, right=0.985, top=2.05 / height, bottom=0.4 / height, wspace=0.24)
    titles = "milliseconds for an epoch of training", f"milliseconds for {count:,} samples"
    if any(report.table.context is not None for report in reports):
        titles = titles[0], f"{titles[1]} (diabetes: of one patient)"
    for number, title in enumerate(titles):
        times(figure.add_subplot(below[0, number]), reports, number, title)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


@torch.no_grad()
def ridges(axes: Axes, report: Report) -> None:
    """Draw the density of the target of some held-out rows, one above the other, with its true value."""
    data, test = report.data, report.data.split.test
    assert test.context is not None and data.gaussian.weights is not None
    order = (test.context @ data.gaussian.weights)[:, 0].argsort()
    chosen = order[torch.linspace(0, len(order) - 1, PATIENTS + 2).round().long()[1:-1]]
    values = report.table.x[:, 0]
    y = torch.linspace(values.min().item() - 60, values.max().item() + 60, 400, dtype=torch.float64)
    curves = {}
    for kind in (*KINDS, "Gaussian"):
        curves[kind] = [density(report, kind, y[:, None], test.context[row]).exp() for row in chosen]
    tallest = max(curve.max().item() for kind in curves for curve in curves[kind])
    step = 0.5 * tallest
    for number, row in enumerate(chosen):
        base, front = number * step, 3 * (PATIENTS - number)
        for kind in ("Gaussian", "MAF", "NSF"):
            curve = base + curves[kind][number]
            if kind == "NSF":
                axes.fill_between(y, base, curve, color=COLOURS[kind], alpha=0.25, lw=0, zorder=front)
            axes.plot(
                y, curve, color=COLOURS[kind], lw=1.6 if kind == "NSF" else 1.1, zorder=front + 1,
                ls="--" if kind == "Gaussian" else "-", label=kind if number == 0 else None,
            )  # fmt: skip
        axes.axhline(base, color="0.85", lw=0.6, zorder=front)
        truth = values[test.rows[row]].item()
        at = density(report, "NSF", torch.tensor([[truth]], dtype=torch.float64), test.context[row]).exp().item()
        axes.plot([truth, truth], [base, base + at], color="black", lw=1, zorder=front + 2)
        axes.plot(truth, base, "o", color="black", ms=5, zorder=front + 2, label="true value" if number == 0 else None)
    axes.set_yticks([])
    axes.set_xlim(y[0].item(), y[-1].item())
    axes.set_xlabel(report.table.columns[0], fontsize=9)
    axes.set_title(f"predicted densities of {PATIENTS} held-out rows", fontsize=10)
    axes.set_ylim(-0.12 * tallest, (PATIENTS - 1) * step + 1.15 * tallest)
    axes.legend(loc="upper right", frameon=False, fontsize=8, ncols=4)
    _clean(axes)
    axes.spines["left"].set_visible(False)


def density(report: Report, kind: str, raw: Tensor, context: Tensor) -> Tensor:
    """Return the log-density of raw values (N, D), all given one standardised context."""
    data = report.data
    if kind == "Gaussian":
        x = (raw - data.split.mean) / data.split.scale
        return data.gaussian.log_prob(x, context.expand(len(raw), -1)) - data.split.scale.log().sum()
    given = context.expand(len(raw), -1)
    z = data.white(raw, given)
    return report.fitted[kind, "pyflow"].log_prob(z, given.to(z)).double().cpu() - data.volume


@torch.no_grad()
def samples(panels: Sequence[Axes], report: Report, seed: int) -> None:
    """Draw two columns of the rows over samples of NSF and of the Gaussian."""
    first, second = report.table.shown
    raw = report.table.x
    torch.manual_seed(seed)
    like = report.data.test.x
    drawn = {
        "NSF": report.fitted["NSF", "pyflow"].sample(3000, None),
        "Gaussian": torch.randn(3000, report.table.dim).to(like),
    }
    low, high = raw.amin(0), raw.amax(0)
    margin = 0.25 * (high - low)
    for axes, (kind, z) in zip(panels, drawn.items(), strict=True):
        points = report.data.raw(z, None)
        axes.plot(points[:, first], points[:, second], ".", color=COLOURS[kind], ms=3.5, alpha=0.3, mew=0)
        axes.plot(raw[:, first], raw[:, second], "o", mfc="none", mec="black", mew=0.6, ms=3.5, alpha=0.8)
        axes.set_xlim((low - margin)[first].item(), (high + margin)[first].item())
        axes.set_ylim((low - margin)[second].item(), (high + margin)[second].item())
        axes.set_xlabel(report.table.columns[first], fontsize=9)
        axes.set_title(f"{kind}: samples (dots), all rows (circles)", fontsize=10)
        _clean(axes)
    panels[0].set_ylabel(report.table.columns[second], fontsize=9)


def scores(axes: Axes, report: Report) -> None:
    """Draw every flow's nats over the Gaussian's: mean, standard error, and the splits."""
    keys = [key for key in report.nats if key != GAUSSIAN]
    base = report.nats[GAUSSIAN]
    for row, key in enumerate(keys):
        over = [a - b for a, b in zip(report.nats[key], base, strict=True)]
        colour = LIBRARY_COLOURS[key[1]]
        axes.plot(over, [row] * len(over), "o", color=colour, alpha=0.35, ms=4, mew=0)
        axes.errorbar(
            statistics.fmean(over), row, xerr=statistics.stdev(over) / math.sqrt(len(over)), fmt="s", color=colour,
            ms=6, lw=2, capsize=4,
        )  # fmt: skip
    axes.axvline(0, color=COLOURS["Gaussian"], lw=1, ls="--")
    axes.set_yticks(range(len(keys)), [" ".join(key) for key in keys], fontsize=8.5)
    axes.set_ylim(len(keys) - 0.5, -0.5)
    axes.set_xlabel(f"nats over the Gaussian's {statistics.fmean(base):.2f}".replace("-", "−"), fontsize=9)
    axes.set_title("held-out log-likelihood", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    _clean(axes)


def calibration(axes: Axes, report: Report) -> None:
    """Draw how far the distribution of Phi(z) is from uniform, with the band of 95 % of calibrated densities."""
    shown: list[Key] = [GAUSSIAN, *((kind, "pyflow") for kind in reversed(KINDS))]
    width = band(report.latents[GAUSSIAN].numel(), GRID)
    axes.fill_between(GRID, -width, width, color="0.9", lw=0, label="95 % band")
    tallest = width.max().item()
    for key in shown:
        off = deviation(report.latents[key], GRID)
        tallest = max(tallest, off.abs().max().item())
        axes.plot(
            GRID, off, color=COLOURS[key[0]], lw=1.6 if key[0] == "NSF" else 1.2, label=key[0],
            ls="--" if key == GAUSSIAN else "-",
        )  # fmt: skip
    axes.axhline(0, color="0.4", lw=0.7)
    axes.set_xlim(0, 1)
    axes.set_xlabel("probability u", fontsize=9)
    axes.set_ylabel("share of rows with Φ(z) ≤ u, less u", fontsize=9)
    axes.set_title("calibration", fontsize=10)
    axes.set_ylim(-1.12 * tallest, 1.35 * tallest)
    axes.legend(loc="upper center", frameon=False, fontsize=7.5, ncols=4, columnspacing=1, handlelength=1.5)
    _clean(axes)


def times(axes: Axes, reports: Sequence[Report], number: int, title: str) -> None:
    """Draw bars of one of the two times, grouped by table and flow."""
    at, ticks, names = 0.0, [], []
    longest = max(1e3 * each[number] for report in reports for each in report.seconds.values())
    seen = set()
    for report in reports:
        for kind in KINDS:
            keys = [key for key in report.seconds if key[0] == kind]
            ticks.append(at + (len(keys) - 1) / 2)
            names.append(f"{kind}, {report.table.name}")
            for key in keys:
                value = 1e3 * report.seconds[key][number]
                label = None if key[1] in seen else key[1]
                axes.barh(at, value, height=0.9, color=LIBRARY_COLOURS[key[1]], label=label)
                axes.text(
                    value + 0.008 * longest,
                    at,
                    f"{value:.1f}" if value < 100 else f"{value:,.0f}",
                    va="center",
                    fontsize=7,
                )
                seen.add(key[1])
                at += 1
            at += 0.7
    axes.set_yticks(ticks, names, fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08 * longest)
    axes.set_title(title, fontsize=10, loc="left")
    if number == 0:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), frameon=False, fontsize=8, ncols=3)
    _clean(axes)
