"""Reports of a run: JSON, and from it a table in the terminal, a table in markdown, and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .registry import REDUCED

COLUMNS = ("time", "IQR", "vs eager", "vs compile", "vs peer", "of copy", "of warm copy", "GFLOP/s", "memory")
# additional column on a GPU: wall time of a launched call, while "time" is the replay of a graph
LAUNCH = "launch"
# share of CPU time taken by other processes above which the report warns
BUSY = 0.1


@dataclass
class Row:
    """One contender of a case; `reason` says why it has no numbers."""

    contender: str
    median: float = math.nan
    iqr: float = math.nan
    memory: int | None = None
    reason: str | None = None
    # on a GPU: wall seconds of a launched call, and a remark on how the time was measured
    launch: float = math.nan
    note: str | None = None


@dataclass
class Group:
    """One case and its rows in the order of the report."""

    name: str
    pages: str
    peer: str | None
    compare: list[list[str]]
    sweep: int | None
    memory: bool
    bytes: int | None
    flops: int | None
    others: float | None
    shape: list[int] | None = None
    rows: dict[str, Row] = field(default_factory=dict)

    def title(self) -> str:
        return f"{self.name} ({', '.join(map(str, self.shape))})" if self.shape else self.name

    def median(self, contender: str | None) -> float:
        row = self.rows.get(contender or "")
        return row.median if row else math.nan

    def speedup(self, row: Row, over: str | None) -> float:
        """Return how many times faster the row is than another contender; NaN if one has no time."""
        return self.median(over) / row.median

    def ours(self) -> Row:
        return self.rows.get("pyflow", Row("pyflow"))


def groups_of(results: dict[str, Any]) -> list[Group]:
    """Return the cases of a result file in the order of their declaration."""
    rows: dict[str, dict[str, Row]] = {}
    for entry in results["benchmarks"]:
        extra, stats = entry["extra_info"], entry["stats"]
        row = Row(extra["contender"], stats["median"], stats["iqr"], extra["memory"], note=extra.get("note"))
        if extra.get("launch") is not None:
            row.launch = extra["launch"]
        rows.setdefault(extra["case"], {})[row.contender] = row
    groups = []
    for case in results["pyflow"]["cases"]:
        keys = ("name", "pages", "peer", "compare", "sweep", "memory", "bytes", "flops", "others")
        group = Group(**{key: case[key] for key in keys}, shape=case.get("shape"))
        for contender in case["contenders"]:
            why = case["missing"].get(contender, "not part of this case")
            group.rows[contender] = rows.get(case["name"], {}).get(contender, Row(contender, reason=why))
        groups.append(group)
    return groups


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    if math.isnan(seconds):
        return "–"
    unit, factor = next((u for u in (("s", 1), ("ms", 1e3)) if seconds * u[1] >= 1), ("µs", 1e6))
    return f"{_digits(seconds * factor)} {unit}"


def size(count: int | None) -> str:
    if count is None:
        return "–"
    unit, factor = next((u for u in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)) if count >= u[1]), ("B", 1))
    return f"{_digits(count / factor)} {unit}"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 or value == 0 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _times(ratio: float) -> str:
    return "–" if math.isnan(ratio) else f"{ratio:.2f}x"


def _percent(ratio: float) -> str:
    return "–" if math.isnan(ratio) else f"{ratio:.0%}"


def cells(group: Group, row: Row) -> list[str]:
    """Return the columns of one row as text."""
    return [
        duration(row.median),
        duration(row.iqr),
        _times(group.speedup(row, "eager")),
        _times(group.speedup(row, "compile")),
        _times(group.speedup(row, group.peer)),
        _percent(group.speedup(row, "copy")),
        _percent(group.speedup(row, "warm copy")),
        _digits(group.flops / row.median / 1e9) if group.flops else "–",
        size(row.memory),
    ]


def _line(group: Group, row: Row) -> list[str]:
    return [*cells(group, row), duration(row.launch)]


def comparisons(group: Group) -> Iterator[str]:
    """Yield a sentence for each pair of contenders that the case compares."""
    for one, other in group.compare:
        first, second = group.rows.get(one), group.rows.get(other)
        if not first or not second or first.reason or second.reason:
            continue
        text = f"{one} takes {first.median / second.median:.2f}x the time of {other}"
        if group.memory and first.memory is not None and second.memory:
            text += f" and {first.memory / second.memory:.2f}x its memory"
        yield text


def used_columns(groups: list[Group]) -> list[int]:
    """Return the indices of the columns that are not empty."""
    table = [_line(group, row) for group in groups for row in group.rows.values() if not row.reason]
    return [i for i in range(len(COLUMNS) + 1) if any(line[i] != "–" for line in table)]


def print_table(results: dict[str, Any]) -> None:
    """Print all contenders of all cases, with rich if it is installed."""
    header = "\n".join(f"{name}: {fact}" for name, fact in results["pyflow"]["header"].items())
    groups = groups_of(results)
    keep = used_columns(groups)
    titles = [(*COLUMNS, LAUNCH)[i] for i in keep]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(header)
        _print_plain(groups, keep, titles)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for group in groups:
        table.add_row(f"[bold]{group.name}[/bold]")
        for row in group.rows.values():
            if not row.reason:
                columns = _line(group, row)
                style = "green" if row.contender == "pyflow" else None
                table.add_row(f"  {row.contender}", *(columns[i] for i in keep), style=style)
    print(header)
    # in a pipe rich assumes 80 columns, which cuts the table
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)
    print(*remarks(groups), sep="\n")


def _print_plain(groups: list[Group], keep: list[int], titles: list[str]) -> None:
    print(" " * 26 + "".join(f"{title:>14}" for title in titles))
    for group in groups:
        print(group.name)
        for row in group.rows.values():
            if not row.reason:
                columns = _line(group, row)
                print(f"  {row.contender:<24}" + "".join(f"{columns[i]:>14}" for i in keep))
    print(*remarks(groups), sep="\n")


def remarks(groups: list[Group]) -> Iterator[str]:
    for group in groups:
        for text in comparisons(group):
            yield f"{group.name}: {text}"
    missing: dict[tuple[str, str], list[str]] = {}
    for group in groups:
        reasons = {row.contender: row.reason for row in group.rows.values() if row.reason}
        if len(reasons) == len(group.rows) and len(set(reasons.values())) == 1:
            yield f"{group.name}: not measured: {next(iter(reasons.values()))}"
        else:
            for each in reasons.items():
                missing.setdefault(each, []).append(group.name)
        yield from (f"{group.name}: {row.contender}: {row.note}" for row in group.rows.values() if row.note)
    for (name, why), cases in missing.items():
        yield f"{cases[0] if len(cases) == 1 else f'{len(cases)} cases'}: no number for {name}: {why}"
    busy = [group.others for group in groups if group.others is not None and group.others > BUSY]
    if busy:
        yield (
            f"other processes took up to {max(busy):.0%} of the CPU, more than {BUSY:.0%} in {len(busy)} of "
            f"{len(groups)} cases: do not trust these numbers"
        )


def markdown(results: dict[str, Any]) -> str:
    """Return a markdown table with one line per case."""
    groups = groups_of(results)
    reduced = [REDUCED] if any(REDUCED in group.rows for group in groups) else []
    launched = any(not math.isnan(row.launch) for group in groups for row in group.rows.values())
    launches = ["eager", *reduced, "pyflow"] if launched else []
    head = ["case", "eager", "torch.compile", *reduced, "peer", "pyflow"]
    head += ["vs eager", "vs compile", "vs peer", "of copy"]
    head += ["memory, eager", "memory, pyflow", *(f"{LAUNCH}, {name}" for name in launches)]
    lines = [f"{name}: {fact}  " for name, fact in results["pyflow"]["header"].items()]
    lines += ["", "| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for group in groups:
        if group.memory or group.sweep or group.ours().reason:
            continue
        ours, eager = group.ours(), group.rows.get("eager", Row("eager"))
        peer = duration(group.median(group.peer)) + (f" ({group.peer})" if group.peer else "")
        columns = (
            group.title(), duration(eager.median), duration(group.median("compile")),
            *(duration(group.median(name)) for name in reduced), peer, duration(ours.median),
            _times(group.speedup(ours, "eager")), _times(group.speedup(ours, "compile")),
            _times(group.speedup(ours, group.peer)), _percent(group.speedup(ours, "copy")), size(eager.memory),
            size(ours.memory), *(duration(group.rows.get(name, Row(name)).launch) for name in launches),
        )  # fmt: skip
        lines.append("| " + " | ".join(columns) + " |")
    lines += ["", *(f"- {text}" for text in remarks(groups)), ""]
    return "\n".join(lines)


def save(results: dict[str, Any], out: Path) -> None:
    """Write bench.json and bench.md atomically: a run that is killed leaves the previous files."""
    for name, text in (("bench.json", json.dumps(results, indent=1)), ("bench.md", markdown(results))):
        part = out / f"{name}.part"
        part.write_text(text)
        part.replace(out / name)


def write(results: dict[str, Any], out: Path) -> None:
    """Print the table; write bench.md and the plots beside bench.json."""
    print_table(results)
    (out / "bench.md").write_text(markdown(results))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no plots: the package matplotlib is not installed")
        return
    from . import plots

    plots.write(groups_of(results), results["pyflow"]["header"], out)
    print(f"written to {out}")
