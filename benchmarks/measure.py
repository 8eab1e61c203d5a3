"""Check the result of each contender of a case, then time the contenders in turn.

A round times every contender once, in a new random order: changes in the machine's speed and in the state of the
allocator affect all contenders alike, so ratios hold even when absolute times vary. A time includes freeing the
result. Python's garbage collector is off during the rounds. `gpu` describes times on a GPU, `memory` the pages of large
results.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from pyflow import _backend, _native

from .gpu import Clock, Gpu, Sample, backend_of, other_backends, reduced
from .machine import cpu_seconds
from .memory import peak_memory, set_pages
from .registry import REDUCED, Call, Case, Missing, Outputs, Problem, all_cases

COPIES = ("copy", "warm copy")
NO_TIME = "no time left"
MIN_ROUNDS, MAX_ROUNDS = 10, 50
# long compared with the clock's resolution, and with what the first calls of a round cost more than those of a loop: a
# training step of 0.8 ms takes 1.4 ms the first time after another contender's, 0.9 ms the second (a Zen 5)
ROUND_SECONDS = 8e-3
SETTLE_SECONDS = 8e-3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
TOLERANCE |= {torch.int32: 1e-10, torch.int64: 1e-10}  # indices must be equal


@dataclass(frozen=True)
class Settings:
    device: str = "cpu"
    threads: int = 1
    # seconds of rounds per case; at least MIN_ROUNDS rounds are run
    budget: float = 4.0
    compile: bool = True
    # argument of `memory.set_pages`; None: as each case says
    pages: str | None = None


@dataclass
class Ready:
    """A contender whose result is right.

    Attributes:
        calls: calls per round; seconds: duration of a round.
        memory: peak extra bytes; error: largest error as a fraction of the allowed error.
        note: remark on how it is timed.
    """

    calls: int
    seconds: float
    memory: int | None
    error: float
    note: str | None = None


@dataclass
class Measured:
    """Measurements of a case by contender.

    Attributes:
        times: seconds per call in each round.
        faults: page faults per call in each round.
        launches: on a GPU, wall seconds per launched call in each round.
        ready: contenders whose result is right.
        missing: why a contender cannot run here.
        failed: why a contender has a wrong result or none.
        bytes: memory traffic, see `Problem`.
        flops: floating-point operations, see `Problem`.
        others: share of the machine's CPU time that other processes took during the rounds.
    """

    times: dict[str, list[float]] = field(default_factory=dict)
    faults: dict[str, list[float]] = field(default_factory=dict)
    launches: dict[str, list[float]] = field(default_factory=dict)
    ready: dict[str, Ready] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    bytes: int | None = None
    flops: int | None = None
    others: float | None = None

    def drop(self, name: str, why: str) -> None:
        """Replace the measurements of a contender by the reason why it has none."""
        for found in (self.times, self.faults, self.launches, self.ready):
            found.pop(name, None)
        self.failed[name] = why


class Runner:
    """The contenders of one case that run in this process."""

    def __init__(self, settings: Settings) -> None:
        self.device = torch.device(settings.device)
        self.calls: dict[str, Call] = {}
        self.gpu = Gpu() if self.device.type == "cuda" else None
        self.clocks: dict[str, Clock] = {}
        torch.set_num_threads(settings.threads)

    def prepare(self, case: Case, names: list[str]) -> Measured:
        """Build the case and check each contender's result."""
        set_pages(case.pages)
        if any(map(compiles, names)):
            # functions of many cases share code objects, and dynamo stops compiling after a few versions of one
            torch._dynamo.reset()
        try:
            problem = case.build(case.shape_on(self.device), self.device)
            judge = Judge(problem)
        except Missing as why:
            return Measured(missing=dict.fromkeys(names, str(why)))
        except Exception as why:
            return Measured(failed=dict.fromkeys(names, reason(why)))
        missing = {name: why for name, why in problem.missing.items() if name in names}
        result = Measured(bytes=problem.bytes, flops=problem.flops, missing=missing)
        self.calls = {name: call for name in names if (call := _call_of(name, problem, self.device))}
        if REDUCED in names and "compile" in self.calls:
            # last: a failed capture can leave the GPU's context unusable
            self.calls[REDUCED] = reduced(case, case.shape_on(self.device), self.device)
        elif REDUCED in names and "compile" in missing:
            missing[REDUCED] = missing["compile"]
        for name, call in self.calls.items():
            try:
                with backend_of(name):
                    error = 0.0 if name in COPIES else judge.error(name, call())
                    result.ready[name] = self._ready(name, call, error)
            except Missing as why:
                result.missing[name] = str(why)
            except Exception as why:  # report any failure in the contender's row
                result.failed[name] = reason(why)
        return result

    def _ready(self, name: str, call: Call, error: float) -> Ready:
        # graphs of torch.compile keep their memory between calls
        memory = None if name == REDUCED else peak_memory(call, self.device)
        if self.gpu:
            clock = self.clocks[name] = Clock(call, self.gpu, capture=name != REDUCED)
            calls = _calls_per_round(clock.launch(1))
            start = time.perf_counter()
            clock.sample(calls)
            return Ready(calls, time.perf_counter() - start, memory, error, clock.note)
        self._time(call, 1)
        calls = _calls_per_round(self._time(call, 1).seconds)
        seconds = self._time(call, calls).seconds
        return Ready(calls, (calls + 1) * seconds + SETTLE_SECONDS, memory, error)

    def time(self, name: str, calls: int) -> Sample:
        with backend_of(name):
            return self.clocks[name].sample(calls) if self.gpu else self._time(self.calls[name], calls)

    def _time(self, call: Call, calls: int) -> Sample:
        """Return seconds and page faults per call on a CPU."""
        # worker threads of the previous contender spin for a moment before they sleep
        time.sleep(SETTLE_SECONDS)
        call()  # wakes this contender's threads and warms the caches
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        for _ in range(calls):
            call()
        seconds = time.perf_counter() - start
        return Sample(seconds / calls, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls)

    def cpu_seconds(self) -> float:
        return time.process_time()

    def close(self) -> None:
        self.calls, self.clocks = {}, {}
        if self.gpu:
            self.gpu.free()


