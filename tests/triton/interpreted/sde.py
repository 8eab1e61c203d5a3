"""Steps of SDEs under the interpreter."""

from __future__ import annotations

import pytest
import torch

from pyflow import ops, testing

from .common import DTYPES, compare, draw


def sde_leaves(shape, dtype, kind):
    rows = shape[:1] if kind == "per sample" else ()
    x, score = draw(shape, dtype), draw(shape, torch.float32, 1)
    return [x, score, draw(rows, seed=2), draw(rows, seed=3), draw(rows, seed=4).abs()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["0-d", "per sample"])
def test_sde_step(dtype, kind, scalars):
    more = [(), (0, 4), (4, 0), (3, 1), (33, 63), (300, 3)] * (dtype == torch.float32)
    for shape in [(9,), (5, 2, 7, 3), *more]:
        if kind == "per sample" and not shape:
            continue
        leaves = sde_leaves(shape, dtype, kind)
        for seed in (3, *(ops.sample_seeds(3, n) for n in shape[:1])):
            step = lambda *v: ops.sde_step(*v, seed=seed, step=2**33, return_mean=True)
            compare(step, leaves, sums=(4, 5, 6), error=3e-4)
            compare(
                lambda x, a, c, seed=seed: ops.perturb(x, a, c, seed=seed),
                [leaves[0], *leaves[2::2]],
                sums=(2, 3),
                error=3e-4,
            )
        injected = lambda *v: ops.sde_step(*v[:5], noise=v[5], return_mean=True)
        compare(injected, [*leaves, draw(shape, dtype, 6)], sums=(4, 5, 6), error=3e-4)
        numbers = lambda x, s: ops.sde_step(x, s, 1.1, 0.3, 0.7, seed=3)
        compare(numbers, leaves[:2])


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_sde_layouts(layout):
    x, score, noise = (draw((6, 5, 4, 10), seed=i) for i in range(3))
    viewed = [testing.laid_out(v, layout) for v in (x, score, noise)]
    for seed in (3, ops.sample_seeds(3, 6)):
        compare(lambda x, s: ops.sde_step(x, s, 1.1, 0.3, 0.7, seed=seed), viewed[:2])
        compare(lambda x, s: ops.sde_step(x, s, 1.1, 0.3, 0.7, seed=seed), [viewed[0], score])
        loss = lambda p, c: ops.denoising_loss(p, c, seed=seed)
        compare(loss, [viewed[0], draw((6,), seed=4).abs()], sums=(0, 2), error=3e-4)
    compare(lambda x, s, z: ops.sde_step(x, s, 1.1, 0.3, 0.7, noise=z), viewed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sde_loss_and_norms(dtype, scalars):
    more = [(9,), (0, 4), (4, 0), (33, 63), (1, 9001)] * (dtype == torch.float32)
    for shape in [(5, 2, 7, 3), *more]:
        pred, score, _, _, std = sde_leaves(shape, dtype, "per sample")
        for seed in (3, ops.sample_seeds(3, shape[0])):
            loss = lambda p, c: ops.denoising_loss(p, c, seed=seed)
            compare(loss, [pred, std], sums=(0, 2), error=3e-4)
            epsilon = lambda p: ops.denoising_loss(p, seed=seed, parameterization="epsilon")
            compare(epsilon, [pred], sums=(0,), error=3e-4)
            for norm in ("sample", "batch"):
                options = dict(snr=0.2, norm=norm, seed=seed)
                corrector = lambda x, s: ops.langevin_step(x, s, **options)
                compare(corrector, [pred, score], sums=(0, 2), error=3e-4)
            marginal = lambda x, s: ops.langevin_step(x, s, snr=0.2, std=0.7, seed=seed)
            compare(marginal, [pred, score], error=3e-4)
