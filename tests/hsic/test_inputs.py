"""Inputs of HSIC: kernels of each variable, labels, NaN, error texts."""

from __future__ import annotations

import math

import pytest
import torch

import pyflow
from pyflow import ops, testing

from .dense import ESTIMATORS, F64, KERNELS, definition, dependent, matrix


def test_mixed_kernels_and_labels():
    x, y = dependent(90, 4)
    labels = (y[:, 0] > 0.5).long() + 10**15
    k = matrix(x, "rbf", 2.0)
    m = (labels[:, None] == labels).double()
    for estimator in ESTIMATORS:
        options = dict(kernel="rbf", bandwidth=2.0, kernel_y="delta", estimator=estimator)
        want = definition(k, m, estimator)
        for target in (labels, labels[:, None], (labels - 10**15).int(), (labels - 10**15).float()):
            testing.assert_within(ops.hsic(x, target, **options), want, 1e-6 * want.abs())
        options["kernel_y"] = "precomputed"
        testing.assert_within(ops.hsic(x, m.float(), **options), want, 1e-6 * want.abs())


@pytest.mark.parametrize(
    "dtype, step",
    [(torch.bool, 1), (torch.uint8, 1), (torch.int8, 1), (torch.int16, 1), (torch.uint16, 1), (torch.int32, 1),
     (torch.uint32, 1), (torch.int64, 1), (torch.uint64, 1), (torch.float64, 2.0**-52)],
)  # fmt: skip
def test_labels_one_step_apart_differ(dtype, step):
    groups = torch.arange(12) % (2 if dtype == torch.bool else 3)
    if dtype == torch.float64:
        labels = 1 + groups.double() * step
    else:
        last = 1 if dtype == torch.bool else torch.iinfo(dtype).max
        labels = torch.tensor([last - g for g in groups.tolist()], dtype=dtype)
    assert ops.cka(labels, groups, kernel="delta").item() == pytest.approx(1, rel=1e-12 if dtype == F64 else 1e-6)


def test_traced_nan_gives_nan():
    # values are not read while traced
    x, y = dependent(20, 2)
    x[3, 1] = math.nan
    compiled = torch.compile(lambda x, y: ops.hsic(x, y, bandwidth=1.0), backend="eager", fullgraph=True)
    assert compiled(x, y).isnan()


def test_traced_nan_gives_nan_when_normalised():
    x, y = dependent(20, 2)
    x[3, 1] = math.nan
    for kernel in KERNELS:
        f = lambda x, y: ops.cka(x, y, kernel=kernel, bandwidth=1.0)
        assert torch.compile(f, backend="eager", fullgraph=True)(x, y).isnan(), kernel


