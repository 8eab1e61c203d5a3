"""Compile every kernel ahead of the first real call."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from . import ops
from ._schemas import FSQ_VARIANTS, PACKINGS, PRIORS, SCALE_MAPS


def warmup(
    device: torch.device | str = "cuda",
    *,
    dtypes: Iterable[torch.dtype] = (torch.float32,),
    scale_maps: Iterable[str] = SCALE_MAPS,
    levels: Iterable[tuple[int, ...]] = ((8, 5, 5, 5),),
) -> None:
    """Run every operation once, forward and backward, on small tensors of these dtypes.

    A Triton kernel is compiled at its first call for a dtype and scale map; this moves that wait to where
    you choose. On a CPU nothing is compiled at run time and this only touches the code.

    Args:
        device: where the kernels will run.
        dtypes: of the inputs.
        scale_maps: the maps of the coupling layers to prepare.
        levels: the level sets of FSQ to prepare.

    Example:
        >>> warmup("cpu", scale_maps=["tanh"])
    """
    for dtype in dtypes:
        x = torch.zeros(2, 64, dtype=dtype, device=device, requires_grad=True)
        params = torch.zeros(2, 128, dtype=dtype, device=device, requires_grad=True)
        outputs = [ops.additive_coupling(x, x)]
        for inverse in (False, True):
            for scale_map in scale_maps:
                outputs += ops.affine_coupling(x, x, x, scale_map=scale_map, inverse=inverse)
                for packing in PACKINGS:
                    options = dict(packing=packing, scale_map=scale_map, inverse=inverse)
                    outputs += ops.affine_coupling_packed(x, params, **options)
        outputs += [ops.flow_log_prob(x, x[0], prior=prior) for prior in PRIORS]
        for numbers in levels:
            z = torch.zeros(2, len(numbers), dtype=dtype, device=device, requires_grad=True)
            for variant in FSQ_VARIANTS:
                if min(numbers) == 2 and variant in ("vqp", "hard"):
                    continue
                codes, indices = ops.fsq(z, numbers, variant=variant)
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
            outputs += [ops.perturb(x, 1.0, 1.0, seed=seed), ops.langevin_step(x, x, snr=0.1, seed=seed)]
            outputs.append(ops.denoising_loss(x, 1.0, seed=seed))
            outputs.append(ops.denoising_loss(x, seed=seed, parameterization="epsilon"))
        ops.sector_counts(torch.zeros(1, dtype=torch.float64, device=device), 4, 1, seed=0)
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
