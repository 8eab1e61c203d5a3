"""Where the pages of a large result come from, and how much memory a call takes.

A large result is new memory, and what that costs is the allocator's business: glibc maps anything above
its threshold anew at every call, and the kernel then clears each page at first touch; below it, memory that was
freed is used again. The threshold moves by itself (128 KB to 32 MB), so a process' history would decide. On a
2-core Zen 4 with 4 KB pages the forward case at (16384, 392) took torch.compile of the reference 8.6 ms with reused
and 25 ms with fresh pages. So each case says which it means and `set_pages` holds the allocator to it. Huge pages stay
as the system and each contender have them: glibc and torch ask for none by default, pyflow's operators do for
results of 4 MB and more (16 ms of that case with fresh pages without, 7 ms with them).
"""

from __future__ import annotations

import ctypes
import os

# the profiler that counts memory logs every start and stop
os.environ.setdefault("KINETO_LOG_LEVEL", "9")

import torch

from .registry import Call


def set_pages(kind: str) -> None:
    """ "fresh": each result over 128 KB is mapped anew; "reused": freed memory is never given back.

    Without glibc nothing happens. Only a process that has not yet been told "reused" can be told "fresh": its heap
    would serve large results too.
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
    """Most bytes alive at once during a call beyond those before it, by torch's allocator's own account."""
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
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
