"""Energy kernels under the interpreter: accepted states bit for bit, sums within rounding."""

from __future__ import annotations

import pytest
import torch

import pyflow
from pyflow import _backend, ops, testing

from .common import DTYPES, compare, draw


def chain(shape, dtype):
    """Arguments for which mala_accept accepts about half the rows; some energies and a gradient are NaN or infinite."""
    z, step, grad, moved = (draw(shape, dtype, i, spread) for i, spread in enumerate((1.0, 0.1, 1.0, 0.05)))
    u = draw(shape[:1], torch.float32, 4)
    u_new = u + draw(shape[:1], torch.float32, 5) + 0.5
    grad_new = grad + moved
    if shape[0] > 4:
        u_new[1], u_new[2], u_new[3] = torch.nan, torch.inf, -torch.inf
        grad_new[4] = torch.nan
    return z, z + step, u, u_new, grad, grad_new


@pytest.mark.parametrize("dtype", DTYPES)
def test_accept(dtype):
    for shape in [(7,), (33, 5), (12, 600), (5, 3, 4, 6), (4, 0), (0, 3)] + [(2, 9001)] * (dtype == torch.float32):
        args = chain(shape, dtype)
        for alpha, seed in ((0.01, ops.sample_seeds(5, shape[0])), (torch.full(shape[:1], 0.02), 3)):
            results = []
            for backend in ("triton", "reference") + ("cpu",) * (_backend.cpu_missing is None):
                with pyflow.backend(backend):
                    results.append(ops.mala_accept(*args, alpha, seed=seed, step=2**35 + 1))
            for other in results[1:]:
                for name, a, b in zip(("z", "u", "grad", "accepted"), results[0], other, strict=True):
                    assert a.stride() == b.stride(), f"{name}, {shape}"
                    if name == "accepted":
                        assert torch.equal(a, b), shape
                    else:
                        testing.assert_same_bits(a, b, f"{name}, {shape}")
            assert not any(v.isnan().any() for v in results[0][:3])


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(layout):
    z, z_new, u, u_new, grad, grad_new = chain((6, 5, 4, 10), torch.float32)
    with pyflow.backend("triton"):
        want = ops.mala_accept(z, z_new, u, u_new, grad, grad_new, 0.01, seed=3)
        viewed = [testing.laid_out(v, layout) for v in (z, z_new, grad, grad_new)]
        got = ops.mala_accept(viewed[0], viewed[1], u, u_new, *viewed[2:], 0.01, seed=3)
    for a, b in zip(got[:3], want[:3], strict=True):
        testing.assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_penalty(dtype):
    for shape in [(7,), (33, 5), (2, 9001), (5, 3, 4, 6)]:
        compare(ops.grad_norm_penalty, [draw(shape, dtype)], sums=(0,), error=3e-4)
