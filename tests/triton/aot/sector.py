"""Launches of the counts of large gaps."""

from __future__ import annotations

import torch

from pyflow.triton_kernels import sector

from . import F64, TARGETS, recorded, scalars_on_the_device

BOUNDED = {"sector.counts_kernel": "trials are counted in int64, points of one trial are few"}
DTYPES = {"sector.counts_kernel": {F64, torch.int64}}


def counted():
    with recorded() as launches:
        arguments = torch.zeros(3, dtype=F64), 33, 10**6, torch.tensor(1), torch.tensor(3), 6
        sector.sector_counts(*arguments)
        with scalars_on_the_device():
            sector.sector_counts(*arguments)
    return launches


def cases():
    return {f"{target}-float64-sector": counted() for target in TARGETS}
