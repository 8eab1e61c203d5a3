"""GAN-QP under the interpreter."""

from __future__ import annotations

import pytest
import torch

from pyflow import ops, testing
from pyflow._schemas import DISTANCES

from .common import DTYPES, compare, draw


def check(shape, dtype=torch.float32, t_dtype=None, latents=(37,), change=lambda t: t, error=2e-5, **options):
    """Compare losses per sample and their mean; the leaves are the critic's values."""
    samples = [change(draw(shape, dtype, seed)) for seed in (2, 3)]
    samples += [draw((shape[0], *latents), dtype, seed) for seed in (4, 5) if latents]
    leaves = [draw(shape[:1], t_dtype or dtype, seed) for seed in (0, 1)]

    def function(*values):
        losses = ops.gan_qp_loss(*values, *samples, reduction="none", **options)
        return losses, losses.mean()

    # every result is a sum or derived from one
    got = compare(function, leaves, sums=(0, 1, 2, 3), error=error)
    assert got[0].dtype == testing.compute_dtype(leaves[0].dtype)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("latents", [(), (37,)])
def test_gan_qp(distance, dtype, latents):
    # half-precision gradients are rounded from sums that differ between backends
    error = 2e-5 if dtype in DTYPES[:2] else 2e-3
    for shape in [(3, 1), (5, 2, 3, 7), (9,), (2, 600)] + [(33, 63), (3, 9001)] * (dtype == torch.float32):
        check(shape, dtype, latents=latents, distance=distance, error=error)


def test_gan_qp_of_bfloat16_samples_and_a_float32_critic():
    check((4, 3, 20), torch.bfloat16, torch.float32, lam=3.0, eps=0.25)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_gan_qp_layouts(layout):
    check((6, 5, 4, 10), change=lambda t: testing.laid_out(t, layout), distance="l2")


def test_gan_qp_many_rows_and_no_rows():
    check((2100, 3))
    for shape in ((0, 4), (1, 4)):
        t, x = draw(shape[:1]).requires_grad_(), draw(shape, seed=1)
        loss = ops.gan_qp_loss(t, t.detach() - 1, x, x, reduction="none")
        assert loss.shape == shape[:1] and not loss.count_nonzero()
        assert not torch.autograd.grad(loss.sum(), t)[0].count_nonzero()
