"""Permutation and gamma tests: exact against dense formulas, calibrated, powerful, the same on every backend."""

from __future__ import annotations

import itertools
import math
import pickle
import sys

import numpy as np
import pytest
import torch

import pyflow
from pyflow import testing
from pyflow.benchmarks.hsic_power import SIMULATIONS, independent_clouds, power, rejections, table
from pyflow.stats import hsic_test

module = sys.modules["pyflow.stats.hsic_test"]


def data(n=40, seed=0, columns=(2, 3)):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, columns[0]))
    return x, 0.3 * x[:, :1] + rng.normal(size=(n, columns[1]))


def words(seed, r, n):
    """The Philox words of permutation r, through the public operator."""
    counter = torch.zeros(-(-n // 4), 4, dtype=torch.int64)
    counter[:, 0], counter[:, 2], counter[:, 3] = torch.arange(len(counter)), r, 5 << 24
    key = torch.tensor([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF])
    return pyflow.ops.philox(counter, key).flatten()[:n]


@pytest.mark.parametrize("n", [1, 2, 5, 64, 1000])
@pytest.mark.parametrize("seed", [0, 3 << 40 | 7, -1])
def test_permutations_are_stable_argsorts_of_philox_words(n, seed):
    drawn = module.draw(module._key("hsic_test", seed, torch.device("cpu")), 3, 4, n)
    assert drawn.dtype == torch.int32 and drawn.shape == (4, n)
    for row, r in zip(drawn, range(3, 7), strict=True):
        assert row.long().equal(words(seed, r, n).argsort(stable=True))


@pytest.mark.parametrize("estimator", ["biased", "biased_n2", "unbiased"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "kernels", [("rbf", None), ("laplacian", "linear"), ("polynomial", "rbf"), ("linear", "linear"), ("rbf", "delta")]
)
def test_statistic_and_null_are_hsic_of_permuted_rows(estimator, normalize, kernels):
    x, y = data()
    if kernels[1] == "delta":
        y = (y[:, 0] > 0).astype(int)
    options = {"kernel": kernels[0], "kernel_y": kernels[1], "estimator": estimator, "normalize": normalize}
    result = hsic_test(x, y, permutations=6, seed=5, **options)
    a, b = torch.from_numpy(x), torch.from_numpy(y)
    own = [
        pyflow.ops.hsic(v, v, kernel=k or kernels[0], estimator=estimator).item()
        for v, k in zip((a, b), kernels, strict=True)
    ]
    scale = 1 if normalize else math.sqrt(own[0] * own[1])
    assert result.statistic == pytest.approx(pyflow.ops.hsic(a, b, **options).item(), abs=2e-7 * scale)
    expected = [pyflow.ops.hsic(a, b[words(5, r, len(a)).argsort(stable=True)], **options).item() for r in range(6)]
    np.testing.assert_allclose(result.null, expected, atol=2e-7 * scale)
    assert result.null.dtype == np.float64 and result.method == "permutation"
    assert result.pvalue == (1 + np.sum(np.array(expected) >= result.statistic)) / 7


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("kernel", ["rbf", "linear"])
def test_without_matrices_the_result_is_the_same(estimator, kernel, monkeypatch):
    x, y = data(50)
    held = hsic_test(x, y, estimator=estimator, kernel=kernel, permutations=30)
    monkeypatch.setattr(module, "GRAM_ROWS", 10)
    tiled = hsic_test(x, y, estimator=estimator, kernel=kernel, permutations=30)
    assert tiled.pvalue == held.pvalue
    np.testing.assert_allclose(tiled.null, held.null, atol=1e-6 * np.abs(held.null).max())


def test_blocks_of_rows_change_nothing(monkeypatch):
    from pyflow.stats import _grams

    x, y = data(50)
    for options in ({"permutations": 20}, {"permutations": 20, "estimator": "unbiased"}, {"method": "gamma"}):
        whole = hsic_test(x, y, **options)
        monkeypatch.setattr(_grams, "BLOCK", 50 * 7)
        parts = hsic_test(x, y, **options)
        monkeypatch.undo()
        assert parts.pvalue == pytest.approx(whole.pvalue, rel=1e-12)
        np.testing.assert_allclose(parts.null, whole.null, rtol=1e-6)


def test_the_same_p_on_every_backend_and_thread_count():
    x, y = data(60)
    results = []
    for backend in ("auto", "reference"):
        for threads in (1, 2):
            with pyflow.backend(backend), testing.threads(threads):
                results.append(hsic_test(x, y, permutations=100, seed=9))
    assert len({r.pvalue for r in results}) == 1
    for other in results[1:]:
        np.testing.assert_allclose(other.null, results[0].null, rtol=1e-5)


def test_seeds():
    x, y = data()
    one, same, other = (hsic_test(x, y, permutations=20, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.null, same.null) and one.pvalue == same.pvalue
    assert not np.array_equal(one.null, other.null) and one.statistic == other.statistic
    longer = hsic_test(x, y, permutations=30, seed=1)
    np.testing.assert_allclose(longer.null[:20], one.null, rtol=1e-12)


def test_repeated_values_tie():
    """Of 2 x 2 labels most permutations give one of few statistics; equal ones count, whatever their last bits."""
    x = np.repeat([0, 1], 4)
    y = np.array([0, 0, 0, 1, 1, 1, 1, 0])
    result = hsic_test(x, y, permutations=2000, kernel="delta")
    # the diagonal and the other one of the table, with at most one off: 2 (16 + 1) of 70
    assert result.pvalue == pytest.approx(34 / 70, abs=4 * math.sqrt(0.25 / 2000))
    for scale in (1e-3, 1.0, 1e3):
        assert hsic_test(x * scale, y * 7.3, permutations=2000).pvalue == result.pvalue


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("kernel", ["delta", "rbf", "laplacian", "linear"])
def test_ties_of_binary_data_are_those_of_integers(kernel, held, monkeypatch):
    """HSIC of two binary variables is a function of one count, which says exactly which arrangements tie."""
    if not held:
        monkeypatch.setattr(module, "GRAM_ROWS", 10)
    n, count = 40, 300 if held else 40
    for seed in range(12 if held else 4):
        rng = np.random.default_rng(seed)
        x = rng.random(n) < 0.4 if seed % 3 else np.arange(n) % 2 == 0
        y = rng.random(n) < 0.5
        orders = module.draw(module._key("hsic_test", seed, torch.device("cpu")), 0, count, n).numpy()
        joint = np.array([(x & y[p]).sum() for p in (np.arange(n), *orders)])
        exact = (n * joint - x.sum() * y.sum()) ** 2
        # a unit that is no power of two, so that everything rounds
        a, b = (x, y) if kernel == "delta" else (0.3 * x, 7.1 * y)
        result = hsic_test(a, b, kernel=kernel, permutations=count, seed=seed)
        assert result.pvalue == (1 + (exact[1:] >= exact[0]).sum()) / (1 + count)
        # the equal ones are more than one in all but a few of these
        assert (exact[1:] == exact[0]).sum() > 0 or exact[0] > np.quantile(exact, 0.95)


LIKERT = np.array([1, 3, 2, 5, 4, 4, 2, 1, 3, 3, 5, 2]), np.array([2, 3, 1, 5, 5, 4, 1, 2, 3, 4, 4, 1])
LABELS = np.array([0, 1, 0, 0, 1, 1, 1, 1, 1, 0, 1, 1]), np.array([1, 3, 0, 2, 2, 2, 0, 0, 0, 1, 3, 1])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("repeats", [1, 24])
def test_ties_of_answers_and_labels_are_those_of_integers(seed, repeats):
    rng = np.random.default_rng(seed)
    answers, (labels, others) = (
        [np.tile(rng.permutation(v), repeats) for v in LIKERT],
        [np.tile(rng.permutation(v), repeats) for v in LABELS],
    )
    n, count = len(labels), 300
    orders = module.draw(module._key("hsic_test", seed, torch.device("cpu")), 0, count, n).numpy()
    orders = np.array([np.arange(n), *orders])
    # squared covariances: (n sum x y - sum x sum y)^2 of answers, and of every pair of labels
    a, b = answers
    linear = (n * (a * b[orders]).sum(1) - a.sum() * b.sum()) ** 2
    delta = sum(
        (n * ((labels == i) & (others[orders] == j)).sum(1) - (labels == i).sum() * (others == j).sum()) ** 2
        for i in range(2) for j in range(4)
    )  # fmt: skip
    for exact, kernel, x, y in ((linear, "linear", 0.3 * a, 7.1 * b), (delta, "delta", labels, others)):
        for options in ({}, {"normalize": True}):
            result = hsic_test(x, y, kernel=kernel, permutations=count, seed=seed, **options)
            assert result.pvalue == (1 + (exact[1:] >= exact[0]).sum()) / (1 + count), kernel


def test_ties_are_no_wider_than_rounding_where_n_is_large():
    rng, n = np.random.default_rng(1), 1_000_000
    x, z = rng.normal(size=(2, n))
    x, z = (x - x.mean()) / x.std(), z - z.mean()
    z -= x * (x @ z) / (x @ x)
    # three standard deviations of a correlation
    y = 3.1 / n**0.5 * x + z / z.std()
    result = hsic_test(x, y, kernel="linear", permutations=9, progress=False)
    assert result.pvalue == (1 + (result.null >= result.statistic).sum()) / 10 < 1


@pytest.mark.parametrize("kernel", ["rbf", "laplacian", "linear"])
def test_the_unit_of_the_data_does_not_matter(kernel):
    x, y = data()
    want = hsic_test(x, y, kernel=kernel, permutations=99, normalize=True)
    for unit, dtype in ((1e-25, np.float32), (1e20, np.float32), (1e160, np.float64), (1e-200, np.float64)):
        scaled = (unit * x).astype(dtype), y.astype(dtype)
        got = hsic_test(*scaled, kernel=kernel, permutations=99, normalize=True)
        assert got.pvalue == want.pvalue and got.statistic == pytest.approx(want.statistic, rel=1e-5)
        if kernel != "linear":
            for options in ({}, {"method": "gamma"}):
                plain = hsic_test(*scaled, kernel=kernel, permutations=99, **options)
                expected = hsic_test(x, y, kernel=kernel, permutations=99, **options)
                assert plain.pvalue == pytest.approx(expected.pvalue, rel=1e-4)
    for bandwidth in (1e10, 1e30):
        wide = [hsic_test(x, y, bandwidth=b, permutations=99, normalize=True) for b in (1e5, bandwidth)]
        assert wide[0].pvalue == wide[1].pvalue and wide[1].statistic == pytest.approx(wide[0].statistic, rel=1e-4)


@pytest.mark.parametrize("d", [1, 12])
@pytest.mark.parametrize("far", [1e5, 1e10])
def test_rows_far_from_others_cost_these_no_digits(far, d):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, d))
    y = x**2 + 0.1 * rng.normal(size=(60, d))
    x[[0, 3]] = far
    x[20:40] -= far
    k, m = (np.exp(-(np.linalg.norm(v[:, None] - v[None], axis=-1) ** 2) / 2) for v in (x, y))
    h = np.eye(60) - 1 / 60
    for method in ({"permutations": 1}, {"method": "gamma"}):
        result = hsic_test(x, y, bandwidth=1.0, **method)
        assert result.statistic == pytest.approx(((h @ k @ h) * m).sum() / 59**2, rel=1e-6)


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("dtype, far", [(np.float32, 1e30), (np.float32, 3e38), (np.float64, 1e300)])
def test_values_that_stand_for_missing_ones_cost_no_power(dtype, far, held, monkeypatch):
    x, y = data(60)
    y = np.abs(x[:, :1]) + 0.1 * y
    x[5] = 1e6
    want = hsic_test(x, y, permutations=99)
    x[5] = far
    if not held:
        monkeypatch.setattr(module, "GRAM_ROWS", 10)
    got = hsic_test(x.astype(dtype), y.astype(dtype), permutations=99)
    assert got.pvalue == want.pvalue == 0.01 and got.statistic == pytest.approx(want.statistic, rel=1e-4)


def test_what_is_not_finite_has_no_p():
    x, y = data()
    for options in ({}, {"estimator": "unbiased"}):
        with pytest.raises(
            ValueError, match=r"^hsic_test: the statistic and its null must be finite, got .*: scale x and y"
        ):
            hsic_test(1e160 * x, y, kernel="linear", permutations=20, **options)


def test_large_values_in_float32_tiles(monkeypatch):
    x, y = data()
    arguments = (1e7 * x.astype(np.float32), y.astype(np.float32))
    options = {"kernel": "polynomial", "kernel_y": "linear", "permutations": 20}
    held = hsic_test(*arguments, **options)
    monkeypatch.setattr(module, "GRAM_ROWS", 10)
    tiled = hsic_test(*arguments, **options)
    assert tiled.pvalue == held.pvalue
    np.testing.assert_allclose(tiled.null, held.null, rtol=1e-4)


def test_results_compare_and_have_a_hash():
    x, y = data()
    for options in ({"permutations": 20}, {"method": "gamma"}):
        one, same, other = (hsic_test(x, v, **options) for v in (y, y, y[::-1]))
        assert one == same and hash(one) == hash(same) and one != other and one != (1, 2)
        assert len({one, same, other}) == 2
    constant = [hsic_test(np.ones(20), np.arange(20), method="gamma") for _ in range(2)]
    assert constant[0] == constant[1] == pickle.loads(pickle.dumps(constant[0])) != one


def test_equal_rows_give_zero_and_one():
    x, _ = data()
    for constant in (np.full(40, 0.1), np.full((40, 3), 1e6, np.float32), [3] * 40):
        for options in (
            {}, {"estimator": "unbiased"}, {"kernel": "linear"}, {"kernel": "laplacian"}, {"normalize": True},
            {"method": "gamma"}, {"method": "gamma", "normalize": True},
        ):  # fmt: skip
            for pair in ((constant, x), (x, constant)):
                result = hsic_test(*pair, permutations=50, **options)
                assert result.statistic == 0 and result.pvalue == 1, options


def test_precomputed_matrices():
    x, y = data()
    k = np.exp(-((x[:, None] - x[None]) ** 2).sum(-1) / 2)
    m = y @ y.T
    given = hsic_test(k, m, kernel="precomputed", permutations=40)
    computed = hsic_test(x, y, kernel="rbf", bandwidth=1.0, kernel_y="linear", permutations=40)
    assert given.pvalue == computed.pvalue
    np.testing.assert_allclose(given.null, computed.null, rtol=1e-6)


def test_values_out_of_the_range_of_float32():
    x, y = data()
    small = hsic_test(x, y, kernel="polynomial", coef0=0.0, permutations=40)
    large = hsic_test(1e12 * x, 1e12 * y, kernel="polynomial", coef0=0.0, permutations=40)
    assert large.pvalue == small.pvalue
    assert large.statistic == pytest.approx(1e144 * small.statistic, rel=1e-6)


def test_gamma_is_the_formula():
    scipy = pytest.importorskip("scipy.stats")
    x, y = data(60)
    n = len(x)
    sigma = [np.median(np.linalg.norm(v[:, None] - v[None], axis=-1)[np.triu_indices(n, 1)]) for v in (x, y)]
    k, m = (
        np.exp(-(np.linalg.norm(v[:, None] - v[None], axis=-1) ** 2) / (2 * s**2))
        for v, s in zip((x, y), sigma, strict=True)
    )
    h = np.eye(n) - 1 / n
    kc, mc = h @ k @ h, h @ m @ h
    off = ~np.eye(n, dtype=bool)
    mean_x, mean_y = k[off].mean(), m[off].mean()
    mean = (n - 1) * (1 + mean_x * mean_y - mean_x - mean_y) / n**2
    variance = 72 * (n - 4) * (n - 5) / (n * (n - 1) * (n - 2) * (n - 3)) * ((kc * mc / 6) ** 2)[off].mean()
    expected = scipy.gamma.sf((kc * mc).sum() / n, mean**2 / variance, scale=n * variance / mean)
    for options in ({}, {"estimator": "biased_n2"}, {"normalize": True}):
        result = hsic_test(x, y, method="gamma", **options)
        assert result.pvalue == pytest.approx(expected, rel=1e-9)
        assert result.method == "gamma" and result.null.shape == pytest.approx(mean**2 / variance, rel=1e-9)
        again = scipy.gamma.sf(result.statistic, result.null.shape, scale=result.null.scale)
        assert again == pytest.approx(expected, rel=1e-9)
    permuted = hsic_test(x, y, permutations=2000)
    assert abs(permuted.pvalue - expected) < 0.03


def test_gamma_has_the_mean_of_all_permutations(monkeypatch):
    # as few as all of them can be made of
    monkeypatch.setattr(module, "GAMMA_ROWS", 6)
    rng = np.random.default_rng(0)
    n = 6
    x, y = rng.normal(size=(n, 2)), rng.normal(size=(n, 3))
    sigma = [np.median(np.linalg.norm(v[:, None] - v[None], axis=-1)[np.triu_indices(n, 1)]) for v in (x, y)]
    h = np.eye(n) - 1 / n
    kc, mc = (
        h @ np.exp(-(np.linalg.norm(v[:, None] - v[None], axis=-1) ** 2) / (2 * s**2)) @ h
        for v, s in zip((x, y), sigma, strict=True)
    )
    every = [(kc * mc[np.ix_(p, p)]).sum() / n**2 for p in map(list, itertools.permutations(range(n)))]
    null = hsic_test(x, y, method="gamma", estimator="biased_n2").null
    assert null.shape * null.scale == pytest.approx(np.mean(every), rel=1e-9)
    # where the spread of the null is small beside its mean, p would be 1 of a mean a little too large
    p = [hsic_test(*rng.normal(size=(2, 50, 200)), method="gamma").pvalue for _ in range(60)]
    assert 0.3 < np.median(p) < 0.7 and min(p) < 0.15


def test_calibrated():
    """Independent data are rejected at 5 % in 5 % of 1,000 sets, within three standard errors."""
    rate = rejections(independent_clouds, 40, 1000, permutations=200)
    assert abs(rate - 0.05) <= 3 * math.sqrt(0.05 * 0.95 / 1000)


def test_powerful():
    least = {"linear": 0.95, "circle": 0.75, "spiral": 0.2}
    rates = power([200], 25, {"permutation": {"permutations": 60}, "gamma": {"method": "gamma"}})
    for test, of in rates.items():
        assert of.keys() == SIMULATIONS.keys()
        for name, rate in least.items():
            assert of[name][0] >= rate, (test, name)
        assert of["independent clouds"][0] <= 0.2
    # two whole periods: the median of all distances is too wide a kernel for them
    assert rejections(SIMULATIONS["sine"], 200, 25, permutations=60, bandwidth=0.1) >= 0.6
    assert table([200], rates).count("\n") == 11


def test_bar_appears_for_long_tests_only(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    from pyflow.stats import _inputs

    x, y = data(20)
    hsic_test(x, y, permutations=10)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(_inputs, "PATIENCE", 0)
    hsic_test(x, y, permutations=10, progress=False)
    assert capsys.readouterr().err == ""
    for options, unit in (({}, "10/10"), ({"method": "gamma"}, "20/20")):
        hsic_test(x, y, permutations=10, **options)
        assert unit in capsys.readouterr().err
    monkeypatch.setattr(module, "GRAM_ROWS", 10)
    hsic_test(x, y, permutations=10)
    assert "10/10" in capsys.readouterr().err