def compiles(name: str) -> bool:
    """Return whether a contender runs under torch.compile."""
    return name.endswith(("compile", "compiled"))


def _calls_per_round(seconds: float) -> int:
    return max(1, min(1000, round(ROUND_SECONDS / max(seconds, 1e-7))))


def reason(why: Exception) -> str:
    """Return an exception as one line."""
    return f"{type(why).__name__}: {why}".splitlines()[0]


def _call_of(name: str, problem: Problem, device: torch.device) -> Call | None:
    """Return the call of a contender, including those that the harness adds."""
    if name in COPIES:
        if not problem.bytes:
            return None
        # float32: bytes / 8 elements are read and as many written
        source = torch.ones(max(1, problem.bytes // 8), device=device)
        target = torch.empty_like(source)
        # one tensor, not a tuple: a copy's result is not checked
        copy: Any = source.clone if name == "copy" else lambda: target.copy_(source)
        return copy
    # another instruction set (this process is then its worker) or backend
    return problem.calls.get(name) or (problem.calls["pyflow"] if name.startswith("pyflow ") else None)


class Judge:
    """Compares results with the float64 reference; eager comes first, and its dtypes set the tolerances."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.shared = None if isinstance(problem.truth, Mapping) else _with_sizes(problem.truth())
        self.dtypes: list[torch.dtype] | None = None

    def error(self, name: str, outputs: Outputs) -> float:
        """Return the largest error as a fraction of the allowed error; raises ArithmeticError if it is above 1."""
        name = "compile" if name == REDUCED else name
        outputs = self.problem.forms.get(name, tuple)(outputs)
        truth_of = self.problem.truth
        truths = _with_sizes(truth_of[name]()) if isinstance(truth_of, Mapping) else self.shared or []
        self.dtypes = self.dtypes or [output.dtype for output in outputs]
        if len(outputs) != len(truths):
            raise ArithmeticError(f"{len(outputs)} results for {len(truths)}")
        worst = 0.0
        for index, (output, (truth, size), dtype) in enumerate(zip(outputs, truths, self.dtypes, strict=True)):
            if output.shape != truth.shape:
                raise ArithmeticError(f"result {index} has shape {tuple(output.shape)}, not {tuple(truth.shape)}")
            relative = output.detach().double().sub_(truth).abs_().div_(size)
            error = relative.nan_to_num_(nan=torch.inf).max().item() if relative.numel() else 0.0
            allowed = self.problem.tolerance or TOLERANCE[dtype]
            if error > allowed:
                raise ArithmeticError(f"result {index} is off by {error:.1e} (allowed {allowed:.0e})")
            worst = max(worst, error / allowed)
        return worst


def _with_sizes(truths: Outputs) -> list[tuple[Tensor, Tensor]]:
    """Return (truth, scale of its errors) for each truth."""
    truths = tuple(t.detach().double() for t in truths)
    return [(t, t.abs().add_(t.square().mean().sqrt()).clamp_min_(1e-30)) for t in truths]


def _isas() -> list[str]:
    """Return the compiled instruction sets other than the one in use."""
    return [isa for isa in _native.compiled_isas() if isa != _native.isa()]


class Worker:
    """A process that runs another instruction set, which can be chosen only once per process."""

    def __init__(self, isa: str, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, isa, settings), daemon=True)
        previous = os.environ.get("PYFLOW_CPU_ISA")
        os.environ["PYFLOW_CPU_ISA"] = isa
        try:
            self.process.start()
        finally:
            del os.environ["PYFLOW_CPU_ISA"]
            if previous is not None:
                os.environ["PYFLOW_CPU_ISA"] = previous

    def begin(self, case: Case, names: list[str]) -> None:
        """Start preparing a case; `prepared` waits for the result."""
        self.pipe.send(("prepare", case.name, names))

    def prepared(self) -> Measured:
        return self.pipe.recv()

    def time(self, name: str, calls: int) -> Sample:
        return self._ask("time", name, calls)

    def cpu_seconds(self) -> float:
        return self._ask("cpu_seconds")

    def close(self) -> None:
        # a signal to the process group may have ended the worker
        with suppress(OSError, EOFError):
            self._ask("close")

    def _ask(self, *message: object) -> Any:
        self.pipe.send(message)
        return self.pipe.recv()

    def stop(self) -> None:
        with suppress(OSError):
            self.pipe.send(None)
        self.process.join(10)


def _serve(pipe: Connection, isa: str, settings: Settings) -> None:
    # Ctrl-C reaches all processes of the terminal; only the harness handles it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    runner, cases = Runner(settings), all_cases(settings.pages)
    gc.disable()
    with suppress(EOFError):  # the harness was killed
        for action, *args in iter(pipe.recv, None):
            if action == "prepare":
                name, names = args
                if _native.isa() != isa or _backend.cpu_missing:
                    pipe.send(Measured(missing=dict.fromkeys(names, f"this CPU does not run {isa}")))
                else:
                    pipe.send(runner.prepare(cases[name], names))
            else:
                pipe.send(getattr(runner, action)(*args))


class Bench:
    """Measures cases; keeps its workers between cases."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.local = Runner(settings)
        self.workers = {isa: Worker(isa, settings) for isa in _isas()} if settings.device == "cpu" else {}

    def contenders(self, case: Case) -> list[str]:
        """Return the contenders of the case and of the harness, in the order of the report."""
        names = [name for name in case.contenders if self.settings.compile or not compiles(name)]
        if self.local.gpu and "compile" in names:
            names.insert(names.index("compile") + 1, REDUCED)
        if "pyflow" in names:
            at = names.index("pyflow") + 1
            names[at:at] = [f"pyflow {other}" for other in (*self.workers, *other_backends(self.local.device))]
        return [*names, *COPIES]

    def measure(self, case: Case, late: bool = False) -> Measured:
        """Measure all contenders of a case in turn; `late`: without those that the run has no time for."""
        contenders = self.contenders(case)
        names = [name for name in contenders if not (late and name == REDUCED)]
        places: dict[str, Runner | Worker] = {
            name: self.workers.get(name.partition(" ")[2], self.local) for name in names
        }
        for worker in self.workers.values():
            worker.begin(case, [name for name in names if places[name] is worker])
        result = self.local.prepare(case, [name for name in names if places[name] is self.local])
        result.missing |= {name: NO_TIME for name in contenders if name not in names}
        for worker in self.workers.values():
            theirs = worker.prepared()
            result.ready |= theirs.ready
            result.missing |= theirs.missing
            result.failed |= theirs.failed
        runs = [name for name in names if name in result.ready]
        result.times = {name: [] for name in runs}
        result.faults = {name: [] for name in runs}
        one_round = sum(ready.seconds for ready in result.ready.values())
        rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(self.settings.budget / max(one_round, 1e-3))))
        processes: tuple[Runner | Worker, ...] = (self.local, *self.workers.values())
        before, ours = cpu_seconds(), sum(place.cpu_seconds() for place in processes)
        gc.collect()
        gc.disable()
        try:
            for index in range(rounds):
                for name in random.Random(index).sample(runs, len(runs)):
                    try:
                        sample = places[name].time(name, result.ready[name].calls)
                    except Exception as why:  # the case stays without this contender
                        runs.remove(name)
                        result.drop(name, reason(why))
                        continue
                    result.times[name].append(sample.seconds)
                    result.faults[name].append(sample.faults)
                    if sample.launch is not None:
                        result.launches.setdefault(name, []).append(sample.launch)
            after, ours = cpu_seconds(), sum(place.cpu_seconds() for place in processes) - ours
            if before and after and after[1] > before[1]:
                result.others = max(0.0, (after[0] - before[0] - ours) / (after[1] - before[1]))
        finally:
            gc.enable()
            for place in processes:
                place.close()
        return result

    def stop(self) -> None:
        for worker in self.workers.values():
            worker.stop()
