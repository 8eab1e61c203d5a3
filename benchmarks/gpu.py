"""Times on a GPU, and the contenders that only a GPU has: its backends, and a mode of torch.compile.

The times are the replay of a CUDA graph with a cold L2 cache, and the wall time of a launched call.
A replay excludes Python, the dispatcher and kernel launches. Its lower limit is a graph with one small kernel: the rows
of the copies show it in small cases. torch.compile in the mode "reduce-overhead" replays graphs of its own, which
cannot be captured again: its times are those of launched calls.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

import pyflow
from pyflow import _backend

from .registry import REDUCED, Call, Case, Missing, compile_mode

BACKENDS = ("triton", "cuda")
# replays per round, each timed separately: the cache is flushed between them
REPLAYS = 10
WARM_UP = 3
# five times the L2 cache of an H100
FLUSH_BYTES = 1 << 28


class Sample(NamedTuple):
    """One round of a contender, per call: seconds, page faults, and on a GPU wall seconds of a launched call."""

    seconds: float
    faults: float = 0.0
    launch: float | None = None


class Gpu:
    """The CUDA calls behind `Clock`, on the current device."""

    def __init__(self) -> None:
        self.flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def capture(self, call: Callable[[], object]) -> Callable[[], None]:
        """Return a function that replays the call's kernels; raises if they cannot be captured."""
        stream, graph, pool = torch.cuda.Stream(), torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        stream.wait_stream(torch.cuda.current_stream())
        # this context restores the stream after a failed capture
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                call()
            self._refuse_synchronising(call)
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    call()
            except Exception:
                # some versions of torch leave the allocator in capture mode, in which empty_cache() raises
                with contextlib.suppress(AttributeError, RuntimeError):
                    torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
                raise
        torch.cuda.synchronize()
        return graph.replay

    def _refuse_synchronising(self, call: Callable[[], object]) -> None:
        """Raise if the call synchronises with the GPU, before the capture: a failed capture is hard to recover from."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def seconds(self, run: Callable[[], object], count: int) -> list[float]:
        """Return the GPU seconds of each of `count` runs."""
        pairs = []
        for _ in range(count):
            self.flushed.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free(self) -> None:
        """Free the memory of a case's contenders and their graphs."""
        gc.collect()
        torch.cuda.empty_cache()


class Clock:
    """Times one contender; with `capture` as the replay of a graph if that can be captured.

    Attributes:
        note: why launches are timed instead of a graph, or None.
    """

    def __init__(self, call: Callable[[], object], gpu: Gpu, capture: bool = True) -> None:
        self.call, self.gpu = call, gpu
        self.run: Callable[[], object] = call
        self.note: str | None = None
        if not capture:
            return
        try:
            self.run = gpu.capture(call)
        except Exception as why:
            # the exception says that the capture failed, its context says why
            cause = why.__context__ or why
            self.note = f"launches timed, no graph: {cause}".splitlines()[0]

    def sample(self, calls: int) -> Sample:
        """Time one round: the median over the replays, and the mean over `calls` launches."""
        return Sample(statistics.median(self.gpu.seconds(self.run, REPLAYS)), launch=self.launch(calls))

    def launch(self, calls: int) -> float:
        """Return the wall seconds per call of calls launched back to back: the larger of launch and run time."""
        self.call()  # fills torch's memory cache
        self.gpu.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            self.call()
        self.gpu.synchronize()
        return (time.perf_counter() - start) / calls


def reduced(case: Case, shape: tuple[int, ...], device: torch.device) -> Call:
    """Return a call that builds the case again at its first call, and runs "compile" in the mode `REDUCED`."""

    @functools.cache
    def built() -> Call:
        with compile_mode(REDUCED):
            call = case.build(shape, device).calls["compile"]
        # one call runs, one records: what is checked and timed replays
        call()
        call()
        return call

    return lambda: built()()


def other_backends(device: torch.device) -> list[str]:
    """Return the GPU backends other than "auto": both if it chooses by size, else those that cannot run."""
    if device.type != "cuda":
        return []
    return [name for name in BACKENDS if _backend.status()[name]] or list(BACKENDS)


@contextlib.contextmanager
def backend_of(name: str) -> Iterator[None]:
    """Choose the backend of the contender "pyflow <backend>"; other names change nothing."""
    chosen = name.partition(" ")[2]
    if chosen not in BACKENDS:
        yield
        return
    if missing := _backend.status()[chosen]:
        raise Missing(missing)
    with pyflow.backend(chosen):
        yield
