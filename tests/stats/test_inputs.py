"""Arrays, lists, tables, labels and integers that users pass, and what is refused, through `hsic_test`."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

import pyflow
from pyflow.stats import hsic, hsic_test


def data(n=40, seed=0, columns=(2, 3)):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, columns[0]))
    return x, 0.3 * x[:, :1] + rng.normal(size=(n, columns[1]))


def test_labels_of_any_kind():
    rng = np.random.default_rng(0)
    groups, y = rng.integers(0, 3, 40), rng.normal(size=40)
    want = hsic_test(groups, y, kernel="delta", kernel_y="rbf", permutations=50)
    names = np.array(["a", "b", "c"])
    kinds = [names[groups], names.astype(object)[groups], names.astype("S")[groups], groups.astype("M8[D]")]
    kinds += [names[groups].tolist(), np.uint64(2**64 - 3) + groups.astype(np.uint64), groups + 2**62]
    kinds += [torch.from_numpy(np.uint32(2**32 - 3) + groups.astype(np.uint32))]
    if importlib.util.find_spec("pandas"):
        pandas = importlib.import_module("pandas")
        kinds += [pandas.Series(names[groups]), pandas.Series(names[groups], dtype="category")]
    for labels in kinds:
        got = hsic_test(labels, y, kernel="delta", kernel_y="rbf", permutations=50)
        assert got == want
    # numbers of 64 bits without a sign are numbers
    large = np.array([2**64 - 1, 2**63, 2**62, 2**61, 5, 0], np.uint64)
    assert hsic_test(large, y[:6], permutations=5) == hsic_test(large.astype(float), y[:6], permutations=5)


def test_inputs_of_every_kind():
    x, y = data(columns=(1, 1))
    expected = hsic_test(x, y, permutations=50)
    flipped = np.ascontiguousarray(x[::-1])[::-1]
    for a, b in (
        (x[:, 0], y[:, 0]), (x.tolist(), y.tolist()), (torch.from_numpy(x), y), (flipped, y),
        (x.astype(x.dtype.newbyteorder(">")), y), (torch.from_numpy(x).requires_grad_(), y),
    ):  # fmt: skip
        result = hsic_test(a, b, permutations=50)
        assert result.pvalue == expected.pvalue and result.statistic == expected.statistic
    single = hsic_test(x.astype(np.float32), torch.from_numpy(y).float(), permutations=50)
    assert single.statistic == pytest.approx(expected.statistic, rel=1e-5)
    counts = np.round(3 * x).astype(np.uint16)
    assert (
        hsic_test(counts, y, permutations=50).statistic == hsic_test(counts.astype(float), y, permutations=50).statistic
    )
    assert isinstance(expected.statistic, float) and isinstance(expected.pvalue, float)
    assert "null" not in repr(expected)


def test_tables_whose_columns_differ_in_type():
    pandas = pytest.importorskip("pandas")
    numbers = np.random.default_rng(0).integers(0, 9, 20)
    table = pandas.DataFrame(
        {"a": pandas.array(numbers, dtype="Int64"), "b": numbers / 7, "c": numbers > 4, "d": pandas.array(numbers > 2)}
    )
    plain = np.stack((numbers, numbers / 7, numbers > 4, numbers > 2), 1)
    assert hsic_test(table, numbers, permutations=19) == hsic_test(plain, numbers, permutations=19)
    table.loc[3, "a"] = pandas.NA
    for options in ({}, {"kernel": "delta", "kernel_y": "rbf"}):
        with pytest.raises(
            ValueError, match=r"^hsic_test: x must have no missing values, got one in row 3 of column 'a'$"
        ):
            hsic_test(table, numbers, **options)


def test_columns_of_tables():
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 20))
    want = hsic(x, y)
    for kind in ("float64", "Float64", "object", "category"):
        column = pandas.Series(x, dtype=kind)
        assert hsic(column, y) == hsic(column.to_frame(), pandas.Series(y)) == want
    labels = pandas.Series(rng.integers(0, 3, 20)).map({0: "a", 1: "b", 2: "c"})
    assert hsic(labels, y, kernel="delta", kernel_y="rbf") == hsic(list(labels), y, kernel="delta", kernel_y="rbf")
    x[5] = np.nan
    gaps = [pandas.Series(x), pandas.Series(x, dtype="Float64"), pandas.Series(x, dtype="object"), pandas.Index(x)]
    for column in gaps:
        with pytest.raises(ValueError, match=r"^hsic: x must have no missing values, got one in row 5$"):
            hsic(column, y)
    with pytest.raises(ValueError, match=r"^hsic: x must have no missing values, got one in row 2$"):
        hsic(labels.where(labels.index != 2), y, kernel="delta", kernel_y="rbf")
    days = pandas.date_range("2020", periods=20)
    for wrong, text in [
        (labels, "str"), (labels.to_frame("c"), "str of column 'c'"), (days, r"datetime64\[.s\]"),
        (pandas.DataFrame({"y": y, "day": days}), "Timestamp of column 'day'"),
    ]:  # fmt: skip
        with pytest.raises(TypeError, match=f"^hsic: x must hold numbers, got {text}$"):
            hsic(wrong, y)


X = np.arange(12.0).reshape(6, 2)
HIDDEN = np.ma.masked_array(X, X == 3)


def test_masked_arrays_without_a_masked_element_are_arrays():
    assert hsic_test(np.ma.masked_array(X), X, permutations=9) == hsic_test(X, X, permutations=9)


@pytest.mark.parametrize("kernel", ["rbf", "laplacian", "linear"])
@pytest.mark.parametrize("start", [-(2**63), -(2**60), 2**62, 2**63, 2**64 - 40])
def test_integers_beyond_2_to_the_53_keep_their_differences(start, kernel):
    x, y = np.arange(40), np.arange(40.0) ** 2
    large = [start + n for n in range(40)]
    array = np.array(large, np.int64 if start < 2**63 else np.uint64)
    want = hsic_test(x, y, kernel=kernel, permutations=49)
    for given in (array, torch.from_numpy(array)):
        got = hsic_test(given, y, kernel=kernel, permutations=49)
        assert got.pvalue == want.pvalue == 0.02 and got.statistic == pytest.approx(want.statistic, rel=1e-9)
    beyond = [2**70 + n for n in x.tolist()]
    mixed = np.array([[a, b] for a, b in zip(large, beyond, strict=True)], object)
    for given, plain in ((beyond, x), (mixed, np.stack((x, x), 1))):
        got, want = (hsic_test(each, y, kernel=kernel, permutations=49) for each in (given, plain))
        assert got.pvalue == want.pvalue == 0.02 and got.statistic == pytest.approx(want.statistic, rel=1e-9)
    ends = np.array([-(2**63), 2**63 - 1] * 20)
    assert 0.05 < hsic_test(ends, y, kernel=kernel, permutations=49).pvalue <= 1


@pytest.mark.parametrize(
    "error, text, arguments, options",
    [
        (ValueError, "hsic_test: all inputs must have the same number of rows, got 6 and 5", (X, X[:5]), {}),
        (ValueError, "hsic_test: the biased estimator needs at least 2 rows, got 1", (X[:1], X[:1]), {}),
        (ValueError, "hsic_test: the unbiased estimator needs at least 4 rows, got 3", (X[:3], X[:3]),
         {"estimator": "unbiased"}),
        (ValueError, "hsic_test: the gamma method needs at least 20 rows, got 19", (np.arange(19), np.arange(19)),
         {"method": "gamma"}),
        (ValueError, "hsic_test: the gamma method must have a biased estimator, got unbiased", (X, X),
         {"method": "gamma", "estimator": "unbiased"}),
        (ValueError, "hsic_test: the gamma method must have kernels rbf, laplacian or delta, got linear", (X, X),
         {"method": "gamma", "kernel": "linear"}),
        (ValueError, "hsic_test: x must be finite, got NaN or infinity", (np.where(X == 3, np.nan, X), X), {}),
        (ValueError, "hsic_test: y must be finite, got NaN or infinity", (X, np.where(X == 3, np.inf, X)), {}),
        (ValueError, "hsic_test: bandwidth must be positive and finite, got 0", (X, X), {"bandwidth": 0}),
        (ValueError, "hsic_test: bandwidth_y must be positive and finite, got -1.0", (X, X), {"bandwidth_y": -1.0}),
        (ValueError, "hsic_test: x must be square with a precomputed kernel, got shape (6, 2)", (X, X),
         {"kernel": "precomputed"}),
        (ValueError, "hsic_test: x must be symmetric with a precomputed kernel, off by", (X @ X.T + np.triu(X @ X.T),
         X @ X.T), {"kernel": "precomputed"}),
        (ValueError, "hsic_test: permutations must be at least 1, got 0", (X, X), {"permutations": 0}),
        (TypeError, "hsic_test: permutations must be an integer, got float", (X, X), {"permutations": 10.0}),
        (ValueError, "hsic_test: method must be one of permutation, gamma, got 'exact'", (X, X), {"method": "exact"}),
        (ValueError, "hsic_test: estimator must be one of biased, biased_n2, unbiased, got 'v'", (X, X),
         {"estimator": "v"}),
        (ValueError, "hsic_test: kernel must be one of rbf,", (X, X), {"kernel": "gauss"}),
        (ValueError, "hsic_test: kernel_y must be one of rbf,", (X, X), {"kernel_y": np.array(["rbf", "rbf"])}),
        (TypeError, "hsic_test: normalize must be true or false, got str", (X, X), {"normalize": "no"}),
        (TypeError, "hsic_test: seed must be an integer, got NoneType", (X, X), {"seed": None}),
        (TypeError, "hsic_test: seed must be an integer or an int64 tensor, got float", (X, X), {"seed": 0.5}),
        (ValueError, "hsic_test: x must be (n,) or (n, d), got shape (1, 6, 2)", (X[None], X), {}),
        (ValueError, "hsic_test: x must be (n,) or (n, d), got shape ()", (1.0, X), {}),
        (TypeError, "hsic_test: y must hold numbers, got <U1", (X, list("abcdef")), {}),
        (TypeError, "hsic_test: x must hold numbers, got complex128", (X * 1j, X), {}),
        (TypeError, "hsic_test: x must hold numbers, got dict", ([{}] * 6, X), {}),
        (ValueError, "hsic_test: x must have no missing values, got None", ([None, *range(5)], X), {}),
        (ValueError, "hsic_test: x must have no missing values, got NaT",
         (np.array(["2020", "NaT", "2020", "2021", "2022", "2020"], "M8[Y]"), X), {"kernel": "delta", "kernel_y": "rbf"}),
        (ValueError, "hsic_test: y must fit into float64, got a larger number", (X, [10**400, *range(5)]), {}),
        (ValueError, "hsic_test: x must have no missing values, got a masked array with some", (HIDDEN, X), {}),
        (ValueError, "hsic_test: y must have no missing values, got a masked array with some", (X, list(HIDDEN)), {}),
        (ValueError, "hsic_test: x must have no missing values, got a masked array with some", (HIDDEN, X),
         {"kernel": "delta"}),
        (TypeError, "hsic_test: x must be a dense tensor, got sparse_coo", (torch.eye(6).to_sparse(), X), {}),
        (ValueError, "hsic_test: y must have values, got a meta tensor", (X, torch.zeros(6, device="meta")), {}),
        (ValueError, "hsic_test: degree must be at most 100, got 1000000000", (X, X),
         {"kernel": "polynomial", "degree": 10**9}),
        (ValueError, "hsic_test: gamma must fit into float64, got a larger number", (X, X),
         {"kernel": "polynomial", "gamma": 10**400}),
        (ValueError, "hsic_test: x must have rows of one length, got others", ([[1.0, 2.0], [3.0]], X), {}),
        (ValueError, "hsic_test: x must be labels that equal themselves, got NaN", (["a", float("nan"), None, 1, 2, 3], X),
         {"kernel": "delta"}),
        (TypeError, "hsic_test: x must hold numbers or labels with a hash, got object", ([{}, 1, 2, 3, 4, 5], X),
         {"kernel": "delta"}),
        (ValueError, "hsic_test: bandwidth must be from 2.23e-308 to 4.49e+307 in float64, got 1e-310", (X, X),
         {"bandwidth": 1e-310}),
    ],
)  # fmt: skip
def test_wrong_arguments(error, text, arguments, options):
    for backend in ("auto", "reference"):
        with pyflow.backend(backend), pytest.raises(error) as raised:
            hsic_test(*arguments, **options)
        assert text in str(raised.value)
