"""One launch for many tensors: a table of addresses and sizes in GPU memory, written by a kernel of its own.

The addresses are arguments of that kernel, so a CUDA graph holds them as it holds any argument; a table copied from
the host would be stale on replay. Triton knows neither alignment nor dtype behind an address: kernels get the dtype as
a constant and test the alignment.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._plans import Kept, Words

MARK = tl.constexpr((1 << 61) + 1)  # makes the address of a float one of `_plans.Words`
# entries of a launch: 56 of six addresses and six numbers are 4 032 bytes of arguments, whose limit is 4 KB
MOST = 56
PADDED = 8  # numbers of entries are multiples of it, so that few lengths are compiled
SHARE = 2  # entries that a program writes
SEARCH = tl.constexpr(64)  # entries that a program compares at once to find its own


@triton.jit(do_not_specialize=["pitch", "first"])
def fill_kernel(table, pitch, first, addresses, numbers, COUNT: tl.constexpr, SHARE: tl.constexpr):
    """Write addresses (fields * COUNT) and numbers (fields * COUNT), see `encoded`, to columns `first`... of table."""
    for group in tl.static_range(COUNT // SHARE):
        if tl.program_id(0) == group:
            for i in tl.static_range(SHARE):
                to = table + first + group * SHARE + i
                for field in tl.static_range(len(addresses) // COUNT):
                    value = addresses[field * COUNT + group * SHARE + i]
                    tl.store(to + field * pitch, value - MARK)
                for field in tl.static_range(len(numbers) // COUNT):
                    value = numbers[field * COUNT + group * SHARE + i] + tl.zeros([], tl.int64)
                    tl.store(to + (len(addresses) // COUNT + field) * pitch, (value - 3) >> 1)


@triton.jit
def find(table, pitch, entries, program, FIELD: tl.constexpr):
    """The entry that owns the program, and the program's number in it; FIELD holds the first program of each entry."""
    owners, begin = 0, table + pitch.to(tl.int64) * FIELD
    for start in range(0, entries, SEARCH):
        i = start + tl.arange(0, SEARCH)
        begins = tl.load(begin + i, mask=i < entries, other=0)
        owners += tl.sum(((begins <= program) & (i < entries)).to(tl.int32), axis=0)
    entry = owners - 1
    return entry, program - tl.load(begin + entry)


def encoded(values: Sequence[int]) -> list[int]:
    """Numbers as odd ones above 1: Triton compiles anew for 1 and for multiples of 16, also inside a tuple."""
    return [2 * value + 3 for value in values]


class Layout:
    """Numbers of the entries, encoded once: fields x entries, split into launches and padded."""

    def __init__(self, numbers: Sequence[Sequence[int]]) -> None:
        self.entries = len(numbers[0])
        self.parts = []
        for first in range(0, self.entries, MOST):
            real = min(MOST, self.entries - first)
            pad = -real % PADDED
            values = [encoded([*field[first : first + real], *[0] * pad]) for field in numbers]
            self.parts.append((first, real, pad, Kept(chain.from_iterable(values))))
        self.pitch = self.parts[-1][0] + self.parts[-1][1] + self.parts[-1][2]

    def table(self, tensors: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return the table (fields, pitch), int64: addresses of the tensors of each field, then the numbers."""
        device = tensors[0][0].device
        fields = len(tensors) + len(self.parts[0][3]) // (self.parts[0][1] + self.parts[0][2])
        table = torch.empty((fields, self.pitch), dtype=torch.int64, device=device)
        for first, real, pad, numbers in self.parts:
            addresses: list[int] = []
            for field in tensors:
                addresses += [tensor.data_ptr() + MARK.value for tensor in field[first : first + real]]
                addresses += addresses[-1:] * pad
            _launch.launch(
                fill_kernel, (real + pad) // SHARE, device, table, self.pitch, first, Words(addresses), numbers,
                num_warps=1, COUNT=real + pad, SHARE=SHARE,
            )  # fmt: skip
        return table
