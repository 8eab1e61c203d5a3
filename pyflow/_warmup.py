"""Compile the kernels before their first use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from . import ops
from ._schemas import DISTANCES, FSQ_VARIANTS, PACKINGS, PRIORS, SCALE_MAPS


def warmup(
    device: torch.device | str = "cuda",
    *,
    dtypes: Iterable[torch.dtype] = (torch.float32,),
    scale_maps: Iterable[str] = SCALE_MAPS,
    levels: Iterable[tuple[int, ...]] = ((8, 5, 5, 5),),
) -> None:
    """Run every operation once, forward and backward, on small tensors of these dtypes.

    Triton compiles a kernel at its first call for a dtype and scale map; `warmup` compiles it in advance. On a CPU
    nothing is compiled at run time.

    Args:
        device: device that the kernels will run on.
        dtypes: dtypes of the inputs.
        scale_maps: scale maps of the coupling layers.
        levels: FSQ levels.

    Example:
        >>> warmup("cpu", scale_maps=["tanh"])
    """
    for dtype in dtypes:
        x = torch.zeros(2, 64, dtype=dtype, device=device, requires_grad=True)
        params = torch.zeros(2, 128, dtype=dtype, device=device, requires_grad=True)
        outputs: list[Any] = [ops.additive_coupling(x, x)]
        for inverse in (False, True):
            for scale_map in scale_maps:
                outputs += ops.affine_coupling(x, x, x, scale_map=scale_map, inverse=inverse)
                for packing in PACKINGS:
                    options: dict[str, Any] = dict(packing=packing, scale_map=scale_map, inverse=inverse)
                    outputs += ops.affine_coupling_packed(x, params, **options)
        outputs += [ops.flow_log_prob(x, x[0], prior=prior) for prior in PRIORS]
        for distance in DISTANCES:
            outputs += [ops.gan_qp_loss(x[:, 0], x[:, 0], x, x, *z, distance=distance) for z in ((), (x, x))]
        u, v = x.detach()[:, 0], x.detach()[0]
        for n_iter in (0, 2):
            outputs += ops.spectral_normalize([x, x[0]], [u, None], [v, None], n_iter=n_iter)[0]
        for numbers in levels:
            z = torch.zeros(2, len(numbers), dtype=dtype, device=device, requires_grad=True)
            for variant in FSQ_VARIANTS:
                if min(numbers) == 2 and variant in ("vqp", "hard"):
                    continue
                codes, indices = ops.fsq(z, numbers, variant=variant)
                assert indices is not None
                outputs.append(codes)
                ops.fsq_decode(indices, numbers, variant=variant, dtype=dtype)
            for variant in ("symmetric", "symmetric_hard"):
                outputs.append(ops.residual_fsq(z, numbers, 2, variant=variant)[0])
        seeds = ops.sample_seeds(torch.tensor(0, device=device), len(x))
        scale = torch.ones(len(x), device=device, requires_grad=True)
        for seed in (0, seeds):
            ops.normal(x.shape, seed=seed, dtype=dtype, device=device)
            ops.uniform(x.shape, seed=seed, dtype=dtype, device=device)
            outputs += [ops.sde_step(x, x, *values, seed=seed) for values in ((1.0, 1.0, 1.0), (scale,) * 3)]
            outputs += [ops.perturb(x, 1.0, 1.0, seed=seed), ops.langevin_step(x, x, snr=0.1, norm="sample", seed=seed)]
            outputs.append(ops.denoising_loss(x, 1.0, seed=seed))
            outputs.append(ops.denoising_loss(x, seed=seed, parameterization="epsilon"))
            for alpha in (1.0, scale):
                ops.mala_accept(x, x, scale, scale, x, x, alpha, seed=seed)
        ops.sector_counts(torch.zeros(1, dtype=torch.float64, device=device), 4, 1, seed=0)
        for kernel in ("rbf", "laplacian", "polynomial"):
            for columns in (8, 64):
                rows = torch.zeros(8, columns, dtype=dtype, device=device, requires_grad=True)
                outputs.append(ops.hsic(rows, rows[:, :8], kernel=kernel, bandwidth=1.0))
        outputs.append(ops.center_gram(x[:, :2]))
        outputs.append(ops.grad_norm_penalty(x))
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
