"""Spectral normalisation under the interpreter."""

from __future__ import annotations

import pytest
import torch

import pyflow
from pyflow import ops, testing

from .common import DTYPES, draw

SHAPES = [(33, 70), (8, 3, 3, 3), (17,), (1, 1), (5, 300), (40, 1)]


def run(backend, weights, u, v, n_iter):
    leaves = [w.detach().requires_grad_() for w in weights]
    with pyflow.backend(backend):
        scaled, u, v, sigmas = ops.spectral_normalize(leaves, u, v, n_iter=n_iter)
        cotangents = [draw(o.shape, o.dtype, seed=9) for o in (*scaled, *sigmas)]
        grads = torch.autograd.grad([*scaled, *sigmas], leaves, cotangents)
    return [x.detach() for x in (*scaled, *u, *v, *sigmas, *grads) if x is not None]


@pytest.mark.parametrize("n_iter", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_spectral_normalize(dtype, n_iter):
    weights = [draw(shape, dtype, seed=i) for i, shape in enumerate(SHAPES)]
    weights.append(draw((6, 4, 3), dtype, seed=8).transpose(0, 1))
    u = [None if w.dim() == 1 else draw(w.shape[:1], dtype, seed=3) / 4 for w in weights]
    v = [None if w.dim() == 1 else draw((w[0].numel(),), dtype, seed=4) / 4 for w in weights]
    wide = [[None if x is None else x.double() for x in values] for values in (weights, u, v)]
    got, want = run("triton", weights, u, v, n_iter), run("reference", *wide, n_iter)
    # returned u and v are rounded, and the gradient is computed from them
    u_of = max(testing.UNIT[dtype], testing.UNIT[testing.compute_dtype(dtype)])
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        size = 1 + b.abs().max()
        testing.assert_within(a, b, (200 if n_iter == 0 else 40) * u_of * size, f"output {i}")


def test_zero_and_nan():
    zero = torch.zeros(4, 3)
    weights, u, v, sigmas = run_plain([zero, torch.full((4, 3), torch.nan)])
    assert torch.equal(weights[0], zero) and torch.equal(u[0], torch.ones(4)) and torch.equal(v[0], torch.ones(3))
    assert sigmas[0].item() == pytest.approx(1e-12) and weights[1].isnan().all() and sigmas[1].isnan()


def run_plain(weights):
    with pyflow.backend("triton"):
        return ops.spectral_normalize(weights, [torch.ones(4)] * len(weights), [torch.ones(3)] * len(weights))
