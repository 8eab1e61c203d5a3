"""HSIC on a GPU, against the reference in float64.

hsic has no CUDA kernels: with that backend the reference runs on the GPU.
"""

from __future__ import annotations

import pytest
import torch

import pyflow
from pyflow import ops, testing
from pyflow.hsic.median import median_distance
from pyflow.ops.hsic import permuted
from pyflow.reference import hsic as reference

from .common import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    assert_near,
    check_compiled,
    check_graph,
    draw,
    few,
    moved,
    needs_cuda,
    run,
)  # fmt: skip

F32, F64, BF16, F16 = DTYPES
KERNELS = ("rbf", "laplacian", "linear", "polynomial", "delta", "precomputed")
ESTIMATORS = ("biased", "biased_n2", "unbiased")
# 1, few (squares of differences), many features, a multiple of 16; odd numbers of rows and one more than a tile's
SIZES = [(4, 1), (33, 3), (40, 20)] + [(63, 40), (129, 64), (300, 8), (513, 20)] * (not INTERPRETED)


@pytest.fixture
def tiles(gpu):
    """The backend, skipping CUDA, which has no HSIC kernels."""
    if gpu == "cuda":
        pytest.skip("hsic has no CUDA kernels")
    return gpu


def dependent(n, d=3, dtype=F32, batch=(), seed=0):
    """Return x and y, y being |x| plus noise."""
    x = draw((*batch, n, d), F64, seed)
    return x.to(dtype), (x.abs() + 0.5 * draw((*batch, n, d), F64, seed + 1)).to(dtype)


def data(kernel, n, d, dtype=F32, batch=()):
    if kernel == "precomputed":
        # sums of eighths are exact in every dtype
        return [(v * 8).round() / 8 for v in dependent(n, n, dtype, batch)]
    return dependent(n, d, dtype, batch)


def hsic(kernel, **options):
    """Return HSIC as a function of x and y, from which labels or symmetric matrices are made."""
    options = {"bandwidth": 1.5, **options}

    def function(x, y, *bandwidth):
        given = {**options, **dict(zip(("bandwidth",), bandwidth, strict=False))}
        if kernel == "delta":
            return ops.hsic(x, (y.detach() > 0.25).long(), kernel="rbf", kernel_y="delta", **given)
        if kernel == "precomputed":
            x, y = x + x.mT, y + y.mT
        return ops.hsic(x, y, kernel=kernel, **given)

    return function


def exact(function, leaves):
    """Return outputs and gradients of the float64 reference."""
    return run("reference", "cpu", function, [v.double() for v in leaves])


def check_value(kernel, x, y, error=None, **options):
    """Compare relative to the value, at least to 1 % of its upper bound: the unbiased estimate crosses zero."""
    got, function = hsic(kernel, **options)(*moved((x, y))), hsic(kernel, **options)
    assert got.dtype == (F64 if x.dtype == F64 else F32)
    x, y = x.double(), y.double()
    with pyflow.backend("reference"):
        want, *own = (function(*pair).cpu() for pair in ((x, y), (x, x), (y, y)))
    scale = torch.maximum(want.abs(), 1e-2 * (own[0].clamp(min=0) * own[1].clamp(min=0)).sqrt())
    testing.assert_within(got.cpu(), want, (error or (1e-10 if got.dtype == F64 else 1e-5)) * scale + 1e-14)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("n, d", SIZES)
