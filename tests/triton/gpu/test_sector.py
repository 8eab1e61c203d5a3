"""Trials of the sector probability on a GPU: the counts of the CPU, in graphs and without waiting."""

from __future__ import annotations

import math

import pytest
import torch

import pyflow
from pyflow import _backend, ops
from pyflow.stats import sector_probability, sector_probability_mc

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(why), reason=f"{name}: {why}"))
    for name, why in _backend.status().items()
    if name in ("triton", "cuda")
]
X = torch.linspace(0, 1, 40, dtype=torch.float64) ** 2


@pytest.fixture(params=BACKENDS)
def gpu(request):
    with pyflow.backend(request.param):
        yield request.param


def counts(x, points, trials, **options):
    with pyflow.backend("auto"):
        return ops.sector_counts(x, points, trials, **options)


@pytest.mark.parametrize("points", [1, 2, 4, 7, 33, 1000])
def test_counts_of_the_cpu(gpu, points):
    for trials in (1, 255, 257, 3_000_000 // points):
        for x in (X, X.reshape(5, 8).mT, X[:0], X[7], X.repeat(20)):
            want = counts(x, points, trials, seed=2**64 - 5, step=2**40 + 3)
            got = ops.sector_counts(x.cuda(), points, trials, seed=2**64 - 5, step=2**40 + 3)
            assert torch.equal(got.cpu(), want), (trials, x.shape)
            seed, step = torch.tensor(-5, device="cuda"), torch.tensor(2**40 + 3, device="cuda")
            assert torch.equal(ops.sector_counts(x.cuda(), points, trials, seed=seed, step=step).cpu(), want)


def test_every_program_takes_several_blocks(gpu):
    trials = 3 * 4096 * 256 + 5
    assert torch.equal(ops.sector_counts(X.cuda(), 3, trials, seed=1).cpu(), counts(X, 3, trials, seed=1))


def test_public_functions(gpu):
    theta = torch.tensor([1.0, math.pi, 6.0], dtype=torch.float64, device="cuda")
    estimate = sector_probability_mc(4, theta, 100_000, seed=0)
    assert estimate.count.device == theta.device
    assert estimate.count.tolist() == sector_probability_mc(4, theta.tolist(), 100_000, seed=0).count.tolist()
    assert sector_probability_mc(4, theta.tolist(), 100_000, 0, device="cuda").count.tolist() == estimate.count.tolist()
    exact = sector_probability(4, theta)
    assert exact.device == theta.device and ((estimate.probability - exact).abs() < 4 * estimate.standard_error).all()


def test_works_in_a_cuda_graph_and_never_waits(gpu):
    x, seed, step = X.cuda(), torch.tensor(3, device="cuda"), torch.tensor(4, device="cuda")
    want = ops.sector_counts(x, 9, 10_000, seed=seed, step=step)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sector_probability_mc(9, x, 10_000, seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.sector_counts(x, 9, 10_000, seed=seed, step=step)
    graph.replay()
    assert torch.equal(captured, want)
    step += 1
    graph.replay()
    assert torch.equal(captured.cpu(), counts(X, 9, 10_000, seed=3, step=5))
