"""Launches of noise and of the words of Philox."""

from __future__ import annotations

import torch

from pyflow.triton_kernels import noise

from . import F32, SHAPE, TARGETS, dtypes_of, recorded, scalars_on_the_device

DTYPES = {"noise.philox_kernel": {torch.int64}}


def drawn(size, seed, dtype, kind=1):
    with recorded() as launches:
        noise.noise(size, seed, torch.tensor(3), kind, 0, dtype)
        with scalars_on_the_device():
            noise.noise(size, seed, torch.tensor(3), kind, 0, dtype)
    return launches


def random_words(count=100):
    with recorded() as launches:
        noise.philox(torch.empty(count, 4, dtype=torch.int64), torch.empty(count, 2, dtype=torch.int64))
    return launches


def cases():
    table, seeds = {}, torch.zeros(64, dtype=torch.int64)
    for target in TARGETS:
        for dtype in dtypes_of(target, 1):
            table[f"{target}-noise-{str(dtype)[6:]}"] = drawn(SHAPE, seeds[0], dtype) + drawn(SHAPE, seeds, dtype, 0)
        table[f"{target}-philox"] = random_words()
    table["sm_90-noise-odd"] = drawn((5, 2), seeds[:5], F32)
    return table


def large(shape):
    seed, found = torch.empty((), dtype=torch.int64), random_words(max(shape))
    for stream in (seed, torch.empty(shape[0], dtype=torch.int64)):
        with recorded() as launches:
            noise.noise(shape, stream, seed, 1, 0, F32)
        found += launches
    return found
