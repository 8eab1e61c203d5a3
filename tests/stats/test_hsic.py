"""HSIC in parts, over processes and by features: the values of pyflow.ops.hsic, or close to them as promised."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pyflow
from pyflow import _backend
from pyflow.stats import hsic

FOLDER = Path(__file__).parent
sharded_spec = importlib.util.spec_from_file_location("sharded_hsic", FOLDER / "sharded.py")
sharded = importlib.util.module_from_spec(sharded_spec)
sharded_spec.loader.exec_module(sharded)


def data(n=300, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(n, 3, dtype=dtype)
    return x, x[:, :2] ** 2 + 0.5 * torch.randn(n, 2, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"estimator": "unbiased"}, {"normalize": True}, {"kernel": "laplacian"}, {"kernel": "linear"}]
)
def test_parts_are_the_whole(options, dtype):
    x, y = data(dtype=dtype)
    value, error = hsic(x, y, **options)
    expected = pyflow.ops.hsic(x, y, **options).item()
    assert value == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 1e-12)
    assert error == 0 and isinstance(value, float)
    assert hsic(x.numpy(), y.numpy(), **options).value == value


def test_a_bar_over_the_parts(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    from pyflow.stats import _inputs

    monkeypatch.setattr(_inputs, "PATIENCE", 0)
    hsic(*data())
    assert "8/8" in capsys.readouterr().err
    hsic(*data(), progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_rows_over_processes(tmp_path):
    done = subprocess.run([sys.executable, str(FOLDER / "sharded.py"), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    x, y = sharded.rows()
    alone = [hsic(x, y, progress=False, **options).value for options in sharded.OPTIONS]
    for world in (2, 4):
        for rank in range(world):
            values, error = torch.load(tmp_path / f"{world}_{rank}.pt")
            assert values == alone
            assert error == "hsic: all processes must pass the same numbers of columns and dtypes, got others"


def test_group_needs_rows():
    x, y = data(20)
    with pytest.raises(ValueError, match=r"hsic: group must be None with approximate, got 'rff'"):
        hsic(x, y, group=object(), approximate="rff")
    with pytest.raises(ValueError, match=r"hsic: group must be None with a precomputed kernel"):
        hsic(x @ x.T, y, kernel="precomputed", kernel_y="rbf", group=object())
    with pytest.raises(ValueError, match=r"hsic: group must be of an initialised torch.distributed"):
        hsic(x, y, group=object())


@pytest.mark.parametrize(
    "kernel, estimator, normalize",
    [("rbf", "biased", False), ("rbf", "unbiased", True), ("laplacian", "unbiased", False),
     ("laplacian", "biased_n2", True)],
)  # fmt: skip
def test_random_features_are_unbiased_and_know_their_error(kernel, estimator, normalize):
    x, y = data(200)
    options = {"estimator": estimator, "normalize": normalize, "kernel": kernel}
    exact = hsic(x, y, **options).value
    runs = [hsic(x, y, approximate="rff", n_features=128, seed=seed, **options) for seed in range(40)]
    values, errors = np.array(runs).T
    # normalised, a ratio of unbiased estimates
    assert abs(values.mean() - exact) <= 4 * values.std() / 40**0.5 + (0.02 * abs(exact) if normalize else 0)
    assert values.std() == pytest.approx(errors.mean(), rel=0.4)
    assert runs[0] == hsic(x, y, approximate="rff", n_features=128, seed=0, **options)
    fine = hsic(x, y, approximate="rff", n_features=4096, **options)
    assert abs(fine.value - exact) <= 4 * fine.error < 4 * errors.mean()


@pytest.mark.parametrize("estimator", ["biased", "biased_n2"])
@pytest.mark.parametrize("kernel", ["rbf", "laplacian", "linear", "polynomial", "delta"])
def test_landmarks_bound_their_error(estimator, kernel):
    x, y = data(200, torch.float64)
    if kernel == "delta":
        x, y = (4 * x).round(), (4 * y).round()
    exact = hsic(x, y, kernel=kernel, estimator=estimator).value
    errors = []
    for n_features in (10, 40, 200):
        value, error = hsic(x, y, kernel=kernel, estimator=estimator, approximate="nystrom", n_features=n_features)
        assert value * (1 - 1e-12) <= exact <= value + error + 1e-12 * exact
        errors.append(error)
    # all rows are landmarks
    assert value == pytest.approx(exact, rel=1e-6) and errors[2] <= 1e-5 * exact + errors[0]
    unbiased = hsic(x, y, kernel=kernel, estimator="unbiased", approximate="nystrom", n_features=200).value
    scale = abs(hsic(x, x, kernel=kernel).value * hsic(y, y, kernel=kernel).value) ** 0.5
    assert unbiased == pytest.approx(hsic(x, y, kernel=kernel, estimator="unbiased").value, abs=1e-6 * scale)


def test_a_standard_error_needs_two_frequencies():
    x, y = data(30)
    assert hsic(x, y, approximate="rff", n_features=4).error > 0
    for n_features in (2, 3):
        assert pyflow.ops.hsic(x, y, approximate="rff", n_features=n_features) > 0
        with pytest.raises(
            ValueError, match=f"^hsic: n_features must be at least 4 for the error of 'rff', got {n_features}$"
        ):
            hsic(x, y, approximate="rff", n_features=n_features)


def test_a_drawn_seed_is_one_for_both_variables():
    x, _ = data(40)
    options = {"approximate": "nystrom", "n_features": 5, "seed": None, "normalize": True}
    assert pyflow.ops.hsic(x, x, **options).item() == pytest.approx(1, rel=1e-6)
    with pytest.raises(TypeError, match=r"^hsic: seed must be an integer or an int64 tensor, got float$"):
        pyflow.ops.hsic(x, x, approximate="rff", seed=1.5)


def test_values_beyond_float32():
    x, y = data(60)
    want = hsic(x, y, kernel="linear").value
    assert hsic(x * 2.0**60, y, kernel="linear").value == want * 2.0**120
    assert hsic(x * 2.0**-90, y, kernel="linear").value == want * 2.0**-180
    assert hsic(x * 2.0**90, y, kernel="linear", approximate="nystrom").value == pytest.approx(
        2.0**180 * hsic(x, y, kernel="linear", approximate="nystrom").value
    )


@pytest.mark.parametrize("approximate", ["rff", "nystrom"])
def test_approximations_in_the_operator(approximate, monkeypatch):
    from pyflow.hsic import features

    x, y = data(60, torch.float64)
    options = {"approximate": approximate, "n_features": 20}
    single = pyflow.ops.hsic(x, y, **options)
    assert single.item() == hsic(x, y, **options).value
    # a batch is its samples, and chunks of rows are the whole
    batch = pyflow.ops.hsic(torch.stack((x, y @ torch.ones(2, 3, dtype=y.dtype))), y, **options)
    assert batch.shape == (2,) and batch[0].item() == pytest.approx(single.item(), rel=1e-9)
    monkeypatch.setattr(features, "HELD", 20 * 7)
    assert pyflow.ops.hsic(x, y, **options).item() == pytest.approx(single.item(), rel=1e-9)
    x, sigma = x[:12].clone().requires_grad_(), torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    for estimator in ("biased", "unbiased"):
        assert torch.autograd.gradcheck(
            lambda x, y, s, estimator=estimator: pyflow.ops.hsic(
                x, y, bandwidth=s, bandwidth_y=1.0, estimator=estimator, normalize=True, **options | {"n_features": 6}
            ),
            (x, y[:12].clone().requires_grad_(), sigma),
        )
    low = pyflow.ops.hsic(x.detach().bfloat16(), y[:12].bfloat16(), **options)
    assert low.dtype == torch.float32
    constant = torch.full((30, 1), 0.1)
    value, error = hsic(constant, torch.randn(30), **options)
    assert abs(value) <= 1e-30 and error <= 1e-7


@pytest.mark.parametrize(
    "text, options",
    [
        ("hsic: approximate must be one of rff, nystrom, got 'svd'", {"approximate": "svd"}),
        ("hsic: n_features must be at least 2, got 1", {"approximate": "rff", "n_features": 1}),
        ("hsic: n_features must be at least 2, got 1", {"n_features": 1}),
        ("hsic: seed must fit 64 bits, got 18446744073709551616", {"seed": 2**64}),
        ("hsic: approximate 'rff' must have kernels rbf or laplacian, got linear",
         {"approximate": "rff", "kernel": "linear"}),
        ("hsic: the unbiased estimator needs at least 4 rows, got 3", {"approximate": "rff", "estimator": "unbiased"}),
        ("hsic: approximate 'nystrom' must have rows to choose from, got a precomputed matrix",
         {"approximate": "nystrom", "kernel": "precomputed"}),
    ],
)  # fmt: skip
def test_wrong_arguments(text, options):
    x = torch.eye(3)
    for function in (hsic, pyflow.ops.hsic):
        with pytest.raises(ValueError) as raised:
            function(x, x, **options)
        assert str(raised.value) == text


LARGE = """
import resource, torch, pyflow
from pyflow.stats import hsic
torch.manual_seed(0)
hsic(torch.randn(3000, 16), torch.randn(3000, 16))
n = {n}
x = torch.randn(n, 16)
y = x + torch.randn(n, 16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
value = hsic(x, y, {options}).value
print(value, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def peak(n, options=""):
    done = subprocess.run([sys.executable, "-c", LARGE.format(n=n, options=options)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    value, extra = map(float, done.stdout.split())
    return value, extra, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(bool(_backend.cpu_missing), reason="the reference makes the matrices")
def test_100_000_rows_in_256_MiB():
    """Two matrices would take 80 GB."""
    value, extra, shown = peak(100_000)
    assert 0 < value < 1 and extra < 256 * 2**20
    assert importlib.util.find_spec("tqdm") is None or "64/64" in shown


def test_features_of_many_rows_in_little_memory():
    value, extra, _ = peak(40_000, "approximate='rff', n_features=512")
    assert 0 < value < 1 and extra < 256 * 2**20
