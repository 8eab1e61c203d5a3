"""Launches of the GAN-QP critic."""

from __future__ import annotations

import torch

from pyflow._schemas import DISTANCES
from pyflow.triton_kernels import gan_qp

from . import BF16, F32, F64, TARGETS, dense, dtypes_of, recorded


def critic(x, z, t, distance=0):
    """Launches of the loss and its backward; x and z serve as real and fake samples and latents, z may be None."""
    d = torch.empty(t.shape, dtype=F64 if F64 in {v.dtype for v in (x, t)} else F32)
    with recorded() as launches:
        gan_qp.gan_qp_loss(t, t, x, x, z, z, 10.0, 0.0, distance)
        gan_qp.gan_qp_loss_backward(torch.empty_like(d), t, t, d, 10.0, 0.0)
    return launches


def cases():
    table = {}
    for target in TARGETS:
        for number, distance in enumerate(DISTANCES):
            for dtype in dtypes_of(target, 2):
                x, t = torch.empty(64, 3, 32, 32, dtype=dtype), torch.empty(64, dtype=dtype)
                name = f"{target}-gan_qp-{distance}-{str(dtype)[6:]}"
                table[name] = critic(x, torch.empty(64, 128, dtype=dtype), t, number)
    table["sm_90-gan_qp-long"] = critic(torch.empty(64, 3, 128, 128), None, torch.empty(64))
    table["sm_90-gan_qp-mixed"] = critic(torch.empty(64, 3, 32, 32, dtype=BF16), torch.empty(64, 128), torch.empty(64))
    table["sm_90-gan_qp-odd"] = critic(torch.empty(5, 37), torch.empty(5, 10)[:, ::2], torch.empty(5, 2)[:, 0])
    return table


def large(shape):
    return critic(*dense(F32, 1, shape), None, torch.empty(shape[0]))
