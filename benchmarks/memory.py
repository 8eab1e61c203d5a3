"""Fresh or reused memory pages for large results, and the peak memory of a call.

Above a threshold glibc maps new memory for every allocation, and the kernel clears each page at first touch; below it,
freed memory is reused. glibc adapts the threshold (128 KB to 32 MB), so times would depend on the history of the
process: on a 2-core Zen 4 with 4 KB pages, torch.compile of the reference took 8.6 ms with reused and 25 ms with fresh
pages for the forward case at (16384, 392). Each case therefore names its kind of pages, and `set_pages` sets the
allocator to it. Huge pages are left to the system and the contender: glibc and torch do not ask for them by default,
pyflow's operators do for results of 4 MB and more (that case with fresh pages: 16 ms without, 7 ms with huge pages).
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

# silence the profiler, which logs every start and stop
os.environ.setdefault("KINETO_LOG_LEVEL", "9")

import torch

from .registry import Call


def set_pages(kind: str) -> None:
    """Set the allocator: "fresh" maps new pages for results over 128 KB, "reused" never returns freed memory.

    Does nothing without glibc. "fresh" has no effect after "reused", whose heap keeps serving large results.
    """
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    if kind == "fresh":
        mallopt(mmap_threshold, 128 * 1024)
        mallopt(trim_threshold, 128 * 1024)
    elif kind == "reused":
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def peak_memory(call: Call, device: torch.device) -> int:
    """Return the peak of bytes that torch's allocator holds during a call, beyond those held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=False) as profile:
        call()
    live = peak = 0
    profiler: Any = profile.profiler
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
