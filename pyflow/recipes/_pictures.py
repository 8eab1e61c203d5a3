"""Grids of small images with titles, and charts above them, in one style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import PercentFormatter
from torch import Tensor

COLOURS = ("#c2552d", "#6c757d", "#3a6ea5", "#e09f3e")


@dataclass(frozen=True)
class Chart:
    """Titled curves, at most one for each of COLOURS: label -> x -> share in [0, 1]."""

    # inches: height, and room for the labels on the left
    HEIGHT, LEFT = 2.2, 0.6

    title: str
    across: str
    curves: Mapping[str, Mapping[int, float]]

    def plot(self, axes: Axes) -> None:
        for colour, (label, curve) in zip(COLOURS, self.curves.items(), strict=False):
            axes.plot([*curve], [*curve.values()], "o-", color=colour, ms=3, lw=1.5, label=label, clip_on=False)
        axes.set_xlabel(self.across, fontsize=9)
        axes.set(xlim=(0, None), ylim=(0, 1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8, loc="lower right")


@dataclass(frozen=True)
class Bars:
    """Titled bars, the first one in the first of COLOURS: label -> value."""

    HEIGHT, LEFT = 1.3, 1.0

    title: str
    values: Mapping[str, float]

    def plot(self, axes: Axes) -> None:
        first, other = COLOURS[:2]
        bars = axes.barh([*self.values], [*self.values.values()], 0.6, color=[first, *[other] * (len(self.values) - 1)])
        axes.bar_label(bars, fmt="%.3g", fontsize=8, padding=3)
        axes.invert_yaxis()
        axes.xaxis.set_visible(False)
        axes.margins(x=0.12)
        axes.spines["bottom"].set_visible(False)


@dataclass(frozen=True)
class Panel:
    """Titled grid of images, (rows, columns, H, W) or (rows, columns, H, W, 3) in [0, 1], with a label for each row."""

    title: str
    labels: Sequence[str]
    images: Tensor


def code_map(indices: Tensor, size: int) -> Tensor:
    """Map indices below `size`, of any shape, to colours (..., 3): one distinct, fixed colour per index."""
    hue, value = torch.rand(2, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    channels = (hue[:, None] + torch.tensor([0, 1 / 3, 2 / 3])).mul(2 * torch.pi).cos().mul(0.5).add(0.5)
    return (channels * (0.35 + 0.65 * value[:, None]))[indices.cpu().long()].float()


def draw(
    path: Path,
    title: str,
    subtitle: str,
    panels: Sequence[Panel],
    cell: float = 0.62,
    charts: Sequence[Chart | Bars] = (),
) -> None:
    """Write the charts side by side and the panels below, one under the other; each image is `cell` inches wide."""
    columns = max(panel.images.shape[1] for panel in panels)
    rows = sum(panel.images.shape[0] for panel in panels)
    head, left = 0.55, 1.3  # inches
    tall = max((chart.HEIGHT for chart in charts), default=0)
    top = tall + 1.5 if charts else 0.75
    width = left + columns * cell + 0.2
    height = top + rows * cell + head * len(panels) + 0.15
    figure = plt.figure(figsize=(width, height), facecolor="white")
    figure.text(0.2 / width, 1 - 0.3 / height, title, fontsize=13, fontweight="bold", va="center")
    figure.text(0.2 / width, 1 - 0.58 / height, subtitle, fontsize=9, color="0.35", va="center")
    y = height - top
    if charts:
        room = max(chart.LEFT for chart in charts)
        each = (width - 0.2) / len(charts) - room
        edges = {"left": room / width, "right": 1 - 0.2 / width, "top": 1 - 1.05 / height,
                 "bottom": 1 - (1.05 + tall) / height, "wspace": room / each}  # fmt: skip
        row = figure.subplots(1, len(charts), squeeze=False, gridspec_kw=edges)[0]
        for axes, chart in zip(row, charts, strict=True):
            axes.set_title(chart.title, fontsize=10.5, loc="left", pad=9)
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
            chart.plot(axes)
    for panel in panels:
        figure.text(0.2 / width, (y - 0.32) / height, panel.title, fontsize=10.5, va="center")
        y -= head
        n, across = panel.images.shape[:2]
        grid = GridSpec(
            n, across, figure, left=left / width, right=(left + across * cell) / width, top=y / height,
            bottom=(y - n * cell) / height, wspace=0.06, hspace=0.06,
        )  # fmt: skip
        for r in range(n):
            middle = (y - (r + 0.5) * cell) / height
            beside = (left - 0.12) / width
            figure.text(beside, middle, panel.labels[r], fontsize=9, ha="right", va="center", color="0.25")
            for c in range(across):
                axes = figure.add_subplot(grid[r, c])
                axes.imshow(panel.images[r, c].clamp(0, 1).cpu().numpy(), cmap="gray", vmin=0, vmax=1)
                axes.set_xticks([])
                axes.set_yticks([])
                for spine in axes.spines.values():
                    spine.set_color("0.6")
                    spine.set_linewidth(0.5)
        y -= n * cell
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
