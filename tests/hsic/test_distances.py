"""Kernels of distances are accurate at every bandwidth, and near rows next to far ones."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

import pyflow
from pyflow import ops, testing
from pyflow.hsic.median import median_distance

from .dense import ESTIMATORS, F32, F64, definition, dependent, draw, matrix, scale_of, scattered


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("factor", [0.1, 0.3, 0.5, 1.0, 3.0, 10.0, 100.0])
@pytest.mark.parametrize("n, d", [(64, 1), (64, 10), (512, 3), (1024, 20)])
@pytest.mark.parametrize("kernel", ["rbf", "laplacian"])
def test_is_accurate_at_every_bandwidth(kernel, n, d, factor, estimator):
    x, y = dependent(n, d)
    x, y = x + 1e3, y - 1e3
    p = 2.0 if kernel == "rbf" else 1.0
    sigma, sigma_y = (factor * median_distance(v.double(), p).item() for v in (x, y))
    got = ops.hsic(x, y, kernel=kernel, bandwidth=sigma, bandwidth_y=sigma_y, estimator=estimator)
    # even in float64, K loses digits at wide bandwidths and K - 1 at narrow ones
    form = kernel if factor < 1 else f"{kernel} less 1"
    k, m = matrix(x, form, sigma), matrix(y, form, sigma_y)
    testing.assert_within(got, definition(k, m, estimator), 1e-5 * scale_of(k, m, estimator))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("d", [1, 20])
@pytest.mark.parametrize("how", [1e4, 1e7, 1e12, "two clusters", "heavy tails"])
@pytest.mark.parametrize("kernel", ["rbf", "laplacian"])
def test_outlying_rows_do_not_reduce_accuracy(kernel, how, d, backend):
    if backend == "reference" and how in (1e7, 1e12):
        pytest.skip("the float64 dot products of the reference lose the distances at this separation")
    x, y = scattered(how, d)
    bandwidth = d**0.5 if kernel == "rbf" else float(d)
    k, m = matrix(x, kernel, bandwidth), matrix(y, kernel, bandwidth)
    leaf = x.clone().requires_grad_()
    with pyflow.backend(backend):
        for estimator in ESTIMATORS:
            got = ops.hsic(leaf, y, kernel=kernel, bandwidth=bandwidth, estimator=estimator)
            scale = math.sqrt(definition(k, k, estimator) * definition(m, m, estimator))
            want = definition(k, m, estimator)
            torch.testing.assert_close(
                got.double(), want, rtol=1e-5, atol=1e-7 * scale, msg=f"{estimator} {got - want:.2e}"
            )
        (gradient,) = torch.autograd.grad(got, leaf)
    exact = x.double().requires_grad_()
    with pyflow.backend("reference"):
        value = ops.hsic(exact, y.double(), kernel=kernel, bandwidth=bandwidth, estimator=estimator)
    (want,) = torch.autograd.grad(value, exact)
    error = 1e-2 if how == "two clusters" else 1e-4
    torch.testing.assert_close(gradient.double(), want, rtol=0, atol=error * want.abs().max().item())


@pytest.mark.parametrize("dtype, far", [(F32, 1e18), (F32, 1e30), (F32, 3.4e38), (F64, 1e100), (F64, 1e308)])
@pytest.mark.parametrize("small", [1.0, 1e-9])
@pytest.mark.parametrize("bandwidth", ["median", 1.0, torch.ones(())])
@pytest.mark.parametrize("kernel", ["rbf", "laplacian"])
def test_values_that_stand_for_missing_ones_do_not_reduce_accuracy(kernel, bandwidth, small, dtype, far):
    x, y = dependent(60, 2, F64)
    near = small * x
    near[0] = near[7] = 1e12 * small
    far_away = near.to(dtype, copy=True)
    far_away[0] = far_away[7] = far
    options = {"kernel": kernel, "bandwidth_y": bandwidth, "bandwidth": bandwidth}
    if bandwidth != "median":
        options["bandwidth"] = bandwidth * small
    got, want = ops.cka(far_away, y.to(dtype), **options), ops.cka(near, y, **options)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    leaf = far_away.requires_grad_()
    (gradient,) = torch.autograd.grad(ops.cka(leaf, y.to(dtype), **options), leaf)
    (want,) = torch.autograd.grad(ops.cka(near.requires_grad_(), y, **options), near)
    torch.testing.assert_close(gradient.double(), want, rtol=0, atol=1e-4 * want.abs().max().item())


def test_items_far_and_near_in_one_batch():
    x, y = dependent(40, 2)
    far = x.clone()
    far[3] = 1e30
    items, bandwidth = torch.stack((x, far, 1e-37 * x)), torch.tensor([1.0, 2.0, 1.0])
    got = ops.hsic(items, y, bandwidth=bandwidth, bandwidth_y=1.0)
    alone = [ops.hsic(z, y, bandwidth=b.item(), bandwidth_y=1.0) for z, b in zip(items, bandwidth, strict=True)]
    torch.testing.assert_close(got, torch.stack(alone), rtol=1e-5, atol=0)
    assert ops.hsic_matrix([far], [y], bandwidth=2.0, bandwidth_y=1.0)[0, 0] == pytest.approx(alone[1].item(), rel=1e-6)
    assert ops.nhsic(far, y).dtype == F32


@pytest.mark.parametrize("d", [1, 12])
@pytest.mark.parametrize("kernel", ["rbf", "laplacian"])
def test_bandwidths_far_from_the_data(kernel, d):
    x, y = dependent(30, d)
    wide = ops.cka(x.double(), y.double(), kernel=kernel, bandwidth=1e5)
    for bandwidth in (1e10, 1e20, 1e37, torch.tensor(1e30)):
        got = ops.cka(x, y, kernel=kernel, bandwidth=bandwidth)
        torch.testing.assert_close(got.double(), wide, rtol=1e-3, atol=0)
    for bandwidth in (1e-10, 1e-20, 1e-37, torch.tensor(1e-30)):
        assert ops.cka(x, y, kernel=kernel, bandwidth=bandwidth) == 1
    half = x.double().requires_grad_(), torch.tensor(1e200, dtype=F64, requires_grad=True)
    grads = torch.autograd.grad(ops.cka(half[0], y.double(), kernel=kernel, bandwidth=half[1], bandwidth_y=1.0), half)
    assert all(g.isfinite().all() for g in grads) and grads[0].abs().max() > 0


def test_bandwidths_may_be_numbers_of_any_type():
    x, y = dependent(12, 2)
    for one, same in ((2**70, 2.0**70), (Fraction(1, 4), 0.25)):
        assert ops.cka(x, y, bandwidth=one).equal(ops.cka(x, y, bandwidth=same))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_where_all_rows_are_far_apart(backend):
    # kernel values of 1e-28: the gradients of their sums leave the range of float32
    x, y = draw((8, 1)), (8 * torch.eye(8) + draw((8, 8), seed=1) / 20).requires_grad_()
    options = dict(kernel="rbf", bandwidth=1.0, estimator="unbiased")
    with pyflow.backend("reference"):
        leaf = y.detach().double().requires_grad_()
        want = torch.autograd.grad(ops.cka(x.double(), leaf, **options), leaf)[0]
    with pyflow.backend(backend):
        got = torch.autograd.grad(ops.cka(x, y, **options), y)[0]
    assert want.abs().max() > 1e-3
    testing.assert_within(got, want, 1e-4 * want.abs().max())
