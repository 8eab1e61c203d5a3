"""Sums of the CUDA kernels have the bits of Triton's. test_emulated.py runs this file with TRITON_INTERPRET=1.

Not spectral, whose tiles differ. The other families have no sums of floats: interpreted/ compares their bits.
"""

from __future__ import annotations

import pytest

from pyflow import ops, testing

from ..triton import emulated
from ..triton.interpreted.common import draw, run
from ..triton.interpreter import round_as_a_gpu

SHAPE = (6, 2500)  # several segments a row
ROWS = (6,)
SEED = 3


def affine(x, shift, scale):
    return ops.affine_coupling(x, shift, scale, scale_map="tanh")


def spline(x, params):
    return ops.rq_spline(x, params, bins=2)


def gan_qp(real, fake):
    samples = [draw(SHAPE, seed=i) for i in (2, 3)]
    return ops.gan_qp_loss(real, fake, *samples, reduction="none")


CASES = {
    "coupling": (affine, [SHAPE, SHAPE, SHAPE]),
    "spline": (spline, [SHAPE, (*SHAPE, 5)]),
    "flow_head": (ops.flow_log_prob, [SHAPE, SHAPE[1:]]),
    "sde": (
        lambda x, s, a, b, c: ops.sde_step(x, s, a, b, c.abs(), seed=SEED, return_mean=True),
        [SHAPE, SHAPE, ROWS, ROWS, ROWS],
    ),
    "loss": (lambda x, std: ops.denoising_loss(x, std.abs() + 1, seed=SEED), [SHAPE, ROWS]),
    "langevin": (lambda x, s: ops.langevin_step(x, s, snr=0.2, norm="sample", seed=SEED), [SHAPE, SHAPE]),
    "gan_qp": (gan_qp, [ROWS, ROWS]),
    "energy": (ops.grad_norm_penalty, [SHAPE]),
}


@pytest.mark.parametrize("name", CASES)
def test_bits(name, monkeypatch):
    function, shapes = CASES[name]
    leaves = [draw(shape, seed=i) for i, shape in enumerate(shapes)]
    with monkeypatch.context() as patch:
        round_as_a_gpu(patch)
        triton = run("triton", function, leaves)
    with monkeypatch.context() as patch:
        emulated.use(patch)
        cuda = run("triton", function, leaves)
    for i, (a, b) in enumerate(zip(cuda, triton, strict=True)):
        assert a.count_nonzero()
        testing.assert_same_bits(a, b, f"output {i}")
