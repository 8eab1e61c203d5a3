"""Measure the cases of flow_program and peer_flows and write their tables: python -m pyflow.benchmarks.whole_flows

Beside the times stand the speed-ups over other packages, with those aimed at in parentheses, and which share of the
machine's multiply-add rate the matrix products of the networks reach. That is the highest rate of those measured before
and after every case.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pyflow import _native

from . import flow_program as flows
from . import peer_flows as peers
from . import registry, report
from .flow_program import Shape
from .report import Group

# speed-ups aimed at over normflows and over its torch.compile: forward, and a training step
AIMS: dict[Shape, tuple[tuple[float, float], tuple[float, float]]] = {
    (8, 64, 8, 256): ((4.0, 2.5), (3.0, 2.5)),
    (8, 64, 8, 4096): ((3.0, 2.2), (3.0, 3.0)),
    (32, 128, 8, 512): ((2.5, 1.8), (2.5, 2.5)),
    (32, 128, 8, 8192): ((2.3, 1.8), (2.0, 2.0)),
    (64, 256, 12, 2048): ((1.6, 1.3), (1.5, 2.0)),
}
PEERS = ("nflows", "zuko")
FAMILIES = ("flow_program/", "peer_flows/")
PEERS_HEAD = ("flow", "shape", "call", "as it is", "accelerated", "faster")
HEAD = ("shape", "call", "pyflow", "vs normflows", "vs compiled", "vs best other", "vs layers", "of the rate")
ROUND_SECONDS = 0.02


def multiply_add_rate(threads: int) -> float:
    """Return the multiply-adds per second that this many threads do in registers."""
    with ThreadPoolExecutor(threads) as pool:

        def run(rounds: int) -> tuple[float, int]:
            began = time.perf_counter()
            done = sum(pool.map(_native.multiply_adds, [rounds] * threads))
            return time.perf_counter() - began, done

        rounds = 1000
        while (took := run(rounds))[0] < ROUND_SECONDS:
            rounds *= 2
    seconds, done = took
    return done / seconds


def table(groups: list[Group], rate: float) -> str:
    """Return the cases of several rows as a table in markdown."""
    found = {group.name: group for group in groups}
    lines = ["| " + " | ".join(HEAD) + " |", "|---|---|" + "---:|" * (len(HEAD) - 2)]
    for shape in flows.SHAPES:
        for what in (*flows.FORWARD, *flows.TRAINING):
            group = found.get(flows.case_name(what, shape))
            if group is not None and not group.ours().reason:
                lines.append("| " + " | ".join(_cells(group, what, shape, found, rate)) + " |")
    return "\n".join(lines)


def _cells(group: Group, what: str, shape: Shape, found: dict[str, Group], rate: float) -> Iterator[str]:
    ours = group.ours()
    yield str(shape)
    yield what
    yield report.duration(ours.median)
    training = what in flows.TRAINING
    for over, aim in zip(("normflows", flows.COMPILED), AIMS[shape][training], strict=True):
        yield f"{_times(group.speedup(ours, over))} ({aim:g}x)"
    best = min(PEERS, key=lambda name: _last_if_nan(group.median(name)))
    yield f"{_times(group.speedup(ours, best))} ({best})"
    yield _times(group.speedup(ours, "pyflow layers"))
    forward, seconds = flows.multiply_adds(shape), ours.median
    # both gradients, and what is not kept
    backward = 2 * forward + flows.multiply_adds_again(shape)
    text = f"{(forward + backward * training) / seconds / rate:.0%}"
    alone = found.get(flows.case_name("log_prob", shape))
    if what == "log_prob+backward" and alone is not None and not alone.ours().reason:
        text += f", backward {backward / (seconds - alone.ours().median) / rate:.0%}"
    yield text


def one_row(groups: list[Group]) -> str:
    """Return the times of one row as a table in markdown."""
    names = list(flows.MAKERS)
    lines = ["| " + " | ".join((str(flows.ONE_ROW), *names)) + " |", "|---|" + "---:|" * len(names)]
    for what in flows.FORWARD:
        for group in groups:
            if group.name == flows.case_name(what, flows.ONE_ROW):
                lines.append(f"| {what} | " + " | ".join(report.duration(group.median(n)) for n in names) + " |")
    return "\n".join(lines)


def peers_table(groups: list[Group]) -> str:
    """Return the flows of other packages, as they are and fused, as a table in markdown."""
    found = {group.name: group for group in groups}
    lines = ["| " + " | ".join(PEERS_HEAD) + " |", "|---|---|---|" + "---:|" * (len(PEERS_HEAD) - 3)]
    for (kind, shape), aims in peers.AIMS.items():
        for what, aim in zip(peers.CALLS, aims, strict=True):
            group = found.get(peers.case_name(kind, what, shape))
            if group is None or aim is None or group.ours().reason:
                continue
            ours, own = group.ours(), peers.package(kind)
            faster = _times(group.speedup(ours, own)) + (f" ({aim:g}x)" if aim else "")
            times = report.duration(group.median(own)), report.duration(ours.median)
            lines.append("| " + " | ".join((kind, str(shape), what, *times, faster)) + " |")
    return "\n".join(lines)


def _times(ratio: float) -> str:
    return "–" if ratio != ratio else f"{ratio:.2f}x"


def _last_if_nan(value: float) -> float:
    return float("inf") if value != value else value


def write(results: dict[str, Any], rates: list[float], threads: int) -> str:
    """Return the header of a run and its tables."""
    groups, rate = report.groups_of(results), max(rates)
    facts = [f"{name}: {fact}  " for name, fact in results["pyflow"]["header"].items()]
    facts.append(
        f"multiply-adds of {threads} threads: {rate / 1e9:.0f} billion per second, "
        f"median of {len(rates)} measurements {statistics.median(rates) / 1e9:.0f}  "
    )
    notes = [f"- {text}" for text in report.remarks(groups)]
    return "\n".join((*facts, "", table(groups, rate), "", one_row(groups), "", peers_table(groups), "", *notes, ""))


def main() -> int:
    from .measure import Settings
    from .run import Session

    parser = argparse.ArgumentParser(prog="python -m pyflow.benchmarks.whole_flows", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's number")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds of measurement per case (default 4)")
    parser.add_argument("--case", default="", help="only cases whose name contains this: flow_program/, train step")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    parser.add_argument("--out", type=Path, help="file for the tables, which are printed too")
    args = parser.parse_args()
    cases = [case for case in registry.select(args.case) if case.name.startswith(FAMILIES)]
    session = Session(cases, Settings("cpu", args.threads, args.budget, not args.no_compile), float("inf"))
    rates = [multiply_add_rate(args.threads)]
    try:
        for case in session.cases:
            session.measure(case)
            rates.append(multiply_add_rate(args.threads))
        text = write(session.results(), rates, args.threads)
    finally:
        session.stop()
    print(text)
    if args.out:
        args.out.write_text(text)
    return 1 if session.broken else 0


if __name__ == "__main__":
    sys.exit(main())
