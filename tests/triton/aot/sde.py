"""Launches of SDE steps, the denoising loss and the norms of a corrector."""

from __future__ import annotations

import torch

from pyflow.triton_kernels import sde

from . import BF16, F16, F32, F64, SHAPE, TARGETS, dense, dtypes_of, recorded, scalars_on_the_device


def stepped(x, score, seed, values, injected=None):
    """Launches of every sde operator, forward and backward."""
    a, b, c = values
    step, grad = torch.tensor(3), torch.empty_like(x)
    f64 = x.dtype == F64
    sums = torch.empty(x.shape[0], dtype=F64 if f64 else F32)
    stream = (None, None, injected) if injected is not None else (seed, step, None)
    dtypes = (x.dtype, score.dtype, None if injected is None else injected.dtype)
    with recorded() as launches:
        sde.sde_step(x, score, a, b, c, *stream, 0, True)
        sde.sde_step(x, None, a, None, c, *stream, 1, False)
        sde.sde_step_backward(grad, grad, x, score, a, b, c, *stream, 0, *dtypes, f64)
        sde.sde_step_backward(grad, None, None, None, a, b, c, None, None, None, 0, *dtypes, f64)
        sde.langevin_squares(score, *stream, 1)
        for std in (c, None):
            sde.denoising_loss(x, std, seed, step)
            sde.denoising_loss_backward(sums, x, std, seed, step)
    return launches


def cases():
    table, seeds = {}, torch.zeros(64, dtype=torch.int64)
    numbers, own = [torch.tensor(0.5, dtype=F64)] * 3, [torch.empty(64)] * 3
    for target in TARGETS:
        for dtype in dtypes_of(target, 2):
            name = f"{target}-sde-{str(dtype)[6:]}"
            table[name] = stepped(*dense(dtype, 2), seeds[0], numbers)
            table[f"{name}-per-sample"] = stepped(*dense(dtype, 2), seeds, own)
    table["sm_90-sde-odd"] = stepped(*dense(F32, 2, (5, 37)), seeds[0], numbers)
    table["sm_90-sde-injected"] = stepped(*dense(F32, 2), seeds[0], numbers, torch.empty(SHAPE))
    table["sm_90-sde-long"] = stepped(*dense(F32, 2, (64, 20000)), seeds, own)
    table["sm_90-sde-mixed"] = stepped(*dense(F32, 1), *dense(BF16, 1), seeds, [torch.empty(64, dtype=F16)] * 3)
    with scalars_on_the_device():
        table["sm_90-sde-device-scalars"] = stepped(*dense(F32, 2), seeds[0], [torch.tensor(0.5)] * 3)
    return table


def large(shape):
    seeds = torch.empty((), dtype=torch.int64), torch.empty(shape[0], dtype=torch.int64)
    return [one for seed in seeds for one in stepped(*dense(F32, 2, shape), seed, [torch.empty(())] * 3)]
