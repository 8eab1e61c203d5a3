"""`Hsic` against its definition and, where hyppo is installed, against hyppo's results and under hyppo's own tests."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, pdist
from scipy.stats import chi2

from pyflow.stats import Hsic, IndependenceTestOutput, hsic_test

KERNELS = [("gaussian", {"gamma": 0.3}), ("laplacian", {}), ("laplacian", {"gamma": 0.7})]


def data(n=40, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 2))
    return x, np.sin(x[:, :1]) + rng.normal(size=(n, 1))


def correlation(k, m, bias):
    """Return the ratio of HSIC from kernel matrices, by centring them."""
    n = len(k)
    over = np.array([n, n, n * n]) if bias else np.array([n - 2, n - 2, (n - 1) * (n - 2)])
    centred = []
    for gram in (k, m):
        gram = gram if bias else gram - np.diag(np.diag(gram))
        gram = gram - gram.sum(0) / over[0] - gram.sum(1)[:, None] / over[1] + gram.sum() / over[2]
        centred.append(gram if bias else gram - np.diag(np.diag(gram)))
    ratio = (centred[0] * centred[1]).sum() / math.prod(np.linalg.norm(c) for c in centred)
    return math.sqrt(ratio) if bias else ratio


def gaussian(v, gamma=None):
    return np.exp(-(cdist(v, v) ** 2) * (gamma or 1 / (2 * np.median(pdist(v)) ** 2)))


GRAMS = [
    ("gaussian", {}, gaussian),
    ("rbf", {"gamma": 0.3}, lambda v: gaussian(v, 0.3)),
    ("laplacian", {}, lambda v: np.exp(-cdist(v, v, "cityblock") / v.shape[1])),
    ("laplacian", {"gamma": 2}, lambda v: np.exp(-2 * cdist(v, v, "cityblock"))),
    ("linear", {}, lambda v: v @ v.T),
    ("poly", {"degree": 2, "coef0": 0.5}, lambda v: (v @ v.T / v.shape[1] + 0.5) ** 2),
    (lambda v, power: (v @ v.T) ** power, {"power": 2}, lambda v: (v @ v.T) ** 2),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel, options, gram", GRAMS)
def test_statistic_is_the_ratio_of_hsic(kernel, options, gram, bias):
    x, y = data()
    want = correlation(gram(x), gram(y), bias)
    test = Hsic(kernel, bias, **options)
    assert test.statistic(x, y) == test.stat == pytest.approx(want, rel=1e-9)
    for matrices in (None, "precomputed"):
        assert Hsic(matrices, bias).statistic(gram(x), gram(y)) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("bias", [False, True])
def test_every_call_returns_one_statistic(bias):
    x, y = data()
    test = Hsic(bias=bias)
    want = test.statistic(x, y)
    for auto in (False, True, False):
        result = test.test(x, y, reps=50, auto=auto)
        assert isinstance(result, IndependenceTestOutput) and (test.stat, test.pvalue) == result
        assert result.stat == test.statistic(x, y) == want


def test_p_of_permutations_is_that_of_hsic_test():
    x, y = data()
    want = hsic_test(x, y, permutations=99, seed=7, estimator="unbiased", normalize=True)
    test = Hsic()
    assert test.test(x, y, 99, auto=False, random_state=7).pvalue == want.pvalue
    assert np.array_equal(test.null_dist, want.null)
    # up to 20 rows, p is never approximated
    assert Hsic().test(x[:20], y[:20], 99, random_state=7) == Hsic().test(
        x[:20], y[:20], 99, auto=False, random_state=7
    )
    biased = Hsic(bias=True)
    result = biased.test(x, y, 99, random_state=7)
    assert result.pvalue == hsic_test(x, y, permutations=99, seed=7).pvalue
    assert (1 + (biased.null_dist >= result.stat).sum()) / 100 == result.pvalue


def test_approximate_p():
    for n in (21, 60):
        x, y = data(n)
        test = Hsic()
        stat, p = test.test(x, y)
        assert p == pytest.approx(chi2.sf(n * stat + 1, 1), rel=1e-9) and test.null_dist is None
    # where n statistic + 1 < 0
    stat, p = Hsic("linear").test(np.tile([1, -1], 12), np.repeat([1, -1], 12))
    assert 24 * stat < -1 and p == 1


def test_random_state_decides_the_permutations():
    x, y = data(15, 3)
    nulls = []

    def null(state):
        test = Hsic()
        test.test(x, y, 20, random_state=state)
        return test.null_dist.tolist()

    for make in (lambda: 2, lambda: np.int64(2), lambda: np.random.RandomState(2), lambda: np.random.default_rng(2)):
        nulls.append(null(make()))
        assert null(make()) == nulls[-1]
    assert nulls[0] == nulls[1] != nulls[2] != nulls[3]
    generator = np.random.default_rng(2)
    assert null(generator) != null(generator)
    state = np.random.get_state()
    try:
        np.random.seed(5)
        first, second = null(None), null(None)
        np.random.seed(5)
        assert null(None) == first != second
    finally:
        np.random.set_state(state)


def test_samples_of_every_kind():
    x, y = data(30)
    want = Hsic().test(x, y)
    single = Hsic().test(torch.from_numpy(x).float(), y.astype(np.float32))
    assert single == pytest.approx(want, rel=1e-4)
    assert Hsic().test(x.tolist(), torch.from_numpy(y)[:, 0]) == want
    numbers = np.arange(30)
    assert Hsic().test(numbers, numbers) == Hsic().test(numbers.astype(float), numbers)


def test_pandas_tables():
    pandas = pytest.importorskip("pandas")
    x, y = data(30)
    table, column = pandas.DataFrame(x, columns=["a", "b"]), pandas.Series(y[:, 0])
    # rows are paired by position, not by index
    column.index = column.index[::-1]
    for options in ({}, {"compute_kernel": lambda v: v @ v.T}):
        assert Hsic(**options).test(table, column) == Hsic(**options).test(x, y)
    table.loc[4, "b"] = None
    with pytest.raises(ValueError, match=r"^Hsic: x must have no missing values, got one in row 4 of column 'b'$"):
        Hsic().test(table, column)
    with pytest.raises(TypeError, match=r"^Hsic: x must hold numbers, got str of column 'c'$"):
        Hsic().statistic(table.assign(b=1, c="q"), column)


def test_constant_variables_are_independent():
    for n in (15, 30):
        for kernel in ("gaussian", "linear"):
            assert Hsic(kernel).test(np.ones(n), np.arange(n), 20) == (0.0, 1.0)
            assert Hsic(kernel).test(np.arange(n), np.ones(n), 20) == (0.0, 1.0)


def test_copies_and_pickles():
    test = Hsic("laplacian", gamma=0.5)
    x, y = data(15)
    for other in (copy.deepcopy(test), pickle.loads(pickle.dumps(test))):
        assert other.statistic(x, y) == test.statistic(x, y)


X = np.arange(12.0).reshape(6, 2)
WRONG = [
    (ValueError, "compute_kernel must be one of gaussian, rbf, laplacian, linear, poly, polynomial, precomputed, got 'chi2'",
     lambda: Hsic("chi2")),
    (TypeError, "parameters of gaussian must be of gamma, got degree", lambda: Hsic(degree=2)),
    (TypeError, "parameters of None must be of none, got gamma", lambda: Hsic(None, gamma=2)),
    (TypeError, "bias must be true or false, got str", lambda: Hsic(bias="no")),
    (ValueError, "gamma must be positive and finite, got -1", lambda: Hsic(gamma=-1).statistic(X, X)),
    (ValueError, "reps must be at least 1, got 0", lambda: Hsic().test(X, X, 0)),
    (TypeError, "reps must be an integer, got float", lambda: Hsic().test(X, X, 1e3)),
    (TypeError, "auto must be true or false, got str", lambda: Hsic().test(X, X, auto="no")),
    (TypeError, "random_state must be None, an integer or a NumPy generator, got str",
     lambda: Hsic().test(X, X, random_state="2")),
    (ValueError, "random_state must fit 64 bits, got 1180591620717411303424",
     lambda: Hsic().test(X, X, random_state=2**70)),
    (ValueError, "degree must be at least 1, got 0", lambda: Hsic("poly", degree=0).test(X, X)),
    (ValueError, "x must be (n,) or (n, d), got shape (1, 6, 2)", lambda: Hsic().test(X[None], X)),
    (TypeError, "y must hold numbers, got <U1", lambda: Hsic().statistic(X, list("abcdef"))),
]  # fmt: skip


@pytest.mark.parametrize("error, text, call", WRONG, ids=[text for _, text, _ in WRONG])
def test_wrong_arguments(error, text, call):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == f"Hsic: {text}"


def test_wrong_samples():
    for arguments, text in [
        ((X, X[:5]), "all inputs must have the same number of rows, got 6 and 5"),
        ((X[:3], X[:3]), "the unbiased estimator needs at least 4 rows, got 3"),
        ((np.where(X == 3, np.nan, X), X), "x must be finite, got NaN or infinity"),
    ]:
        with pytest.raises(ValueError, match=f"^Hsic: {text}$"):
            Hsic().test(*arguments)


@pytest.fixture(scope="module")
def hyppo():
    """hyppo's tests of HSIC, with hyppo's functions left uncompiled: compilation takes 15 s."""
    numba = pytest.importorskip("numba", reason="hyppo, or numba that it needs, is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numba.config, "DISABLE_JIT", True)
        return pytest.importorskip("hyppo.independence.tests.test_hsic", reason="hyppo is not installed")


@pytest.mark.parametrize("kernel, options", KERNELS)
def test_statistic_and_p_are_those_of_hyppo(hyppo: ModuleType, kernel, options):
    x, y = data(30)
    want, got = hyppo.Hsic(kernel, **options).test(x, y), Hsic(kernel, **options).test(x, y)
    assert got == pytest.approx(want, rel=1e-9)
    want = hyppo.Hsic(kernel, bias=True, **options).statistic(x, y)
    assert Hsic(kernel, bias=True, **options).statistic(x, y) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize(
    "group, name, arguments",
    [
        ("TestHsicStat", "test_linear_oned", (100, 1.0, 1 / 1000)),
        ("TestHsicStat", "test_linear_oned", (200, 1.0, 1 / 1000)),
        ("TestHsicStat", "test_kernstat", ()),
        ("TestHsicStat", "test_rep", (100,)),
        ("TestHsicStat", "test_rep", (200,)),
        pytest.param("TestHsicTypeIError", "test_oned", (), marks=pytest.mark.slow),
        pytest.param("TestHsicTypeIError", "test_oned_fast", (), marks=pytest.mark.slow),
    ],
)
def test_hyppos_own_tests(hyppo: ModuleType, monkeypatch, group, name, arguments):
    # hyppo's `power` takes the class from this table
    monkeypatch.setitem(sys.modules["hyppo.independence"].INDEP_TESTS, "hsic", Hsic)
    monkeypatch.setattr(hyppo, "Hsic", Hsic)
    getattr(getattr(hyppo, group)(), name)(*arguments)
