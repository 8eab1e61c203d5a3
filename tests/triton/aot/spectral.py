"""Launches of spectral normalisation."""

from __future__ import annotations

import torch

from pyflow.triton_kernels import spectral

from . import F32, F64, TARGETS, dtypes_of, recorded

BOUNDED = {"_table.fill_kernel": "entries: a layer each"}
DTYPES = {"_spectral.reduce_kernel": {F32, F64}, "_table.fill_kernel": {torch.int64}}


def normalised(dtype, layers=1):
    """Launches of both operators on matrices and a vector."""
    weights = [torch.empty(64, 392, dtype=dtype)] * layers + [torch.empty(64, dtype=dtype)]
    u, v = ([torch.empty(n, dtype=dtype)] * layers + [torch.empty(0, dtype=dtype)] for n in (64, 392))
    with recorded() as launches:
        sigmas = spectral.spectral_normalize(weights, u, v, 2)[-len(weights) :]
        spectral.spectral_normalize(weights, u, v, 0)
        spectral.spectral_normalize_backward(weights, sigmas, weights, u, v, sigmas)
    return launches


def cases():
    table = {}
    for target in TARGETS:
        for dtype in dtypes_of(target, 1):
            table[f"{target}-{str(dtype)[6:]}-spectral"] = normalised(dtype)
        table[f"{target}-float32-spectral-many"] = normalised(F32, 70)
    return table


def large(shape):
    weight, u, v, sigma = torch.empty(shape), torch.empty(shape[0]), torch.empty(shape[1]), torch.empty(())
    with recorded() as launches:
        scaled = spectral.spectral_normalize([weight], [u], [v], 1)
        spectral.spectral_normalize_backward([weight], [sigma], [weight], [u], [v], scaled[-1:])
    return launches
