"""Launches of the accept step of a chain and of the gradient penalty."""

from __future__ import annotations

import torch

from pyflow.triton_kernels import energy

from . import BF16, F32, F64, SHAPE, TARGETS, dense, dtypes_of, recorded, scalars_on_the_device


def chained(shape, dtype, seed, alpha, energies=F32):
    z, z_new, grad, grad_new = dense(dtype, 4, shape)
    u, u_new = dense(energies, 2, shape[:1])
    with recorded() as launches:
        energy.mala_accept(z, z_new, u, u_new, grad, grad_new, alpha, seed, torch.tensor(3))
        energy.grad_norm_penalty(grad)
    return launches


def cases():
    table, seeds, number = {}, torch.zeros(64, dtype=torch.int64), torch.tensor(0.5, dtype=F64)
    for target in TARGETS:
        for dtype in dtypes_of(target, 2):
            name = f"{target}-energy-{str(dtype)[6:]}"
            energies = F64 if dtype == F64 else F32
            table[name] = chained(SHAPE, dtype, seeds[0], number, energies)
            table[f"{name}-long"] = chained((64, 20000), dtype, seeds, torch.empty(64), energies)
    with scalars_on_the_device():
        table["sm_90-energy-device-scalars"] = chained((5, 37), F32, seeds[0], torch.tensor(0.5), BF16)
    return table


def large(shape):
    seeds = torch.empty((), dtype=torch.int64), torch.empty(shape[0], dtype=torch.int64)
    return [one for seed in seeds for one in chained(shape, F32, seed, torch.empty(()))]