X = torch.zeros(6, 2)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda f: f([1.0], X), TypeError, "x must be a tensor, got list"),
        (lambda f: f(X, X.long()), TypeError, "y must be float32, float64, bfloat16 or float16, got int64; class labels need the kernel delta"),
        (lambda f: f(X[:, 0], X), ValueError, r"x must be \(\.\.\., n, d\), got a tensor of shape \(6,\)"),
        (lambda f: f(X[:, :0], X), ValueError, r"x must have at least one column, got shape \(6, 0\)"),
        (lambda f: f(X, X[:5]), ValueError, "all inputs must have the same number of rows, got 6 and 5"),
        (lambda f: f(X[:1], X[:1]), ValueError, "the biased estimator needs at least 2 rows, got 1"),
        (
            lambda f: f(X[:3], X[:3], estimator="unbiased"),
            ValueError,
            "the unbiased estimator needs at least 4 rows, got 3",
        ),
        (lambda f: f(X, X, allow_tf32="no"), TypeError, "allow_tf32 must be true or false, got str"),
        (lambda f: f(X, X, estimator="best"), ValueError, "estimator must be one of biased, .*, got 'best'"),
        (lambda f: f(X, X, kernel="cosine"), ValueError, "kernel must be one of rbf, .*, got 'cosine'"),
        (lambda f: f(X, X, kernel_y="cosine"), ValueError, "kernel_y must be one of rbf, .*, got 'cosine'"),
        (lambda f: f(X / 0, X), ValueError, "x must be finite, got NaN or infinity"),
        (lambda f: f(X, X - torch.inf), ValueError, "y must be finite, got NaN or infinity"),
        (lambda f: f(X, X, bandwidth=0), ValueError, "bandwidth must be positive and finite, got 0"),
        (lambda f: f(X, X, bandwidth=1, bandwidth_y=-1.0), ValueError, "bandwidth_y must be positive and finite, got -1.0"),
        (lambda f: f(X, X, bandwidth=1e40), ValueError, r"bandwidth must be from 1.18e-38 to 8.51e\+37 in float32, got 1e\+40"),
        (lambda f: f(X, X, bandwidth=1e-46), ValueError, r"bandwidth must be from 1.18e-38 to .* in float32, got 1e-46"),
        (
            lambda f: f(X, X, bandwidth=torch.tensor(1e40, dtype=F64)),
            ValueError,
            r"bandwidth must be from 1.18e-38 to .* in float32, got 1e\+40",
        ),
        (lambda f: f(X[:, :0], X, kernel="delta"), ValueError, r"x must have at least one column, got shape \(6, 0\)"),
        (lambda f: f(X / 0, X, kernel="delta"), ValueError, "x must be finite labels, got NaN or infinity"),
        (
            lambda f: f(torch.stack((torch.full((6, 6), 1e9), torch.triu(torch.ones(6, 6)))), X, kernel="precomputed", kernel_y="rbf"),
            ValueError,
            "x must be symmetric with a precomputed kernel, off by 1",
        ),
        (lambda f: f(X, X, bandwidth="mean"), ValueError, "bandwidth must be a number, a tensor or 'median', got 'mean'"),
        (lambda f: f(X, X, bandwidth=torch.zeros(())), ValueError, "bandwidth must be positive and finite, got 0"),
        (
            lambda f: f(X, X, bandwidth=torch.ones(3)),
            ValueError,
            r"bandwidth must broadcast to the batch dims \(\), got shape \(3,\)",
        ),
        (
            lambda f: f(X, X, bandwidth_y=torch.ones((), device="meta")),
            ValueError,
            "bandwidth_y must be on the device of its rows, cpu, got meta",
        ),
        (lambda f: f(X, X, kernel="polynomial", degree=0), ValueError, "degree must be at least 1, got 0"),
        # what this kernel does not use
        (lambda f: f(X, X, degree=0), ValueError, "degree must be at least 1, got 0"),
        (lambda f: f(X, X, gamma="scale"), TypeError, "gamma must be a number, got str"),
        (lambda f: f(X, X, kernel="linear", coef0=-1), ValueError, "coef0 must be at least 0 and finite, got -1"),
        (lambda f: f(X, X, kernel="linear", bandwidth=0), ValueError, "bandwidth must be positive and finite, got 0"),
        (lambda f: f(X, X, kernel="polynomial", degree=10**9), ValueError, "degree must be at most 100, got 1000000000"),
        (
            lambda f: f(X, X, kernel="polynomial", coef0=10**400),
            ValueError,
            "coef0 must fit into float64, got a larger number",
        ),
        (lambda f: f(X, X.to_sparse()), TypeError, "y must be a dense tensor, got sparse_coo"),
        (lambda f: f(X.to_sparse(), X, kernel="delta"), TypeError, "x must be a dense tensor, got sparse_coo"),
        (
            lambda f: f(X, X, kernel="precomputed"),
            ValueError,
            r"x must be square with a precomputed kernel, got shape \(6, 2\)",
        ),
        (
            lambda f: f(torch.arange(36.0).view(6, 6), X, kernel="precomputed", kernel_y="rbf"),
            ValueError,
            "x must be symmetric with a precomputed kernel, off by 25",
        ),
        (lambda f: f(X.expand(2, 6, 2), X.expand(3, 6, 2)), ValueError, r"leading dims must broadcast, got \(2,\), \(3,\)"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(call, error, text, backend):
    for name in ("hsic", "cka"):
        with pyflow.backend(backend), pytest.raises(error, match=f"^{name}: {text}$"):
            call(getattr(ops, name))


def test_bad_input_of_other_functions():
    with pytest.raises(ValueError, match=r"^hsic_matrix: xs and ys must not be empty, got 0 and 1 tensors$"):
        ops.hsic_matrix([], [X])
    for wrong in (None, 3, torch.zeros(())):
        with pytest.raises(TypeError, match=f"^hsic_matrix: ys must be a list of tensors, got {type(wrong).__name__}$"):
            ops.hsic_matrix([X], wrong)
    with pytest.raises(TypeError, match=r"^cka: normalize is always on$"):
        ops.cka(X, X, normalize=False)
    with pytest.raises(TypeError, match=r"^cka: options must be those of hsic, got kernels$"):
        ops.cka(X, X, kernels="rbf")


@pytest.mark.parametrize("kernel, approximate", [("linear", "rff"), ("precomputed", "nystrom")])
def test_a_refused_approximation_draws_no_seed(kernel, approximate):
    x = torch.eye(8)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"^hsic: approximate '{approximate}' must have "):
        ops.hsic(x, x, kernel=kernel, approximate=approximate, seed=None)
    assert torch.equal(torch.get_rng_state(), state)
