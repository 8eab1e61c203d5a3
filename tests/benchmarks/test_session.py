"""A run that ends early, by timeout, signal or error, keeps the results so far."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from pyflow.benchmarks import measure, registry, run


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Return a function (cases, seconds) that runs cases without worker processes and returns the status."""
    monkeypatch.setattr(measure, "_isas", lambda: [])
    monkeypatch.setattr(measure, "MIN_ROUNDS", 2)
    settings = measure.Settings(threads=torch.get_num_threads(), budget=0.0, compile=False)
    return lambda cases, seconds=math.inf: run.measure(cases, settings, seconds, tmp_path)


def _case(name, before=lambda: None):
    def build(shape, device):
        before()
        calls = dict.fromkeys(("eager", "pyflow"), lambda: (torch.ones(shape),))
        return registry.Problem(calls, lambda: (torch.ones(shape).double(),), 8)

    # any other value of `pages` leaves the allocator unchanged
    return registry.Case(f"coupling/{name}", build, (3,), (3,), pages="default")


def _names(folder):
    return [case["name"] for case in json.loads((folder / "bench.json").read_text())["pyflow"]["cases"]]


def test_files_are_written_after_every_case(bench, tmp_path):
    def look():
        assert _names(tmp_path) == ["coupling/first"]
        assert "| coupling/first (3) |" in (tmp_path / "bench.md").read_text()

    (tmp_path / "bench.json").write_text("of another run")
    assert bench([_case("first"), _case("second", look)]) == 0
    assert _names(tmp_path) == ["coupling/first", "coupling/second"]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_run_and_keep_the_results(number, bench, tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    # a shell starts background jobs with SIGINT ignored
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        bench([_case("first"), _case("second", lambda: os.kill(os.getpid(), number)), _case("third")])
    signal.signal(signal.SIGINT, interrupt)
    assert _names(tmp_path) == ["coupling/first"]
    # the table of the results so far
    assert "vs eager" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


def test_no_case_is_started_after_the_timeout(bench, tmp_path, capsys):
    assert bench([_case("first")], seconds=0) == 1
    captured = capsys.readouterr()
    assert "[1/1] coupling/first: no time left" in captured.out
    assert captured.err == "bench: nothing could be measured\n"
    assert _names(tmp_path) == ["coupling/first"]


def test_a_failing_case_does_not_end_the_run(bench, tmp_path, capsys, monkeypatch):
    real = measure.Bench.measure

    def breaks(self, case, late):
        return 1 / 0 if case.name == "coupling/first" else real(self, case, late)

    monkeypatch.setattr(measure.Bench, "measure", breaks)
    assert bench([_case("first"), _case("second")]) == 1
    captured = capsys.readouterr()
    assert "coupling/first: pyflow: ZeroDivisionError: division by zero" in captured.err
    assert "- coupling/first: not measured: ZeroDivisionError: division by zero" in (tmp_path / "bench.md").read_text()
    assert _names(tmp_path) == ["coupling/first", "coupling/second"]


def test_pytest_benchmark_compares_the_files(bench, tmp_path):
    assert bench([_case("first")]) == 0
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(tmp_path / "bench.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "coupling/first: pyflow" in done.stdout
