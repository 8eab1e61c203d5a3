"""`pyflow bench`: measure, print the table, write the JSON and the plots.

The JSON has pytest-benchmark's format, with additions under extra_info and "pyflow"; `pytest-benchmark compare` can
read it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import platform
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyflow.cli import Refused, check_writable

from . import machine, registry, report

if TYPE_CHECKING:
    from .measure import Measured, Settings

HERE = Path(__file__).resolve().parent
# seconds after which --quick starts no case, so that it ends within two minutes on a slow machine
QUICK_SECONDS = 85
# far above any machine; a count that is too large ends the process where threads cannot be made
MOST_THREADS = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `pyflow bench`."""
    parser.add_argument("--quick", action="store_true", help="only the main cases, within two minutes")
    parser.add_argument(
        "--gpu", action="store_true", help="only the cases for a GPU, with large tensors; implies --device cuda"
    )
    parser.add_argument("--case", metavar="PATTERN", help="only cases whose name contains this (* and ? work)")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's number)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--pages",
        choices=("fresh", "reused"),
        help="whether results get fresh or reused memory pages (default: as each case says)",
    )
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile in all its modes")
    parser.add_argument(
        "--budget", type=float, help="seconds of measurement per case (default 4, --quick 0.8, --gpu 1)"
    )
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="start no case after this time")
    parser.add_argument("--out", type=Path, help="folder for the results (default: benchmarks/results in a checkout)")


def run(args: argparse.Namespace) -> int:
    """Measure the chosen cases; returns 0, 1 if pyflow's result was wrong or it failed, 2 for wrong options."""
    if args.gpu:
        args.device = "cuda"
    cases = registry.select(args.case, args.quick, args.pages, args.gpu)
    if args.list:
        print(*(case.name for case in cases), sep="\n")
        return 0
    args.out = args.out or (HERE / "results" if machine.checkout() else Path("pyflow-bench"))
    problem = _problem(args, cases)
    if problem:
        print(f"bench: {problem}", file=sys.stderr)
        return 2
    from .measure import Settings

    threads = args.threads or torch.get_num_threads()
    budget = args.budget or (0.8 if args.quick else 1.0 if args.gpu else 4.0)
    settings = Settings(args.device, threads, budget, not args.no_compile, args.pages)
    seconds = (QUICK_SECONDS if args.quick else float("inf")) if args.timeout is None else args.timeout
    return measure(cases, settings, seconds, args.out)