def test_matches_the_reference(gpu, kernel, n, d):
    x, y = data(kernel, n, d, batch=(2,))
    for estimator in ESTIMATORS:
        # a cube has three times the relative error of its product
        error = 3e-5 if kernel == "polynomial" else None
        check_value(kernel, x, y, error, estimator=estimator, bandwidth=1.2 * d**0.5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_dtypes(gpu, kernel, dtype):
    for n, d in ((33, 3), (40, 20)):
        x, y = data(kernel, n, d, dtype, (2,))
        check_value(kernel, x, y, estimator="unbiased", bandwidth=1.2 * d**0.5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients(gpu, kernel):
    for n, d in [(5, 1), (40, 12)] + [(70, 64), (300, 33)] * (not INTERPRETED):
        for options in ({"estimator": "unbiased"}, {"normalize": True})[: 1 if d == 1 else 2]:
            check_gradients(gpu, kernel, n, d, F32, (1e-4, 1e-4, 1e-3), **options)
    check_gradients(gpu, kernel, 40, 12, F64, (1e-9, 1e-9, 1e-8))


def check_gradients(gpu, kernel, n, d, dtype, errors, **options):
    leaves = [*data(kernel, n, d, dtype), torch.tensor(1.2 * d**0.5, dtype=dtype)]
    got, want = run(gpu, DEVICE, hsic(kernel, **options), leaves), exact(hsic(kernel, **options), leaves)
    for name, a, b, error in zip(("x", "y", "bandwidth"), got[1:], want[1:], errors, strict=True):
        # the gradient of the bandwidth is a sum that cancels
        testing.assert_within(a, b, error * b.abs().max() + 1e-14, f"{name}: n = {n}, d = {d}, {options}")


@pytest.mark.parametrize("degree", [1, 2])
def test_degrees(gpu, degree):
    # with degree 1 the tiles run, although a linear kernel could use covariances
    x, y = dependent(40, 20)
    options = dict(degree=degree, coef0=0.5, gamma=0.2)
    check_value("polynomial", x, y, **options)
    got, want = run(gpu, DEVICE, hsic("polynomial", **options), (x, y)), exact(hsic("polynomial", **options), (x, y))
    for a, b in zip(got[1:], want[1:], strict=True):
        assert_near(a, b, 1e-4)


@pytest.mark.parametrize("kernel", ["rbf", "laplacian"])
@pytest.mark.parametrize("d", [3, 20])
def test_is_accurate_at_every_bandwidth(gpu, kernel, d):
    # data far from the origin; Gram matrices from almost the identity to almost constant
    x, y = dependent(70 if INTERPRETED else 512, d)
    x, y = x + 1e3, y - 1e3
    p = 2.0 if kernel == "rbf" else 1.0
    for factor in few((0.1, 0.3, 0.5, 1.0, 3.0, 10.0, 100.0)):
        sigma, sigma_y = (factor * median_distance(v.double(), p).item() for v in (x, y))
        check_value(kernel, x, y, bandwidth=sigma, bandwidth_y=sigma_y)


def test_labels_and_matrices_beside_other_kernels(gpu):
    x, y = dependent(70, 4)
    labels = (y[:, 0] > 0.5).long() + 10**15
    same = (labels[:, None] == labels).float()
    targets = [("delta", labels), ("delta", labels[:, None]), ("delta", (labels - 10**15).int()),
               ("delta", (labels - 10**15).float()), ("precomputed", same)]  # fmt: skip
    for estimator in ESTIMATORS:
        options = dict(kernel="rbf", bandwidth=2.0, estimator=estimator)
        with pyflow.backend("reference"):
            want = ops.hsic(x.double(), same.double(), kernel_y="precomputed", **options)
        for kernel, target in targets:
            got = ops.hsic(*moved((x, target)), kernel_y=kernel, **options)
            testing.assert_within(got.cpu(), want, 1e-6 * want.abs(), kernel)
    assert abs(ops.hsic(*moved((labels, labels)), kernel="delta", normalize=True) - 1) < 1e-6


def test_matrix_of_all_pairs_and_cka(gpu):
    x, y = moved(dependent(80, 4))
    xs, ys = [x, x[:, :2], y], [y, x[:, 1:]]
    for normalize in (False, True):
        got = ops.hsic_matrix(xs, ys, normalize=normalize, estimator="unbiased", bandwidth=1.5)
        assert got.shape == (3, 2) and got.device == x.device
        for i, a in enumerate(xs):
            for j, b in enumerate(ys):
                want = ops.hsic(a, b, normalize=normalize, estimator="unbiased", bandwidth=1.5)
                torch.testing.assert_close(got[i, j], want, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ops.cka(x, x).cpu(), torch.tensor(1.0))
    assert ops.cka(x, y) == ops.hsic(x, y, normalize=True)


@pytest.mark.parametrize("n", [2, 51] + [1100] * (not INTERPRETED))
def test_median_matches_the_cpu(gpu, n):
    x = dependent(n, 3)[0]
    for p in (1.0, 2.0):
        got = median_distance(x.to(DEVICE), p).cpu()
        with pyflow.backend("auto"):
            torch.testing.assert_close(got, median_distance(x, p), rtol=1e-6, atol=0)
    assert ops.hsic(torch.ones(9, 2, device=DEVICE), x.new_ones(9, 2).to(DEVICE)).item() == 0


def test_median_of_a_bandwidth_keeps_the_value(gpu):
    x, y = dependent(60, 5)
    check_value("rbf", x, y, bandwidth="median")
    check_value("laplacian", x, y, bandwidth="median")


@needs_cuda
def test_median_with_deterministic_algorithms(gpu):
    x, y = moved(dependent(60, 5))
    want = ops.hsic(x, y)
    with testing.poisoned():
        testing.assert_same_bits(ops.hsic(x, y), want)


@pytest.mark.parametrize("dtype, error", [(F32, 1e-6), (F64, 1e-12)])
def test_permuted_sums(gpu, dtype, error):
    n = 70 if INTERPRETED else 300
    k, m = (draw((n, n), F64, seed) for seed in range(2))
    k, m = (k + k.mT).to(dtype), (m + m.mT).to(dtype)
    generator = torch.Generator().manual_seed(0)
    permutations = torch.stack([torch.arange(n), *(torch.randperm(n, generator=generator) for _ in range(4))]).int()
    got = permuted(*moved((k, m, permutations)))
    want = reference.hsic_permuted(k.double(), m.double(), permutations)
    testing.assert_within(got.cpu(), want, error * want.abs().max())
    testing.assert_same_bits(got, permuted(*moved((k, m, permutations))))


def test_partial_tile_ranges_add_up(tiles):
    n = 130 if INTERPRETED else 300
    z = moved([draw((2, n, 3)), draw((2, n, 2), seed=1)])
    arguments = (z, torch.ones(2, 2, device=DEVICE), [0, 1], [1, 1], [0, 1, 0, 0], False)
    whole, *parts = (torch.ops.pyflow.hsic_sums(*arguments, *part) for part in [(0, 1)] + [(i, 5) for i in range(5)])
    for i in range(2):
        torch.testing.assert_close(sum(part[i] for part in parts), whole[i], rtol=1e-12, atol=1e-9)
    assert all(torch.equal(part[2], whole[2]) for part in parts)


@pytest.mark.parametrize("kernel", ["rbf", "laplacian", "polynomial", "precomputed"])
def test_same_bits_in_every_run_and_batch(tiles, kernel):
    # few items with many tiles, and many items with few tiles
    for n, d, batch in [(40, 12, 3)] + [(40, 3, 9), (700, 6, 3), (200, 40, 17)] * (not INTERPRETED):
        x, y = moved(data(kernel, n, d, batch=(batch,)))

        def results(rows):
            leaves = [v[rows].detach().requires_grad_() for v in (x, y)]
            value = hsic(kernel, bandwidth=2.0)(*leaves)
            return value.detach(), *torch.autograd.grad(value.sum(), leaves)

        whole = results(slice(None))
        for rows in (slice(None), slice(1, 2), slice(1, None)):
            for i, (a, b) in enumerate(zip(whole, results(rows), strict=True)):
                testing.assert_same_bits(a[rows], b, f"output {i}, n = {n}, {rows}")


@pytest.mark.parametrize("kernel", ["rbf", "laplacian", "precomputed"])
def test_works_in_a_cuda_graph_and_never_waits(tiles, kernel):
    x, y = (v.requires_grad_() for v in moved(data(kernel, 20 if INTERPRETED else 70, 12, batch=(2,))))

    def step():
        value = hsic(kernel, estimator="unbiased", normalize=True)(x, y)
        return value.detach(), *torch.autograd.grad(value.sum(), (x, y))

    check_graph(step, lambda: x.data.mul_(0.5))


def test_labels_and_all_pairs_in_a_cuda_graph(tiles):
    x, y = moved(dependent(70, 3))
    labels = (y[:, 0] > 0.5).long()

    def step():
        pairs = ops.hsic_matrix([x, y], [y], kernel="polynomial")
        return pairs, ops.hsic(x, labels, bandwidth=2.0, kernel_y="delta"), ops.center_gram(x @ x.mT)

    check_graph(step, lambda: x.mul_(0.5))


def test_median_in_a_cuda_graph(tiles):
    x, y = moved(dependent(70 if INTERPRETED else 1100, 3))
    check_graph(lambda: (ops.hsic(x, y),), lambda: x.mul_(0.5))


@pytest.mark.parametrize(
    "options", [{"bandwidth": 2.0}, {"normalize": True, "estimator": "unbiased"}, {"kernel": "laplacian"}], ids=str
)
def test_compiles_without_graph_breaks(kernels, options):
    check_compiled(lambda x, y: ops.hsic(x, y, **options), dependent(30, 3), 1e-5)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(gpu, layout):
    x, y = moved(dependent(30, 4, batch=(2,)))
    results = []
    for viewed in (testing.laid_out(x, layout).detach().requires_grad_(), x.clone().requires_grad_()):
        value = ops.hsic(viewed, y, bandwidth=1.5)
        results.append((value.detach(), torch.autograd.grad(value.sum(), viewed)[0]))
    for a, b in zip(*results, strict=True):
        assert_near(a, b, 1e-5)


def test_tf32_where_it_is_allowed(gpu):
    x, y = dependent(40 if INTERPRETED else 129, 64)
    for kernel in ("rbf", "polynomial"):
        check_value(kernel, x, y, 2e-2, allow_tf32=True, bandwidth=10.0)


@pytest.mark.parametrize("kernel", ["rbf", "linear"])
def test_autocast_changes_nothing(gpu, kernel):
    x, y = moved(dependent(40, 12))
    want = ops.hsic(x, y, kernel=kernel, bandwidth=2.0)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_near(ops.hsic(x, y, kernel=kernel, bandwidth=2.0), want, 1e-6)


def test_unwritten_memory_is_never_read(gpu):
    with testing.poisoned():
        for kernel in KERNELS:
            for n in (4, 63):
                value = run(gpu, DEVICE, hsic(kernel, estimator="unbiased"), data(kernel, n, 11, batch=(2,)))
                assert not any(v.isnan().any() for v in value), kernel
        assert not ops.center_gram(draw((2, 63, 63)).to(DEVICE)).isnan().any()


def test_nan_is_nan(gpu):
    # on a GPU values are not checked; on a CPU NaN is an error
    if INTERPRETED:
        pytest.skip("the interpreter's tensors are on a CPU")
    x, y = moved(dependent(40, 3))
    x[3, 1] = torch.nan
    assert ops.hsic(x, y, bandwidth=1.0).isnan() and ops.hsic(x, y).isnan()


@pytest.mark.parametrize("kernel", ["rbf", "laplacian", "delta"])
def test_nhsic(gpu, kernel):
    x, y = dependent(40, 5)
    if kernel == "delta":
        function = lambda x, y: ops.nhsic(x, (y.detach() > 0.25).long(), kernel="rbf", kernel_y="delta")
    else:
        function = lambda x, y: ops.nhsic(x, y, kernel=kernel, bandwidth=2.0)
    for a, b in zip(run(gpu, DEVICE, function, (x, y)), run("auto", "cpu", function, (x, y)), strict=True):
        assert_near(a, b, 1e-5)


@pytest.mark.parametrize("approximate", ["rff", "nystrom"])
def test_approximations(gpu, approximate):
    function = lambda x, y: ops.hsic(x, y, bandwidth=2.0, approximate=approximate, n_features=30, normalize=True)
    x, y = dependent(100, 5)
    for a, b in zip(run(gpu, DEVICE, function, (x, y)), run("auto", "cpu", function, (x, y)), strict=True):
        assert_near(a, b, 1e-3)
