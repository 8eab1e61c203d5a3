"""Statistics of tensors on a GPU match those on the CPU."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import pyflow
from pyflow import _backend, ops
from pyflow.stats import compare_representations, hsic, hsic_test, sector_probability, sector_probability_mc

from .common import DEVICE, INTERPRETED, draw, needs_cuda

pytestmark = pytest.mark.usefixtures("kernels")
TRIALS = 2_000 if INTERPRETED else 100_000


def dependent(n=60, d=3):
    x = draw((n, d))
    return x, x.abs() + 0.5 * draw((n, d), seed=1)


def on_both(function, *tensors, **options):
    """Return the results of a function for the tensors on the device and on the CPU."""
    got = function(*(t.to(DEVICE) for t in tensors), **options)
    with pyflow.backend("auto"):
        return got, function(*tensors, **options)


@pytest.mark.parametrize("kernel", ["rbf", "laplacian", "linear", "polynomial", "precomputed"])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_permutation_test(kernel, estimator):
    x, y = dependent()
    if kernel == "precomputed":
        x, y = x @ x.mT, y @ y.mT
    options = {"kernel": kernel, "estimator": estimator, "permutations": 99, "progress": False, "seed": 3}
    got, want = on_both(hsic_test, x, y, **options)
    assert got.pvalue == want.pvalue
    assert got.statistic == pytest.approx(want.statistic, rel=1e-5, abs=1e-7)
    np.testing.assert_allclose(got.null, want.null, rtol=1e-4, atol=1e-6 * abs(want.null).max())


def test_permutation_test_of_independent_data_and_labels():
    x, y = draw((50, 2)), draw((50, 2), seed=1)
    got, want = on_both(hsic_test, x, y, permutations=99, progress=False)
    assert got.pvalue == want.pvalue > 0.01
    got, want = on_both(hsic_test, x, (x[:, 0] > 0).long(), kernel_y="delta", permutations=99, progress=False)
    assert got.pvalue == want.pvalue == 0.01


@pytest.mark.parametrize("kernel", ["rbf", "laplacian"])
@pytest.mark.parametrize("normalize", [False, True])
def test_gamma_test(kernel, normalize):
    options = {"method": "gamma", "kernel": kernel, "normalize": normalize, "progress": False}
    got, want = on_both(hsic_test, *dependent(), **options)
    assert got.statistic == pytest.approx(want.statistic, rel=1e-5)
    assert got.pvalue == pytest.approx(want.pvalue, rel=1e-4) and got.null == pytest.approx(want.null, rel=1e-4)


@needs_cuda
def test_permutation_test_without_matrices():
    # above 8,192 rows no matrix is held
    x, y = dependent(8200, 2)
    result = hsic_test(x.to(DEVICE), y.to(DEVICE), permutations=9, bandwidth=1.0, progress=False)
    assert result.pvalue == 0.1 and result.statistic > 10 * result.null.max()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("approximate", [None, "rff", "nystrom"])
def test_hsic(approximate, normalize):
    options = {"approximate": approximate, "normalize": normalize, "n_features": 30, "progress": False}
    got, want = on_both(hsic, *dependent(300 if not INTERPRETED else 60), **options)
    assert got.value == pytest.approx(want.value, rel=1e-3 if approximate else 1e-5)
    assert got.error == pytest.approx(want.error, rel=1e-2, abs=1e-9)


def net(seed, width=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.mark.parametrize("kernel", ["linear", "rbf", "laplacian", "polynomial"])
def test_representations(kernel):
    first, second, batches = net(0), net(1, 6), [draw((32, 5), seed=i) for i in range(3)]
    want = compare_representations(first, second, batches, kernel=kernel, progress=False)
    first, second = first.to(DEVICE), second.to(DEVICE)
    for loader in (batches, [x.to(DEVICE) for x in batches]):
        got = compare_representations(first, second, loader, kernel=kernel, progress=False)
        assert got.layers1 == want.layers1 and got.cka.device.type == "cpu"
        torch.testing.assert_close(got.cka, want.cka, rtol=1e-4, atol=1e-5)


def test_models_on_two_devices_are_compared():
    first, second, batches = net(0), net(1), [draw((32, 5))]
    want = compare_representations(first, second, batches, progress=False)
    got = compare_representations(first.to(DEVICE), second, batches, progress=False)
    torch.testing.assert_close(got.cka, want.cka, rtol=1e-4, atol=1e-5)


def test_sector_probability():
    theta = torch.tensor([1.0, math.pi, 6.0], dtype=torch.float64)
    for options in ({}, {"complement": True}, {"log": True}):
        for n in (4, torch.tensor([2, 40, 1000])):
            got = sector_probability(n.to(DEVICE) if torch.is_tensor(n) else n, theta.to(DEVICE), **options)
            assert got.device.type == DEVICE and got.dtype == torch.float64
            assert torch.equal(got.cpu(), sector_probability(n, theta, **options))


def test_sector_trials():
    theta = torch.tensor([1.0, math.pi, 6.0], dtype=torch.float64, device=DEVICE)
    estimate = sector_probability_mc(4, theta, TRIALS, seed=0)
    assert estimate.count.device == theta.device
    with pyflow.backend("auto"):
        want = sector_probability_mc(4, theta.tolist(), TRIALS, seed=0)
    assert estimate.count.tolist() == want.count.tolist()
    assert sector_probability_mc(4, theta.tolist(), TRIALS, 0, device=DEVICE).count.tolist() == want.count.tolist()
    exact = sector_probability(4, theta)
    assert exact.device == theta.device
    assert ((estimate.probability - exact).abs() < 4 * estimate.standard_error).all()
    seed = torch.tensor(5, device=DEVICE)
    again = sector_probability_mc(4, theta, TRIALS, seed, step=2)
    assert not torch.equal(again.count, sector_probability_mc(4, theta, TRIALS, seed, step=3).count)


@needs_cuda
def test_sector_trials_never_wait():
    theta, seed = torch.linspace(1, 6, 9, dtype=torch.float64, device=DEVICE), torch.tensor(3, device=DEVICE)
    sector_probability_mc(9, theta, 10_000, seed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sector_probability_mc(9, theta, 10_000, seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not INTERPRETED and bool(_backend.status()["cuda"]), reason="a hundred kernels would be compiled")
def test_warmup_runs_every_operation():
    with pyflow.backend("triton" if INTERPRETED else "cuda"):
        pyflow.warmup(DEVICE, scale_maps=["tanh"], levels=[(5, 3)])


def test_codebook_usage():
    indices = torch.randint(-1, 20, (500,), generator=torch.Generator().manual_seed(0))
    got, want = ops.codebook_usage(indices.to(DEVICE), 30), ops.codebook_usage(indices, 30)
    assert torch.equal(got.counts.cpu(), want.counts)
    assert got.perplexity.item() == pytest.approx(want.perplexity.item(), rel=1e-6)
