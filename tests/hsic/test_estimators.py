"""Estimates of HSIC: their definition, covariances of linear kernels, and 0 where there is rounding only."""

from __future__ import annotations

import pytest
import torch

import pyflow
from pyflow import ops, testing

from .dense import ESTIMATORS, F32, F64, KERNELS, definition, dependent, draw, matrix, scale_of


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16, torch.float16])
def test_matches_the_definition(kernel, estimator, dtype):
    for n, d in [(4, 1), (5, 3), (63, 2), (128, 40), (129, 9), (300, 8)]:
        x, y = dependent(n, d, dtype, batch=(2,))
        got = ops.hsic(x, y, kernel=kernel, bandwidth=1.5, estimator=estimator)
        k, m = matrix(x, kernel, 1.5), matrix(y, kernel, 1.5)
        assert got.dtype == (F64 if dtype == F64 else F32)
        error = (1e-10 if dtype == F64 else 1e-5) * scale_of(k, m, estimator)
        testing.assert_within(got, definition(k, m, estimator), error, f"n = {n}, d = {d}")


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("bandwidth", [1.5, "median"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_batch_of_none(kernel, bandwidth, backend):
    x, y = torch.zeros(3, 0, 5, 2, requires_grad=True), torch.zeros(5, 1)
    options = {"kernel": kernel, "bandwidth": bandwidth}
    with pyflow.backend(backend):
        values = [ops.hsic(x, y, estimator=estimator, **options) for estimator in ESTIMATORS]
        values += [ops.hsic(x, x, normalize=True, **options), ops.cka(x, y, **options), ops.nhsic(x, x, **options)]
        matrix = ops.hsic_matrix([x, x], [x], **options)
    assert all(value.shape == (3, 0) for value in values) and matrix.shape == (3, 0, 2, 1)
    (grad,) = torch.autograd.grad(sum(v.sum() for v in values) + matrix.sum(), x)
    assert grad.shape == x.shape


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_linear_kernels_by_covariance_match_the_tiles(estimator):
    x, y = dependent(200, 5)
    feature = ops.hsic(x, y, kernel="linear", estimator=estimator)
    # the polynomial kernel of degree 1 uses tiles
    tiled = ops.hsic(x, y, kernel="polynomial", degree=1, gamma=1.0, coef0=0.0, estimator=estimator)
    torch.testing.assert_close(feature, tiled, rtol=1e-5, atol=1e-6)
    few = ops.hsic(x[:8], y[:8], kernel="linear", estimator=estimator)
    testing.assert_within(few, definition(matrix(x[:8], "linear"), matrix(y[:8], "linear"), estimator), 1e-5)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_covariances_keep_their_digits_beside_an_outlier_and_far_from_0(estimator, normalize):
    for seed in range(5):
        x, y = draw((50, 3), F64, seed), draw((50, 2), F64, seed + 100)
        y += x[:, :1].clamp(-2, 2)
        outlier, far = x.clone(), x + 1e3
        outlier[0] *= 1e3
        for one in (outlier, far):
            # what float32 holds of the data is exact
            a, b = one.float(), y.float()
            options = {"kernel": "linear", "estimator": estimator, "normalize": normalize}
            want, own = (ops.hsic(a.double(), other.double(), **options) for other in (b, a))
            most = 1 if normalize else (own * ops.hsic(b.double(), b.double(), **options)).sqrt()
            testing.assert_within(
                ops.hsic(a, b, **options), want, 1e-5 * torch.maximum(want, 1e-2 * torch.as_tensor(most))
            )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_layout_changes_no_bit(kernel, estimator):
    for n, d in [(7, 30), (14, 16), (63, 9), (324, 25)]:
        x, y = dependent(n, d)
        for dtype in (F32, F64):
            a, b = x.to(dtype), y.to(dtype)
            want = ops.hsic(a, b, kernel=kernel, bandwidth=3.0, estimator=estimator)
            got = ops.hsic(a.T.contiguous().T, b.T.contiguous().T, kernel=kernel, bandwidth=3.0, estimator=estimator)
            testing.assert_same_bits(got, want)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kernel", [*KERNELS, "delta", "precomputed"])
def test_equal_rows_give_zero(kernel, estimator, backend):
    """The sums round differently for the two variables: entries are not powers of two, and n may be odd."""
    with pyflow.backend(backend):
        for n in (5, 13, 40, 101):
            for d in (1, 3, 12):
                x, y = torch.full((n, d), 3.1 * n), torch.full((n, d), 0.7 * n)
                other = draw((n, d))
                if kernel == "precomputed":
                    x, y, other = x[:, :1].expand(n, n), y[:, :1].expand(n, n), other @ other.mT
                options = dict(kernel=kernel, estimator=estimator)
                assert ops.cka(x, y, **options) == ops.cka(x, other, **options) == ops.hsic(other, y, **options) == 0
                batch = torch.stack((x, other))
                assert (ops.hsic(batch, other, **options) == 0).tolist() == [
                    True,
                    ops.hsic(other, other, **options) == 0,
                ]
                if kernel in KERNELS:
                    leaf = batch.requires_grad_()
                    grad = torch.autograd.grad(ops.cka(leaf, other, **options).sum(), leaf)[0]
                    assert grad.isfinite().all() and grad[0].abs().max() == 0
                    assert ops.hsic_matrix([x], [y, other], normalize=True, **options).abs().max() == 0


def test_pure_rounding_error_gives_zero():
    a, b = draw((30, 1)), draw((30, 1), seed=1)
    # these matrices are 0 after centring without the diagonal
    assert ops.cka(a + a.mT, b + b.mT, kernel="precomputed") == 0
    for n in (6, 7, 64, 130):
        for kernel in KERNELS:
            assert ops.cka(torch.eye(n), 3 * torch.eye(n), kernel=kernel, estimator="unbiased") == 0
    assert ops.cka(torch.arange(9), torch.arange(9), kernel="delta", estimator="unbiased") == 0
