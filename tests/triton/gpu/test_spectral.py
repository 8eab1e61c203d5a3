"""Spectral normalisation on a GPU: the reference within rounding, every run alike, graph replay."""

from __future__ import annotations

import pytest
import torch

import pyflow
from pyflow import _backend, ops, testing

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

BACKENDS = [name for name in ("triton", "cuda") if _backend.status()[name] is None]
SHAPES = [(33, 70), (64, 3, 7, 7), (17,), (1, 1), (1, 1000), (1000, 1), (512, 4608)]


def draw(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(dtype, device):
    weights = [draw(s, dtype, i).to(device) for i, s in enumerate(SHAPES)]
    u = [None if w.dim() == 1 else draw(w.shape[:1], dtype, 20).to(device) / len(w) ** 0.5 for w in weights]
    v = [None if w.dim() == 1 else draw((w[0].numel(),), dtype, 21).to(device) / w[0].numel() ** 0.5 for w in weights]
    return weights, u, v


def run(weights, u, v, n_iter):
    leaves = [w.detach().requires_grad_() for w in weights]
    scaled, u, v, sigmas = ops.spectral_normalize(leaves, u, v, n_iter=n_iter)
    ends = [*scaled, *sigmas]
    grads = torch.autograd.grad(ends, leaves, [draw(o.shape, o.dtype, 9).to(o.device) for o in ends])
    return [x.detach().cpu() for x in (*ends, *u, *v, *grads) if x is not None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_iter", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_matches_the_reference_and_itself(backend, dtype, n_iter):
    with pyflow.backend(backend):
        got, again = (run(*inputs(dtype, "cuda"), n_iter) for _ in range(2))
    wide = [[None if x is None else x.double() for x in values] for values in inputs(dtype, "cpu")]
    with pyflow.backend("reference"):
        want = run(*wide, n_iter)
    bound = (2000 if n_iter == 0 else 200) * testing.UNIT[dtype]
    for i, (a, b, c) in enumerate(zip(got, again, want, strict=True)):
        testing.assert_same_bits(a, b, f"output {i}")
        testing.assert_within(a, c, bound * (1 + c.abs().max()), f"output {i}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_replay(backend):
    weights, u, v = inputs(torch.float32, "cuda")
    with pyflow.backend(backend):
        eager = ops.spectral_normalize(weights, u, v)[0]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ops.spectral_normalize(weights, u, v)[0]
        graph.replay()
    for a, b in zip(captured, eager):
        testing.assert_same_bits(a, b)