def measure(cases: list[registry.Case], settings: Settings, seconds: float, out: Path) -> int:
    """Measure the cases, starting none after `seconds`; the files are rewritten after every case."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").unlink(missing_ok=True)
    session = Session(cases, settings, seconds)
    try:
        with _terminable():
            for case in session.cases:
                session.measure(case)
                report.save(session.results(), out)
    finally:
        if session.entries:
            report.write(session.results(), out)
        session.stop()
    if not session.entries:
        print("bench: nothing could be measured", file=sys.stderr)
    for text in session.broken:
        print(text, file=sys.stderr)
    return 1 if session.broken or not session.entries else 0


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _problem(args: argparse.Namespace, cases: list[registry.Case]) -> str | None:
    """Return why the options cannot be run, in one sentence, or None."""
    if not cases:
        return f"no case matches {args.case!r}; --list shows them all"
    if args.threads is not None and args.threads < 1:
        return f"--threads must be at least 1, got {args.threads}"
    if args.threads is not None and args.threads > MOST_THREADS:
        return f"--threads must be at most {MOST_THREADS}, got {args.threads}"
    for name in ("budget", "timeout"):
        seconds = getattr(args, name)
        if seconds is not None and not 0 < seconds < float("inf"):
            return f"--{name} must be positive and finite, got {seconds}"
    if args.device == "cuda" and not torch.cuda.is_available():
        return "no GPU is available"
    try:
        import pytest_benchmark  # noqa: F401
    except ImportError:
        return "the package pytest-benchmark is not installed: pip install 'pyflow-kernels[bench]'"
    names = ("bench.json", "bench.md", "speedup.png", "scaling.png", "memory.png")
    try:
        check_writable("a folder", args.out, [args.out], [args.out / name for name in names])
    except Refused as error:
        return str(error)
    return None


class Session:
    """One run: its cases, their measurements so far, and the results as JSON."""

    def __init__(self, cases: list[registry.Case], settings: Settings, seconds: float) -> None:
        from .measure import Bench

        # fresh first: an allocator set to keep its pages cannot be set back
        self.cases = sorted(cases, key=lambda case: case.pages != "fresh")
        self.settings = settings
        self.start = time.perf_counter()
        self.end = self.start + seconds
        self.bench = Bench(settings)
        self.measured: dict[str, Measured] = {}
        self.entries: list[dict[str, object]] = []
        self.broken: list[str] = []

    def measure(self, case: registry.Case) -> None:
        start = time.perf_counter()
        measured = self.measured[case.name] = self._measure(case)
        self.entries += [self._entry(case, name) for name in measured.times]
        self._say(case, measured, time.perf_counter() - start)
        wrong = {name: why for name, why in measured.failed.items() if name.startswith("pyflow")}
        self.broken += [f"{case.name}: {name}: {why}" for name, why in wrong.items()]

    def _measure(self, case: registry.Case) -> Measured:
        from .measure import NO_TIME, Measured, reason

        contenders = self.bench.contenders(case)
        if time.perf_counter() > self.end:
            return Measured(missing=dict.fromkeys(contenders, NO_TIME))
        try:
            return self.bench.measure(case, self._late())
        except Exception as why:  # a case that fails must not end the run
            return Measured(failed=dict.fromkeys(contenders, reason(why)))

    def _late(self) -> bool:
        """Whether the cases left, at the mean time of those measured, would not end in time."""
        now, done = time.perf_counter(), len(self.measured)
        return done > 0 and (now - self.start) / done * (len(self.cases) - done) > self.end - now

    def _say(self, case: registry.Case, measured: Measured, seconds: float) -> None:
        medians = {name: statistics.median(times) for name, times in measured.times.items()}
        parts = [f"{name} {report.duration(medians[name])}" for name in case.contenders if name in medians]
        reasons = {**measured.missing, **measured.failed}
        parts += [f"{name}: {why}" for name, why in reasons.items()] if parts else sorted(set(reasons.values()))
        text = ", ".join(parts)
        print(f"[{len(self.measured)}/{len(self.cases)}] {case.name}: {text} ({seconds:.0f} s)", flush=True)

    def results(self) -> dict[str, Any]:
        """Return the content of bench.json."""
        from pytest_benchmark import __version__
        from pytest_benchmark.utils import get_commit_info

        return {
            "version": __version__,
            "commit_info": get_commit_info(),
            "machine_info": {"system": platform.system(), "release": platform.release(), "machine": platform.machine()},
            "benchmarks": self.entries,
            "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
            "pyflow": {
                "header": machine.facts(self.settings.device, self.settings.threads, self._others()),
                "cases": [self._case(case) for case in self.cases if case.name in self.measured],
            },
        }

    def _entry(self, case: registry.Case, contender: str) -> dict[str, object]:
        measured = self.measured[case.name]
        ready, launches = measured.ready[contender], measured.launches.get(contender)
        extra = {
            "case": case.name, "contender": contender, "memory": ready.memory, "calls": ready.calls,
            "error": ready.error, "faults": statistics.median(measured.faults[contender]),
            "launch": statistics.median(launches) if launches else None, "note": ready.note,
        }  # fmt: skip
        name = f"{case.name}: {contender}"
        return {
            "group": case.name, "name": name, "fullname": name, "params": None, "param": None, "options": {},
            "extra_info": extra, "stats": stats(measured.times[contender], ready.calls),
        }  # fmt: skip

    def _others(self) -> float | None:
        shares = [measured.others for measured in self.measured.values() if measured.others is not None]
        return statistics.median(shares) if shares else None

    def _case(self, case: registry.Case) -> dict[str, object]:
        from .measure import COPIES

        measured = self.measured[case.name]
        return {
            "name": case.name, "shape": case.shape_on(torch.device(self.settings.device)), "pages": case.pages,
            "peer": case.peer, "compare": case.compare, "sweep": case.sweep, "bytes": measured.bytes,
            "flops": measured.flops, "others": measured.others, "memory": case.memory,
            "missing": {**measured.missing, **measured.failed},
            "contenders": [name for name in self.bench.contenders(case) if name not in COPIES or measured.bytes],
        }  # fmt: skip

    def stop(self) -> None:
        self.bench.stop()


def stats(times: list[float], calls: int) -> dict[str, object]:
    """Return pytest-benchmark's statistics of a contender's rounds."""
    from pytest_benchmark.stats import Stats

    found = Stats()
    for seconds in times:
        found.update(seconds)
    return {**found.as_dict(), "data": times, "iterations": calls}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m pyflow.benchmarks.run", description=__doc__)
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
