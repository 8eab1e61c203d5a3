"""Write the tables of docs/performance.md and its picture from the result files: python -m pyflow.benchmarks.pages

Every .md file of benchmarks/results that `pyflow bench` wrote, headed `# Two cores of a MACHINE`, is one run
on one machine. A table has one family, its rows come from every machine, newest run first. Raw results (.json) are
reduced to what benchmarks/report.py reads.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .registry import FRESH

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "speedup.png"
COLUMNS = ("eager", "torch.compile", "peer", "pyflow", "vs eager", "vs compile", "vs peer", "of copy")
HEAD = "| case | machine | " + " | ".join(COLUMNS) + " |\n|---|---|" + "---:|" * len(COLUMNS)
# cases of hsic_stats stand in the table of hsic
MERGED = {"hsic_stats": "hsic"}
# what the picture shows of the newest run that has it: case -> label
HEADLINES = {
    "coupling/forward": "affine coupling, (16384, 392)",
    "coupling/forward+backward": "affine coupling, forward + backward",
    "coupling/small forward": "affine coupling, (64, 32)",
    "spline/forward": "rational-quadratic spline, (16384, 8)",
    "spline/forward+backward": "spline, forward + backward",
    "flow_head/gaussian forward+backward": "Gaussian head, forward + backward",
    "fsq/8-5-5-5 forward": "FSQ (8,5,5,5), 1 M tokens",
    "fsq/256 tokens forward": "FSQ, 256 tokens",
    "hsic/4096 forward": "HSIC rbf, n = 4096, d = 64",
    "hsic/4096 forward+backward": "HSIC, forward + backward",
    "sde/step": "SDE step, (16, 3, 256, 256)",
    "sde/denoising loss": "denoising loss",
    "energy/mala step": "MALA step, (4096, 128)",
    "gan_qp/l1 forward+backward": "GAN-QP loss, forward + backward",
    "spectral/ResNet-50 forward": "spectral normalisation, ResNet-50",
}

# what a reduced result file keeps of an entry
EXTRA = ("case", "contender", "memory", "launch", "note", "error", "faults")
STATS = ("median", "iqr", "rounds")


@dataclass
class Entry:
    """One case on one machine."""

    case: str
    machine: str
    date: str
    cells: dict[str, str]


def entries(folder: Path) -> list[Entry]:
    """The cases of all result files, newest run first."""
    found = []
    for path in sorted(folder.glob("*.md")):
        text = path.read_text()
        title = re.match(r"# Two cores of an? (.*)\n", text)
        date = re.search(r"^date: ([\d-]+)", text, re.MULTILINE)
        if not title or not date:
            continue
        columns: list[str] = []
        for line in text.splitlines():
            if not line.startswith("|"):
                continue
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if cells[0] == "case":
                columns = cells
            elif not cells[0].startswith("---"):
                case = re.sub(r" \([\d, ]+\)$", "", cells[0])  # without the shape
                found.append(Entry(case, title[1], date[1], dict(zip(columns, cells, strict=True))))
    return sorted(found, key=lambda entry: entry.date, reverse=True)


def table(family: str, found: list[Entry]) -> str:
    """The cases of a family, cases together, newest run first."""
    rows: dict[str, list[str]] = {}
    for entry in found:
        name, _, case = entry.case.partition("/")
        if MERGED.get(name, name) != family:
            continue
        case, fresh = case.removesuffix(FRESH), case.endswith(FRESH)
        cells = [entry.cells.get(column, "–") for column in COLUMNS]
        machine = entry.machine + FRESH if fresh else entry.machine
        rows.setdefault(case, []).append(f"| {case} | {machine} | {' | '.join(cells)} |")
    return "\n".join([HEAD, *(row for case in rows.values() for row in case)])


def page(text: str, found: list[Entry]) -> str:
    """The page with each table between its markers replaced."""

    def replaced(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{table(match[1], found)}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", replaced, text, flags=re.DOTALL)


def picture(found: list[Entry], out: Path) -> None:
    """Bars: how many times faster pyflow is in the headline cases."""
    from matplotlib.figure import Figure

    from .plots import COLOURS

    kinds = {
        "vs eager": (COLOURS["eager"], "eager"),
        "vs compile": (COLOURS["compile"], "torch.compile"),
        "vs peer": (COLOURS["peer"], "peer"),
    }
    shown = [next((e for e in found if e.case == case), None) for case in HEADLINES]
    bars = [(label, e) for label, e in zip(HEADLINES.values(), shown, strict=True) if e]
    figure = Figure(figsize=(8, 0.9 + 0.42 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    for i, (_, entry) in enumerate(bars):
        for k, (column, (colour, _)) in enumerate(kinds.items()):
            cell = entry.cells.get(column, "–")
            if not cell.endswith("x"):
                continue
            ratio, at = float(cell[:-1]), i + (k - 1) * 0.26
            axes.barh(at, ratio - 1, left=1, height=0.24, color=colour)
            axes.annotate(
                f"{ratio:.2g}x" if ratio < 10 else f"{ratio:.0f}x", (max(ratio, 1), at), xytext=(3, 0),
                textcoords="offset points", va="center", fontsize=6.5, color="#b00020" if ratio < 1 else "black",
            )  # fmt: skip
    axes.set_yticks(range(len(bars)), [f"{label}\n{entry.machine}" for label, entry in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 5, 10, 20]
    axes.set_xlim(0.25, 40)
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("How many times faster pyflow is, two cores, float32", fontsize=10, loc="left")
    handles = [axes.barh(0, 0, left=1, color=colour, label=label) for colour, label in kinds.values()]
    axes.legend(handles=handles, loc="lower right", fontsize=8, frameon=False)
    figure.savefig(out, dpi=110)


def _rounded(value: Any) -> Any:
    """Round the numbers in a value to four digits; whole numbers are kept."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _line(value: Any) -> str:
    return json.dumps(_rounded(value), separators=(",", ":"))


def compact(results: dict[str, Any]) -> str:
    """A raw result file, one case or entry per line: what `report.groups_of` reads, and errors, faults and rounds."""
    pyflow = results["pyflow"]
    entries = []
    for entry in results["benchmarks"]:
        extra = {key: entry["extra_info"].get(key) for key in EXTRA}
        # only `memory` must be there
        extra = {key: value for key, value in extra.items() if value or key == "memory"}
        entries.append(_line({"extra_info": extra, "stats": {key: entry["stats"][key] for key in STATS}}))
    lines = [
        f'{{"datetime":{_line(results["datetime"])},', f'"pyflow":{{"header":{_line(pyflow["header"])},"cases":[',
        ",\n".join(map(_line, pyflow["cases"])), ']},"benchmarks":[', ",\n".join(entries), "]}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> int:
    for path in RESULTS.glob("*.json"):
        results = json.loads(path.read_text())
        # the demos write their figures beside these files
        if "benchmarks" in results:
            path.write_text(compact(results))
    found = entries(RESULTS)
    PAGE.write_text(page(PAGE.read_text(), found))
    picture(found, PICTURE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
