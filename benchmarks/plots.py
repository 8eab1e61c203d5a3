"""Plots of a run: speed-up of each case, cost over size, peak memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .report import Group, size

COLOURS = {"eager": "#8d99ae", "compile": "#3a6ea5", "peer": "#e09f3e", "pyflow": "#2a9d6f", "copy": "#222222"}
NAMES = {"eager": "eager", "compile": "torch.compile", "copy": "copying as many bytes"}


def write(groups: list[Group], header: dict[str, str], out: Path) -> None:
    """Write the plots for which the run has data."""
    note = f"{header['CPU']}, {header['instruction set']}, threads {header['threads']}, torch {header['torch']}"
    if "GPU" in header:
        note = f"{header['GPU']}, torch {header['torch']}"
    pictures = {"speedup": speedup(groups), "scaling": scaling(groups), "memory": memory(groups)}
    for name, figure in pictures.items():
        if figure:
            figure.supxlabel(note, x=0.99, ha="right", fontsize=7, color="#666666")
            figure.savefig(out / f"{name}.png", dpi=140)


def speedup(groups: list[Group]) -> Figure | None:
    """Draw bars of pyflow's speed-up in each case."""
    groups = [group for group in groups if not group.sweep and not math.isnan(group.ours().median)]
    bars = [(group, _ratios(group)) for group in groups]
    bars = [(group, ratios) for group, ratios in bars if ratios]
    if not bars:
        return None
    count = sum(len(ratios) for _, ratios in bars)
    figure = Figure(figsize=(8, 1.2 + 0.16 * count + 0.08 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    at, ticks = 0.0, []
    for _group, ratios in bars:
        ticks.append(at + (len(ratios) - 1) / 2)
        for kind, ratio in ratios.items():
            axes.barh(at, ratio - 1, left=1, height=0.85, color=COLOURS[kind])
            axes.annotate(
                f"{ratio:.1f}x" if 1.05 <= ratio < 9.95 else f"{ratio:.2f}x" if ratio < 2 else f"{ratio:.0f}x",
                (max(ratio, 1), at), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7,
                color="#b00020" if ratio < 1 else "black",
            )  # fmt: skip
            at += 1
        at += 0.6
    axes.set_yticks(ticks, [group.name for group, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    _plain_ticks(axes, [ratio for _, ratios in bars for ratio in ratios.values()])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(y=0.01)
    axes.set_title("How many times faster pyflow is than …", fontsize=10, loc="left")
    peers = sorted({group.peer for group, _ in bars if group.peer})
    labels = {"eager": "eager", "compile": "torch.compile", "peer": ", ".join(peers)}
    handles = [Axes.bar(axes, 1, 0, color=COLOURS[kind], label=text) for kind, text in labels.items() if text]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    _clean(axes)
    return figure


def _ratios(group: Group) -> dict[str, float]:
    names = {"eager": "eager", "compile": "compile", "peer": group.peer}
    ratios = {kind: group.speedup(group.ours(), name) for kind, name in names.items()}
    return {kind: ratio for kind, ratio in ratios.items() if not math.isnan(ratio)}


def _plain_ticks(axes: Axes, ratios: list[float]) -> None:
    low, high = min(*ratios, 0.8), max(*ratios, 2.0)
    axes.set_xlim(low / 1.15, high * 1.25)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low / 1.15 <= tick <= high * 1.25]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()


def scaling(groups: list[Group]) -> Figure | None:
    """Draw time over the number of elements, with logarithmic axes."""
    points = [(group.sweep, group) for group in groups if group.sweep and not math.isnan(group.ours().median)]
    points.sort(key=lambda point: point[0])
    if len(points) < 2:
        return None
    figure = Figure(figsize=(8, 4), layout="constrained")
    times, rates = figure.subplots(1, 2)
    for contender in ("eager", "compile", "pyflow", "copy"):
        known = [point for point in points if not math.isnan(point[1].median(contender))]
        if not known:
            continue
        style: dict[str, Any] = {
            "color": COLOURS[contender],
            "label": NAMES.get(contender, contender),
            "marker": "o",
            "markersize": 3,
        }
        if contender == "copy":
            style.update(linestyle="--", marker="", linewidth=1)
        sizes = [elements for elements, _ in known]
        times.plot(sizes, [1e6 * group.median(contender) for _, group in known], **style)
        rates.plot(sizes, [1e9 * group.median(contender) / elements for elements, group in known], **style)
    for axes, title in ((times, "time of a call, µs"), (rates, "time per element, ns")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("elements")
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(True, which="major", color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
        _clean(axes)
    times.legend(fontsize=8, frameon=False)
    return figure


def memory(groups: list[Group]) -> Figure | None:
    """Draw bars of peak memory in the cases that compare memory."""
    groups = [group for group in groups if group.memory]
    rows = [(group, row, row.memory) for group in groups for row in group.rows.values() if row.memory]
    if not rows:
        return None
    figure = Figure(figsize=(8, 1.0 + 0.35 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for at, (_, row, peak) in enumerate(rows):
        colour = COLOURS["pyflow"] if row.contender.startswith("reversible") else COLOURS["eager"]
        axes.barh(at, peak / 1e6, height=0.7, color=colour)
        axes.annotate(size(peak), (peak / 1e6, at), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{group.name}: {row.contender}" for group, row, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title("peak memory of forward and backward, MB", fontsize=10, loc="left")
    _clean(axes)
    return figure


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
