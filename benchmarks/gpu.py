"""Times on a GPU: a CUDA graph's replay with a cold L2 cache, and what a launched call takes by the wall clock.

A replay is what the GPU needs, without Python, the dispatcher and the launches. No replay is faster than that of a
graph with one small kernel: the copies' rows of a small case show that floor.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from .registry import Call

# replays in a round, each timed singly: the cache is flushed between them
REPLAYS = 10
WARM_UP = 3
# five times the L2 cache of an H100
FLUSH_BYTES = 1 << 28


class Sample(NamedTuple):
    """One round of a contender, per call: seconds, page faults, and on a GPU wall seconds when launched."""

    seconds: float
    faults: float = 0.0
    launch: float | None = None


class Gpu:
    """The CUDA calls behind `Clock`, on the current device."""

    def __init__(self) -> None:
        self.flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def capture(self, call: Call) -> Callable[[], None]:
        """What replays the call's kernels; raises where they cannot be captured."""
        stream, graph, pool = torch.cuda.Stream(), torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        stream.wait_stream(torch.cuda.current_stream())
        # restores the stream, which a failed capture does not
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                call()
            self._refuse_synchronising(call)
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    call()
            except Exception:
                # some versions of torch leave the allocator capturing, and empty_cache() then raises
                with contextlib.suppress(AttributeError, RuntimeError):
                    torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
                raise
        torch.cuda.synchronize()
        return graph.replay

    def _refuse_synchronising(self, call: Call) -> None:
        """Raises in a call that waits for the GPU: here, since a failed capture is hard to recover from."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def seconds(self, run: Callable[[], object], count: int) -> list[float]:
        """GPU seconds of each of `count` runs."""
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
        """Give back what the contenders of a case and their graphs held."""
        gc.collect()
        torch.cuda.empty_cache()


class Clock:
    """Times one contender.

    Attributes:
        note: why its time is that of launches, where no graph could be captured.
    """

    def __init__(self, call: Call, gpu: Gpu) -> None:
        self.call, self.gpu = call, gpu
        self.run: Callable[[], object] = call
        self.note: str | None = None
        try:
            self.run = gpu.capture(call)
        except Exception as why:
            # the end of a capture complains that the capture failed, its context says what failed
            cause = why.__context__ or why
            self.note = f"launches timed, no graph: {cause}".splitlines()[0]

    def sample(self, calls: int) -> Sample:
        """One round: the median of the replays, and of as many launches as `calls` says their mean."""
        return Sample(statistics.median(self.gpu.seconds(self.run, REPLAYS)), launch=self.launch(calls))

    def launch(self, calls: int) -> float:
        """Wall seconds of a call among calls launched back to back: the larger of launching and running it."""
        self.call()  # allocates what the others find in torch's cache
        self.gpu.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            self.call()
        self.gpu.synchronize()
        return (time.perf_counter() - start) / calls
