"""The cases for a GPU, and timing on a GPU with a stand-in for CUDA."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch

from pyflow._operators import OPERATORS
from pyflow.benchmarks import gpu, measure, registry, report, run

CASES = {case.name: case for case in registry.select(gpu=True)}
LAUNCHED = "launches timed, no graph: "


def test_gpu_selects_cases_with_a_gpu_shape():
    families = {name.partition("/")[0] for name in CASES}
    without = {operator.family for operator in OPERATORS.values() if not (operator.triton or operator.cuda)}
    # hsic_stats synchronises with the host, sector returns one number; peers of peer_flows are measured on a CPU
    assert families == set(registry.FAMILIES) - {"hsic_stats", "sector", "peer_flows"} - without
    assert 12 <= len(CASES) <= 21
    assert CASES["coupling/small forward"].gpu == (64, 32)
    assert not any(name.endswith(registry.FRESH) for name in CASES)
    assert [case.name for case in registry.select("noise", gpu=True)] == ["noise/normal"]


@pytest.mark.parametrize("name", CASES)
def test_gpu_cases_build(name, monkeypatch):
    """At its tiny shape, and at its GPU shape on the meta device, which rejects CPU tensors."""
    case = CASES[name]
    assert len(case.gpu) == len(case.shape)
    tiny = case.build(case.tiny, torch.device("cpu"))
    assert {"eager", "pyflow"} <= set(tiny.calls)
    monkeypatch.setattr(registry, "generator", lambda device: None)
    meta = torch.device("meta")
    problem = case.build(case.gpu, meta)
    truth = problem.truth["pyflow"] if isinstance(problem.truth, dict) else problem.truth
    for call in (problem.calls["eager"], problem.calls["pyflow"], truth):
        assert {result.device for result in call()} == {meta}


def test_the_gpu_shape_is_used_on_a_gpu():
    case = registry.Case("coupling/x", None, (3,), (1,), gpu=(5,))
    assert case.shape_on(torch.device("cpu")) == (3,)
    assert case.shape_on(torch.device("cuda")) == (5,)
    assert dataclasses.replace(case, gpu=None).shape_on(torch.device("cuda")) == (3,)


@pytest.mark.parametrize("missing, named", [((), ["triton", "cuda"]), (("triton",), ["triton"]), (("cuda",), ["cuda"])])
def test_both_backends_are_measured_where_auto_chooses_by_size(missing, named, monkeypatch):
    status = {name: "absent" if name in missing else None for name in ("triton", "cuda")}
    monkeypatch.setattr(gpu._backend, "status", lambda: status)
    assert gpu.other_backends(torch.device("cuda")) == named
    assert gpu.other_backends(torch.device("cpu")) == []


class FakeGpu:
    """A replay takes 1 ms, a launch 2 ms; calls with the attribute `refuses` cannot be captured."""

    def __init__(self):
        self.freed = 0

    def capture(self, call):
        if getattr(call, "refuses", False):
            try:
                raise RuntimeError("called a synchronizing CUDA operation\nand more")
            finally:
                raise RuntimeError("the capture was invalidated")
        return SimpleNamespace(replay=call)

    def seconds(self, run, count):
        return [1e-3 if isinstance(run, SimpleNamespace) else 2e-3] * count

    def synchronize(self):
        pass

    def free(self):
        self.freed += 1


def test_the_clock_replays_a_graph():
    counted = []
    clock = gpu.Clock(lambda: counted.append(1), FakeGpu())
    sample = clock.sample(5)
    assert (clock.note, sample.seconds, sample.faults) == (None, 1e-3, 0)
    assert 0 < sample.launch < 1
    # five launches after one warm-up call; replays are not calls
    assert len(counted) == 6


def test_without_a_graph_the_clock_times_launches_and_says_why():
    def call():
        pass

    call.refuses = True
    clock = gpu.Clock(call, FakeGpu())
    assert clock.note == LAUNCHED + "called a synchronizing CUDA operation"
    assert clock.sample(1).seconds == 2e-3


@pytest.fixture
def session(monkeypatch, tmp_path):
    """Return a function (cases, seconds) that runs cases on the stand-in, without worker processes."""
    monkeypatch.setattr(measure, "_isas", lambda: [])
    monkeypatch.setattr(measure, "MIN_ROUNDS", 3)

    class OnGpu(measure.Runner):
        def __init__(self, settings):
            super().__init__(settings)
            self.gpu = FakeGpu()

    monkeypatch.setattr(measure, "Runner", OnGpu)
    settings = measure.Settings(threads=torch.get_num_threads(), budget=0.0, compile=False)
    return lambda cases, seconds=math.inf, **more: run.measure(
        cases, dataclasses.replace(settings, **more), seconds, tmp_path
    )


def _case(name="coupling/x", **more):
    def build(shape, device):
        def eager():
            return (torch.ones(shape),)

        eager.refuses = True
        calls = {"eager": eager, "pyflow": lambda: (torch.ones(shape),)}
        return registry.Problem(calls, lambda: (torch.ones(shape).double(),), 8, **more)

    # any other value of `pages` leaves the allocator unchanged
    return registry.Case(name, build, (3,), (3,), pages="default")


def test_replays_launches_and_remarks_are_reported(session, tmp_path, capsys):
    assert session([_case()]) == 0
    results = json.loads((tmp_path / "bench.json").read_text())
    extras = {entry["extra_info"]["contender"]: entry["extra_info"] for entry in results["benchmarks"]}
    assert extras["eager"]["note"] == LAUNCHED + "called a synchronizing CUDA operation"
    assert extras["pyflow"]["note"] is None
    assert all(extra["launch"] > 0 for extra in extras.values())
    (group,) = report.groups_of(results)
    assert (group.median("eager"), group.median("pyflow")) == (2e-3, 1e-3)
    remark = f"coupling/x: eager: {LAUNCHED}called a synchronizing CUDA operation"
    page = (tmp_path / "bench.md").read_text()
    assert f"- {remark}\n" in page
    assert " | launch, eager | launch, pyflow |\n" in page
    printed = capsys.readouterr().out
    assert remark in printed
    assert " launch" in printed


def _compiling(fails_at=math.inf, missing=None):
    """A case whose "compile" counts its calls by mode, and fails in the mode of the harness from one of them on."""
    counted = []

    def build(shape, device):
        problem = _case().build(shape, device)
        mode = registry._mode

        def compiled():
            counted.append(mode)
            if counted.count("reduce-overhead") >= fails_at:
                raise RuntimeError("cannot be captured\nand more")
            return (torch.ones(shape),)

        if missing:
            problem.missing["compile"] = missing
        else:
            problem.calls["compile"] = compiled
        return problem

    return dataclasses.replace(_case(), build=build), counted


def _columns(page):
    head, _, *rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_reduce_overhead_has_a_column_beside_compile(session, tmp_path):
    case, counted = _compiling()
    assert session([case], compile=True) == 0
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results["pyflow"]["cases"][0]["contenders"][:4] == ["eager", "compile", "reduce-overhead", "pyflow"]
    entries = {entry["extra_info"]["contender"]: entry for entry in results["benchmarks"]}
    # launched, because it replays graphs of its own; without a remark in every case
    reduced = entries["reduce-overhead"]
    assert (reduced["stats"]["median"], reduced["extra_info"]["note"]) == (2e-3, None)
    assert (entries["compile"]["stats"]["median"], entries["compile"]["extra_info"]["note"]) == (1e-3, None)
    assert reduced["extra_info"]["launch"] > 0 and reduced["extra_info"]["memory"] is None
    assert set(counted) == {None, "reduce-overhead"} and registry._mode is None
    page = (tmp_path / "bench.md").read_text()
    assert "| eager | torch.compile | reduce-overhead | peer |" in page
    (columns,) = _columns(page)
    assert (columns["torch.compile"], columns["reduce-overhead"]) == ("1.00 ms", "2.00 ms")
    assert columns["launch, reduce-overhead"] != "–"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"fails_at": 1}, "RuntimeError: cannot be captured"),
        # in the second round
        ({"fails_at": 10}, "RuntimeError: cannot be captured"),
        ({"missing": "takes minutes"}, "takes minutes"),
    ],
)
def test_without_reduce_overhead_the_case_stays(options, why, session, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_calls_per_round", lambda seconds: 1)
    case, counted = _compiling(**options)
    assert session([case], compile=True) == 0
    assert counted.count("reduce-overhead") == options.get("fails_at", 0)
    page = (tmp_path / "bench.md").read_text()
    (columns,) = _columns(page)
    assert (columns["reduce-overhead"], columns["launch, reduce-overhead"], columns["pyflow"]) == ("–", "–", "1.00 ms")
    assert f"- coupling/x: no number for reduce-overhead: {why}\n" in page


def test_reduce_overhead_is_left_out_without_compile_or_time(session, tmp_path, monkeypatch):
    case, counted = _compiling()
    assert session([case]) == 0
    assert not counted and "reduce-overhead" not in (tmp_path / "bench.md").read_text()
    monkeypatch.setattr(run.Session, "_late", lambda self: True)
    assert session([case], compile=True) == 0
    assert set(counted) == {None}
    page = (tmp_path / "bench.md").read_text()
    assert _columns(page)[0]["torch.compile"] == "1.00 ms"
    assert "- coupling/x: no number for reduce-overhead: no time left\n" in page


def test_a_run_is_late_when_the_cases_left_take_longer_than_the_time_left(monkeypatch):
    clock = SimpleNamespace(perf_counter=lambda: 30.0)
    monkeypatch.setattr(run, "time", clock)
    # 10 s a case: 7 cases left take 70 s
    state = SimpleNamespace(start=0.0, cases=[None] * 10, measured=[None] * 3)
    late = [run.Session._late(SimpleNamespace(**vars(state), end=end)) for end in (99, 101, math.inf)]
    assert late == [True, False, False]
    state.measured = []
    assert not run.Session._late(SimpleNamespace(**vars(state), end=31))


def test_cases_are_compiled_in_the_mode_of_the_harness(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: seen.append(options["mode"]))
    with registry.compile_mode("reduce-overhead"):
        registry.compiled(len)
    registry.compiled(len)
    assert seen == ["reduce-overhead", None]


def test_no_launch_column_without_launches():
    row = report.Row("eager", 1.0, 0.1)
    group = report.Group("x", "reused", None, [], None, False, 8, None, None, rows={"eager": row})
    assert len(report.COLUMNS) not in report.used_columns([group])
    row.launch = 1e-5
    assert len(report.COLUMNS) in report.used_columns([group])


def test_memory_is_freed_after_every_case(monkeypatch):
    monkeypatch.setattr(measure, "_isas", lambda: [])
    bench = measure.Bench(measure.Settings(threads=torch.get_num_threads(), budget=0.0, compile=False))
    bench.local.gpu = FakeGpu()
    for freed in (1, 2):
        assert set(bench.measure(_case()).times) == {"eager", "pyflow", "copy", "warm copy"}
        assert bench.local.gpu.freed == freed
        assert not bench.local.calls and not bench.local.clocks


class FakeCuda:
    """The part of torch.cuda that `gpu.Gpu` uses; records the calls."""

    def __init__(self, fails=""):
        self.done, self.mode, self.fails = [], "default", fails
        self.CUDAGraph = lambda: SimpleNamespace(replay=lambda: self.done.append("replay"))
        self.Stream = lambda: SimpleNamespace(wait_stream=lambda other: None)
        self.current_stream = self.current_device = self.graph_pool_handle = self.synchronize = lambda: None

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    @contextlib.contextmanager
    def stream(self, stream):
        try:
            yield
        finally:
            self.done.append("left the stream")

    @contextlib.contextmanager
    def graph(self, graph, pool, stream):
        self.done.append("capture")
        yield
        if self.fails == "capture":
            raise RuntimeError("the capture was invalidated")

    def call(self):
        if self.mode == "error" and self.fails == "sync":
            raise RuntimeError("called a synchronizing CUDA operation")
        self.done.append("call")


@pytest.mark.parametrize(
    ("fails", "done"),
    [
        ("", [*["call"] * 4, "capture", "call", "left the stream"]),
        ("sync", [*["call"] * 3, "left the stream"]),
        ("capture", [*["call"] * 4, "capture", "call", "pool ended", "left the stream"]),
    ],
)
def test_capture_cleans_up_after_failures(fails, done, monkeypatch):
    cuda = FakeCuda(fails)

    def end(device, pool):
        cuda.done.append("pool ended")
        # newer torch has ended the pool already
        raise RuntimeError("not recording")

    fake = SimpleNamespace(cuda=cuda, _C=SimpleNamespace(_cuda_endAllocateToPool=end))
    monkeypatch.setattr(gpu, "torch", fake)
    refused = pytest.raises(RuntimeError, match=r"invalidated|synchronizing") if fails else contextlib.nullcontext()
    with refused:
        gpu.Gpu.capture(object.__new__(gpu.Gpu), cuda.call)()
    assert [step for step in cuda.done if step != "replay"] == done
    assert ("replay" in cuda.done) == (not fails)
    assert cuda.mode == "default"
