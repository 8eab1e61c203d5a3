"""`pyflow bench`: measure, print the table, write the JSON and the plots."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

from . import machine, registry, report

HERE = Path(__file__).resolve().parent
# --quick starts no case after this, so that it ends within two minutes on a slow or busy machine too
QUICK_SECONDS = 85


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pyflow bench`."""
    parser.add_argument("--quick", action="store_true", help="the main cases, within two minutes")
    parser.add_argument("--case", metavar="PATTERN", help="only cases whose name contains this (* and ? work)")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--threads", type=int, default=None, help="default: as many as torch uses")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--pages", choices=("fresh", "reused"), help="memory of results, for every case (default: as each case says)"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--budget", type=float, help="seconds of rounds per case (default 4, with --quick 0.8)")
    parser.add_argument("--out", type=Path, help="folder for the results (default: benchmarks/results in a checkout)")


def run(args: argparse.Namespace) -> int:
    """Measure what the options ask for; 0, or 1 where pyflow gave a wrong result or something broke."""
    cases = registry.select(args.case, args.quick, args.pages)
    if args.list:
        print(*(case.name for case in cases), sep="\n")
        return 0
    problem = _problem(args, cases)
    if problem:
        print(f"bench: {problem}", file=sys.stderr)
        return 2
    import pytest

    from .measure import Settings

    threads = args.threads or torch.get_num_threads()
    budget = args.budget or (0.8 if args.quick else 4.0)
    settings = Settings(args.device, threads, budget, not args.no_compile, args.pages)
    session = Session(cases, settings, QUICK_SECONDS if args.quick else float("inf"))
    out = args.out or (HERE / "results" if machine.checkout() else Path("pyflow-bench"))
    out.mkdir(parents=True, exist_ok=True)
    results = out / "bench.json"
    results.unlink(missing_ok=True)
    # none of the caller's pytest settings, none of pytest's own output
    options = ["-c", os.devnull, "--rootdir", str(HERE), "--import-mode=importlib", "-s"]
    options += ["-p", "no:terminal", "-p", "no:cacheprovider", "--benchmark-quiet", f"--benchmark-json={results}"]
    options.append(str(HERE / "bench_cases.py"))
    status = pytest.main(options, plugins=[session])
    if results.exists():
        report.write(json.loads(results.read_text()), out)
    else:
        print("bench: nothing could be measured", file=sys.stderr)
    for text in session.broken:
        print(text, file=sys.stderr)
    if status == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    return 1 if session.broken or not results.exists() else 0


def _problem(args: argparse.Namespace, cases: list[registry.Case]) -> str | None:
    """Why this cannot be run, in one sentence."""
    if not cases:
        return f"no case matches {args.case!r}; --list shows them all"
    if args.threads is not None and args.threads < 1:
        return f"--threads must be at least 1, got {args.threads}"
    if args.device == "cuda" and not torch.cuda.is_available():
        return "no GPU is available"
    try:
        import pytest_benchmark  # noqa: F401
    except ImportError:
        return "the package pytest-benchmark is not installed: pip install 'pyflow-kernels[bench]'"
    return None


class Session:
    """The pytest plugin of one run: which cases there are, their times, and what the JSON says beside them."""

    def __init__(self, cases: list[registry.Case], settings: object, seconds: float) -> None:
        # a heap that was told to keep its pages cannot be told to give them up
        self.cases = sorted(cases, key=lambda case: case.pages != "fresh")
        self.settings = settings
        self.end = time.perf_counter() + seconds
        self.measured: dict[str, object] = {}
        self.broken: list[str] = []
        self.bench = None

    def pytest_generate_tests(self, metafunc: object) -> None:
        from .measure import Bench

        self.bench = self.bench or Bench(self.settings)
        pairs = [(case, contender) for case in self.cases for contender in self.bench.contenders(case)]
        ids = [f"{case.name}: {contender}" for case, contender in pairs]
        metafunc.parametrize(("session", "case", "contender"), [(self, *pair) for pair in pairs], ids=ids)

    def times(self, case: registry.Case, contender: str) -> list[float]:
        import pytest

        if case.name not in self.measured:
            start = time.perf_counter()
            measured = self.measured[case.name] = self._measure(case)
            self._say(case, measured, time.perf_counter() - start)
            wrong = {name: why for name, why in measured.failed.items() if name.startswith("pyflow")}
            self.broken += [f"{case.name}: {name}: {why}" for name, why in wrong.items()]
        measured = self.measured[case.name]
        if contender not in measured.times:
            pytest.skip({**measured.missing, **measured.failed}.get(contender, "not part of this case"))
        return measured.times[contender]

    def _measure(self, case: registry.Case) -> object:
        from .measure import Measured

        if time.perf_counter() > self.end:
            return Measured(missing=dict.fromkeys(self.bench.contenders(case), "no time left"))
        return self.bench.measure(case)

    def _say(self, case: registry.Case, measured: object, seconds: float) -> None:
        medians = {name: statistics.median(times) for name, times in measured.times.items()}
        parts = [f"{name} {report.duration(medians[name])}" for name in case.contenders if name in medians]
        reasons = {**measured.missing, **measured.failed}
        parts += [f"{name}: {why}" for name, why in reasons.items()] if parts else sorted(set(reasons.values()))
        text = ", ".join(parts)
        print(f"[{len(self.measured)}/{len(self.cases)}] {case.name}: {text} ({seconds:.0f} s)", flush=True)

    def extra(self, case: registry.Case, contender: str) -> dict[str, object]:
        measured = self.measured[case.name]
        ready = measured.ready[contender]
        return {
            "case": case.name, "contender": contender, "memory": ready.memory, "calls": ready.calls,
            "error": ready.error, "faults": statistics.median(measured.faults[contender]),
        }  # fmt: skip

    def pytest_benchmark_update_machine_info(self, machine_info: dict) -> None:
        # the host's name is nobody's business
        machine_info.pop("node", None)

    def pytest_benchmark_update_json(self, output_json: dict) -> None:
        output_json["pyflow"] = {
            "header": machine.facts(self.settings.device, self.settings.threads, self._others()),
            "cases": [self._case(case) for case in self.cases if case.name in self.measured],
        }

    def _others(self) -> float | None:
        shares = [measured.others for measured in self.measured.values() if measured.others is not None]
        return statistics.median(shares) if shares else None

    def _case(self, case: registry.Case) -> dict[str, object]:
        from .measure import COPIES

        measured = self.measured[case.name]
        return {
            "name": case.name, "shape": case.shape, "pages": case.pages, "peer": case.peer, "compare": case.compare,
            "sweep": case.sweep, "bytes": measured.bytes, "flops": measured.flops, "others": measured.others,
            "memory": case.memory, "missing": {**measured.missing, **measured.failed},
            "contenders": [name for name in self.bench.contenders(case) if name not in COPIES or measured.bytes],
        }  # fmt: skip

    def pytest_runtest_logreport(self, report: object) -> None:
        if report.failed:
            self.broken.append(report.longreprtext)

    def pytest_collectreport(self, report: object) -> None:
        if report.failed:
            self.broken.append(report.longreprtext)

    def pytest_sessionfinish(self) -> None:
        if self.bench:
            self.bench.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m pyflow.benchmarks.run", description=__doc__)
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
