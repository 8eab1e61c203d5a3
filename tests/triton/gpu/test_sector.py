"""Trials of the sector probability on a GPU: counts as on the CPU, in CUDA graphs, without synchronising."""

from __future__ import annotations

import pytest
import torch

import pyflow
from pyflow import ops

from .common import INTERPRETED, check_graph, moved

X = torch.linspace(0, 1, 40, dtype=torch.float64) ** 2
MOST = 600 if INTERPRETED else 1_000_000
VIEWS = [X, X.reshape(5, 8).mT, X[:0], X[7], X.repeat(20)]


def counts(x, points, trials, **options):
    with pyflow.backend("auto"):
        return ops.sector_counts(x, points, trials, **options)


@pytest.mark.parametrize("points", [1, 2, 4, 7, 33] + [1000] * (not INTERPRETED))
def test_counts_match_the_cpu(gpu, points):
    for trials in (1, 255, 257, max(1, MOST // points))[:: 3 if INTERPRETED else 1]:
        for x in VIEWS[1:4] if INTERPRETED else VIEWS:
            want = counts(x, points, trials, seed=2**64 - 5, step=2**40 + 3)
            got = ops.sector_counts(moved(x), points, trials, seed=2**64 - 5, step=2**40 + 3)
            assert torch.equal(got.cpu(), want), (trials, x.shape)
            seed, step = moved([torch.tensor(-5), torch.tensor(2**40 + 3)])
            assert torch.equal(ops.sector_counts(moved(x), points, trials, seed=seed, step=step).cpu(), want)


def test_every_program_takes_several_blocks(gpu, monkeypatch):
    trials = 3 * 4096 * 256 + 5
    if INTERPRETED:
        from pyflow.triton_kernels import sector

        monkeypatch.setattr(sector, "PROGRAMS", 2)
        trials = 5 * 256 + 5
    assert torch.equal(ops.sector_counts(moved(X), 3, trials, seed=1).cpu(), counts(X, 3, trials, seed=1))


def test_works_in_a_cuda_graph_and_never_waits(gpu):
    x, seed, step = moved([X, torch.tensor(3), torch.tensor(4)])
    check_graph(
        lambda: (ops.sector_counts(x, 9, 1_000, seed=seed, step=step),), lambda: step.add_(1), lambda: x.mul_(0.5)
    )


def test_compiles_without_graph_breaks(kernels):
    x, seed = moved([X, torch.tensor(3)])
    function = lambda x, seed: ops.sector_counts(x, 9, 1_000, seed=seed)
    assert torch.equal(torch.compile(function, fullgraph=True)(x, seed), function(x, seed))
