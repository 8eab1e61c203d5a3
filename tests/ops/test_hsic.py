"""HSIC: definition, gradients, reproducible bits, transforms, error texts."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import pyflow
from pyflow import ops, testing
from pyflow._schemas import HSIC_KERNELS
from pyflow.hsic.median import median_distance

F32, F64 = torch.float32, torch.float64
KERNELS = ("rbf", "laplacian", "linear", "polynomial")
ESTIMATORS = ("biased", "biased_n2", "unbiased")


def draw(shape, dtype=F32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def dependent(n, d=3, dtype=F32, batch=(), seed=0):
    """Return x and y = |x| + 0.5 * noise."""
    x = draw((*batch, n, d), F64, seed)
    y = x.abs() + 0.5 * draw((*batch, n, d), F64, seed + 1)
    return x.to(dtype), y.to(dtype)


def matrix(x, kernel, bandwidth=1.0, degree=3, coef0=1.0):
    """Return the kernel matrix by its definition, in float64."""
    x = x.double()
    away = lambda p: torch.cdist(x, x, p, compute_mode="donot_use_mm_for_euclid_dist")
    return {
        "rbf": lambda: torch.exp(-away(2.0).square() / (2 * bandwidth**2)),
        "laplacian": lambda: torch.exp(-away(1.0) / bandwidth),
        "rbf less 1": lambda: torch.expm1(-away(2.0).square() / (2 * bandwidth**2)),
        "laplacian less 1": lambda: torch.expm1(-away(1.0) / bandwidth),
        "linear": lambda: x @ x.mT,
        "polynomial": lambda: (x @ x.mT / x.shape[-1] + coef0) ** degree,
    }[kernel]()


def definition(k, m, estimator):
    """Return HSIC of two kernel matrices by the textbook formulas."""
    n = k.shape[-1]
    if estimator == "unbiased":
        k, m = (g - g.diagonal(dim1=-2, dim2=-1).diag_embed() for g in (k, m))
        trace, rows = (k * m).sum((-2, -1)), (k.sum(-1) * m.sum(-1)).sum(-1)
        total = k.sum((-2, -1)) * m.sum((-2, -1)) / ((n - 1) * (n - 2))
        return (trace + total - 2 / (n - 2) * rows) / (n * (n - 3))
    h = torch.eye(n, dtype=F64) - 1 / n
    return torch.einsum("...ij,...ji->...", k @ h, m @ h) / (n**2 if estimator == "biased_n2" else (n - 1) ** 2)


def scale_of(k, m, estimator):
    """Return the scale of relative errors. It is not the value alone, because the unbiased value may be near 0."""
    own = [definition(g, g, estimator).clamp(min=0) for g in (k, m)]
    return torch.maximum(definition(k, m, estimator).abs(), 1e-2 * (own[0] * own[1]).sqrt())


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


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_linear_kernels_by_covariance_match_the_tiles(estimator):
    x, y = dependent(200, 5)
    feature = ops.hsic(x, y, kernel="linear", estimator=estimator)
    # the polynomial kernel of degree 1 uses tiles
    tiled = ops.hsic(x, y, kernel="polynomial", degree=1, gamma=1.0, coef0=0.0, estimator=estimator)
    torch.testing.assert_close(feature, tiled, rtol=1e-5, atol=1e-6)
    few = ops.hsic(x[:8], y[:8], kernel="linear", estimator=estimator)
    testing.assert_within(few, definition(matrix(x[:8], "linear"), matrix(y[:8], "linear"), estimator), 1e-5)


def test_cka_of_x_with_itself_is_one():
    x, y = dependent(100, 6)
    for kernel in KERNELS:
        for estimator in ESTIMATORS:
            options = dict(kernel=kernel, estimator=estimator)
            torch.testing.assert_close(ops.cka(x, x, **options), torch.tensor(1.0))
            assert abs(ops.cka(x, y, **options)) < 1
            assert ops.cka(x, y, **options) == ops.hsic(x, y, normalize=True, **options)


def test_matrix_of_all_pairs():
    x, y = dependent(80, 4)
    xs, ys = [x, x[:, :2], y], [y, x[:, 1:]]
    for normalize in (False, True):
        got = ops.hsic_matrix(xs, ys, normalize=normalize, estimator="unbiased")
        assert got.shape == (3, 2)
        for i, a in enumerate(xs):
            for j, b in enumerate(ys):
                want = ops.hsic(a, b, normalize=normalize, estimator="unbiased")
                torch.testing.assert_close(got[i, j], want, rtol=1e-6, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 200), st.integers(1, 12), st.sampled_from(KERNELS), st.integers(0, 1000))
def test_invariances(n, d, kernel, seed):
    x, y = dependent(n, d, F64, seed=seed)
    options = dict(kernel=kernel, estimator="unbiased", normalize=False)
    value = ops.hsic(x, y, **options)
    close = lambda other: torch.testing.assert_close(other, value, rtol=1e-9, atol=1e-12)
    close(ops.hsic(y, x, **options))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    close(ops.hsic(x[order], y[order], **options))
    if kernel != "polynomial":
        close(ops.hsic(x + 5, y - 3, **options))
    if kernel in ("rbf", "laplacian"):
        close(ops.hsic(3 * x, 0.5 * y, **options))  # the median moves along


def test_median_distance_matches_numpy():
    for n, d in [(2, 1), (3, 2), (50, 3), (51, 3), (1000, 2)]:
        x = draw((n, d), F64)
        for p, metric in ((2.0, "euclidean"), (1.0, "cityblock")):
            assert median_distance(x, p).item() == pytest.approx(np.median(pdist(x.numpy(), metric)), rel=1e-12)
    # discrete data: first most distances are 0, then all
    x = torch.cat((torch.zeros(40, 1), torch.ones(3, 1))).double()
    assert median_distance(x).item() == pytest.approx(pdist(x.numpy()).mean())
    assert median_distance(torch.ones(9, 2)).item() == 1
    assert ops.hsic(torch.ones(9, 2), draw((9, 2))).item() == 0
    assert ops.hsic(torch.ones(9, 2), draw((9, 2)), normalize=True).item() == 0


def leaves_of(*tensors):
    return [t.detach().requires_grad_() for t in tensors]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_gradients_match_the_reference(kernel, estimator):
    for n, d in [(5, 1), (64, 12), (150, 5), (300, 33)]:
        for normalize in (False, True):
            x, y = dependent(n, d)
            sigma = torch.tensor(1.7 * d**0.5)

            def f(x, y, s, normalize=normalize):
                return ops.hsic(x, y, kernel=kernel, bandwidth=s, estimator=estimator, normalize=normalize)

            leaves = leaves_of(x, y, sigma)
            got = torch.autograd.grad(f(*leaves), leaves, allow_unused=True)
            exact = leaves_of(*(v.double() for v in leaves))
            with pyflow.backend("reference"):
                want = torch.autograd.grad(f(*exact), exact, allow_unused=True)
            for name, a, b in zip(("x", "y", "bandwidth"), got, want, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    # the gradient of the bandwidth is a sum with cancellation
                    error = 1e-3 if name == "bandwidth" else 1e-4
                    testing.assert_within(a, b, error * b.abs().max(), f"{name}: n = {n}, d = {d}")


def test_gradient_of_a_batch_of_bandwidths():
    x, y = dependent(40, 3, F64, batch=(2,))
    sigma = torch.tensor([0.7, 3.0], dtype=F64)
    leaves = leaves_of(x, y, sigma)
    value = ops.hsic(*leaves[:2], bandwidth=leaves[2], bandwidth_y=1.0)
    for i in range(2):
        alone = leaves_of(x[i], y[i], sigma[i])
        single = ops.hsic(*alone[:2], bandwidth=alone[2], bandwidth_y=1.0)
        torch.testing.assert_close(value[i], single)
        whole = torch.autograd.grad(value[i], leaves, retain_graph=True)
        for a, b in zip(whole, torch.autograd.grad(single, alone), strict=True):
            torch.testing.assert_close(a[i], b)


@pytest.mark.parametrize("kernel", [*KERNELS, "precomputed"])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_gradcheck_twice(kernel, estimator):
    x, y = (draw((6, 6 if kernel == "precomputed" else 2), F64, seed) for seed in range(2))
    sigma = torch.tensor(1.3, dtype=F64)

    def f(x, y, sigma):
        if kernel == "precomputed":
            x, y = x + x.mT, y + y.mT
        return ops.hsic(x, y, kernel=kernel, bandwidth=sigma, degree=3, estimator=estimator)

    leaves = leaves_of(x, y, sigma)[: 3 if kernel in ("rbf", "laplacian") else 2]
    function = f if len(leaves) == 3 else lambda x, y: f(x, y, sigma)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def digest() -> str:
    """Return one hash over kernels and sizes; runs in one process per instruction set."""
    h = hashlib.sha256()
    for kernel in KERNELS:
        for n, d in [(40, 3), (129, 10), (300, 33)]:
            x, y = dependent(n, d, batch=(2,))
            leaves = leaves_of(x, y)
            value = ops.hsic(*leaves, kernel=kernel, bandwidth=1.5 * d)
            for v in (value, *torch.autograd.grad(value.sum(), leaves)):
                h.update(v.detach().numpy().tobytes())
    for kernel in ("rbf", "laplacian"):
        for d in (3, 33):
            x, y = (v.requires_grad_() for v in scattered("two clusters", d))
            value = ops.hsic(x, y, kernel=kernel, bandwidth=1.5 * d)
            for v in (value, *torch.autograd.grad(value, (x, y))):
                h.update(v.detach().numpy().tobytes())
    gram = draw((3, 100, 100))
    permutations = torch.stack([torch.randperm(100, generator=torch.Generator().manual_seed(s)) for s in range(3)])
    h.update(ops.center_gram(gram).numpy().tobytes())
    h.update(torch.ops.pyflow.hsic_permuted(gram[0], gram[1], permutations.int()).numpy().tobytes())
    return h.hexdigest()


def test_instruction_sets_give_the_same_bits(every_instruction_set):
    assert len(every_instruction_set) == 1


@pytest.mark.parametrize("kernel", KERNELS)
# few items: threads share the tiles of an item; many items: each thread computes whole items
@pytest.mark.parametrize(("n", "batch"), [(700, 3), (200, 17)])
def test_bits_do_not_depend_on_threads_or_batch(kernel, n, batch):
    x, y = dependent(n, 6, batch=(batch,))

    def run(x, y):
        leaves = leaves_of(x, y)
        # the linear kernel would use a matrix product of torch
        degree = dict(kernel="polynomial", degree=1) if kernel == "linear" else dict(kernel=kernel)
        value = ops.hsic(*leaves, bandwidth=2.0, **degree)
        return value.detach(), *torch.autograd.grad(value.sum(), leaves)

    with testing.threads(1):
        single = run(x, y)
    with testing.threads(4):
        several = run(x, y)
    for a, b, alone in zip(single, several, run(x[1:2], y[1:2]), strict=True):
        testing.assert_same_bits(a, b)
        testing.assert_same_bits(a[1:2], alone)


def test_every_output_element_is_written():
    with testing.poisoned():
        for n in (4, 63, 200):
            leaves = leaves_of(*dependent(n, 11, batch=(2,)))
            for kernel in KERNELS:
                value = ops.hsic(*leaves, kernel=kernel, bandwidth=3.0, estimator="unbiased")
                assert not any(v.isnan().any() for v in (value, *torch.autograd.grad(value.sum(), leaves)))
            assert not ops.center_gram(draw((2, n, n))).isnan().any()


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(layout):
    x, y = dependent(30, 4, batch=(2,))
    viewed = testing.laid_out(x, layout).requires_grad_()
    value = ops.hsic(viewed, y, bandwidth=1.5)
    testing.assert_same_bits(value, ops.hsic(x, y, bandwidth=1.5))
    plain = x.clone().requires_grad_()
    want = torch.autograd.grad(ops.hsic(plain, y, bandwidth=1.5).sum(), plain)[0]
    testing.assert_same_bits(torch.autograd.grad(value.sum(), viewed)[0], want)


@pytest.mark.parametrize("layout", testing.gradient_layouts(torch.zeros(2, 3)))
def test_backward_takes_any_gradient_layout(layout):
    z, scale = [draw((2, 20, 3)), draw((2, 20, 2), seed=1)], torch.ones(2, 2)
    arguments = (scale, [0, 1], [1, 1], [0, 1], False)
    rows, cross = draw((2, 2, 20), F64), draw((2, 1), F64)
    given = testing.gradient_layouts(rows)[layout]
    backward = torch.ops.pyflow.hsic_sums_backward
    for got, want in zip(
        backward(given, cross, z, *arguments), backward(given.contiguous(), cross, z, *arguments), strict=True
    ):
        testing.assert_same_bits(got, want)


def test_parts_of_the_tiles_add_up():
    z, scale = [draw((2, 700, 3)), draw((2, 700, 2), seed=1)], torch.ones(2, 2)
    arguments = (z, scale, [0, 1], [1, 1], [0, 1, 0, 0], False)
    whole = torch.ops.pyflow.hsic_sums(*arguments, 0, 1)
    parts = [torch.ops.pyflow.hsic_sums(*arguments, part, 5) for part in range(5)]
    for i in range(2):
        total = sum(part[i] for part in parts)
        torch.testing.assert_close(total, whole[i], rtol=1e-12, atol=1e-9)
        assert not torch.equal(parts[0][i], whole[i])
    assert all(torch.equal(part[2], whole[2]) for part in parts)
    with pytest.raises(RuntimeError, match=r"^hsic: a part of the tiles has no gradient$"):
        sums = torch.ops.pyflow.hsic_sums([z[0].requires_grad_(), z[1]], *arguments[1:], 0, 5)
        sums[0].sum().backward()


def operator_calls():
    for index, kernel in enumerate(HSIC_KERNELS):
        d = 6 if kernel == "precomputed" else 3
        z = [draw((2, 6, d)), draw((2, 6, 2), seed=1)]
        z[0] = z[0].round() if kernel == "delta" else z[0]
        # only labels are not differentiable
        *z, scale = (v.requires_grad_(kernel != "delta") for v in (*z, 0.5 * torch.ones(2, 2)))
        arguments = ([index, 0], [2, 1], [0, 1, 0, 0], False)
        yield "hsic_sums", (z, scale, *arguments, 0, 1)
        cotangents = (draw((2, 2, 6), F64).requires_grad_(), draw((2, 2), F64).requires_grad_())
        yield "hsic_sums_backward", (*cotangents, z, scale, *arguments)
    gram = draw((6, 6))
    permutations = torch.stack([torch.randperm(6) for _ in range(3)]).int()
    yield "hsic_permuted", (gram + gram.mT, gram @ gram.mT, permutations)
    yield "center_gram", (draw((2, 5, 5)).requires_grad_(),)
    yield "center_gram", (testing.laid_out(draw((2, 5, 5)), "transposed"),)
    yield "center_gram_", (draw((2, 5, 5)),)


@pytest.mark.parametrize("name, args", list(operator_calls()))
def test_opcheck(name, args):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if name == "hsic_sums_backward" and torch.__version__ < "2.12":
        checks.remove("test_aot_dispatch_dynamic")  # torch 2.11 asserts in its own PyObjectSlot.h
    torch.library.opcheck(getattr(torch.ops.pyflow, name).default, args, test_utils=checks)


@pytest.mark.parametrize("options", [{}, {"normalize": True, "estimator": "unbiased"}, {"kernel": "laplacian"}])
def test_compiles_without_a_graph_break_to_the_same_bits(options):
    leaves = leaves_of(*dependent(30, 3))
    f = lambda x, y: ops.hsic(x, y, bandwidth=2.0, **options)
    compiled = torch.compile(f, fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, f(*leaves), rtol=1e-6, atol=0)
    for a, b in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(f(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    median = torch.compile(lambda x, y: ops.hsic(x, y, **options), fullgraph=True)(*leaves)
    torch.testing.assert_close(median, ops.hsic(*leaves, **options), rtol=1e-5, atol=0)


def test_compiles_once_for_every_bandwidth():
    x, y = dependent(20, 2)
    count = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda x, y, s: ops.hsic(x, y, bandwidth=s), backend=count, fullgraph=True)
    for sigma in (1.0, 2.0, 3.0, 4.0):
        torch.testing.assert_close(compiled(x, y, torch.tensor(sigma)), ops.hsic(x, y, bandwidth=sigma))
    assert count.frame_count == 1


def test_function_transforms_agree_with_the_reference():
    x, y = dependent(8, 2, F64, batch=(3,))
    loss = lambda x, y: ops.hsic(x, y, bandwidth=1.5).sum()
    transforms = {
        "grad": lambda: torch.func.grad(loss, (0, 1))(x, y),
        "jacrev": lambda: torch.func.jacrev(loss, (0, 1))(x, y),
        "jacfwd": lambda: torch.func.jacfwd(loss, (0, 1))(x, y),
        "vmap of grad": lambda: torch.vmap(torch.func.grad(loss, (0, 1)))(x, y),
        "vmap": lambda: (torch.vmap(lambda x, y: ops.hsic(x, y, bandwidth=1.5))(x, y),),
        "vmap of centring": lambda: (torch.vmap(ops.center_gram)(x @ x.mT),),
        "jvp": lambda: torch.func.jvp(loss, (x, y), (x, y)),
    }
    for name, transform in transforms.items():
        got = transform()
        with pyflow.backend("reference"):
            want = transform()
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("kernel", ["rbf", "laplacian", "polynomial"])
def test_batches_of_gradients(kernel):
    x, y = dependent(6, 2, F64)
    factors = torch.tensor([1.0, 0.5, 2.0], dtype=F64)[:, None, None]

    def f(x):
        return ops.hsic(x * factors, y, kernel=kernel, bandwidth=1.0)

    want = torch.autograd.functional.jacobian(f, x)
    torch.testing.assert_close(torch.autograd.functional.jacobian(f, x, vectorize=True), want)
    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(f(leaf), leaf, torch.eye(3, dtype=F64), is_grads_batched=True)
    torch.testing.assert_close(got, want)
    first = lambda x: f(x)[0]
    want = torch.autograd.functional.hessian(first, x)
    torch.testing.assert_close(torch.autograd.functional.hessian(first, x, vectorize=True), want)


@pytest.mark.parametrize("backend", ("auto", "reference"))
@pytest.mark.parametrize("cast", (torch.bfloat16, torch.float16))
def test_autocast_changes_nothing(backend, cast):
    # products of these values overflow float16
    x, y = (300 * v for v in dependent(40, 12))
    gram = x @ x.mT
    calls = {
        "rbf": lambda x: ops.hsic(x, y),
        "linear": lambda x: ops.cka(x, y[:, :3], kernel="linear"),
        "unbiased": lambda x: ops.hsic(x, y, kernel="linear", estimator="unbiased"),
        "polynomial": lambda x: ops.cka(x, y, kernel="polynomial"),
        "rff": lambda x: ops.hsic(x, y, approximate="rff"),
        "nystrom": lambda x: ops.hsic(x, y, approximate="nystrom"),
        "matrix": lambda x: ops.hsic_matrix([x, x[:, :2]], [y], kernel="linear").sum(),
        "nhsic": lambda x: ops.nhsic(x, y),
        "center_gram": lambda x: ops.center_gram(gram * x[0, 0]).square().sum(),
        "second": lambda x: torch.func.grad(lambda z: ops.cka(z, y[:, :3], kernel="linear"))(x).square().sum(),
        "jvp": lambda x: torch.func.jvp(lambda z: ops.cka(z, y, kernel="linear"), (x,), (y,))[1],
    }  # fmt: skip

    def results(call):
        leaf = x.clone().requires_grad_()
        value = call(leaf)
        return value, torch.autograd.grad(value, leaf)[0]

    for name, call in calls.items():
        with pyflow.backend(backend):
            want = results(call)
            with torch.autocast("cpu", cast):
                got = results(call)
        testing.assert_same_bits(got[0], want[0], name)
        # the summation order may differ; products in bfloat16 would be 4e-3 off
        torch.testing.assert_close(got[1], want[1], rtol=0, atol=1e-5 * want[1].abs().max().item(), msg=name)


def test_permuted_sums():
    x, y = dependent(70, 3)
    k, m = matrix(x, "rbf"), matrix(y, "laplacian")
    generator = torch.Generator().manual_seed(0)
    permutations = torch.stack([torch.arange(70), *(torch.randperm(70, generator=generator) for _ in range(4))])
    for dtype, error in ((F32, 1e-5), (F64, 1e-12)):
        got = torch.ops.pyflow.hsic_permuted(k.to(dtype), m.to(dtype), permutations.int())
        want = torch.stack([(k * m[p][:, p]).sum() - 70 for p in permutations])
        torch.testing.assert_close(got, want, rtol=error, atol=0)
        with testing.threads(3):
            testing.assert_same_bits(got, torch.ops.pyflow.hsic_permuted(k.to(dtype), m.to(dtype), permutations.int()))


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


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16])
def test_values_do_not_depend_on_the_unit_of_the_data(dtype, estimator, backend):
    x, y = dependent(60, 3, dtype)
    z, size = x.double(), draw((60, 60), dtype)
    size = size + size.mT
    exponents = (-1000, -530, 0, 530, 1000) if dtype == F64 else (-120, -80, 0, 64, 100)

    def everything(unit):
        leaf = (x * unit).requires_grad_()
        options = dict(estimator=estimator, normalize=True)
        values = [ops.hsic(leaf, y, kernel=kernel, **options) for kernel in ("rbf", "laplacian", "linear")]
        values.append(ops.hsic(leaf, y, kernel="polynomial", coef0=0.0, kernel_y="rbf", **options))
        values.append(ops.hsic(leaf, y, bandwidth=1.5 * unit, bandwidth_y=1.0, **options))
        values += [ops.hsic(leaf, y, approximate=how, **options) for how in ("rff", "nystrom")]
        grads = [torch.autograd.grad(value, leaf)[0].double() * unit for value in values]
        values += [ops.hsic(size * unit, size, kernel="precomputed", kernel_y="precomputed", **options)]
        values += [ops.hsic_matrix([leaf], [y, leaf], kernel="linear", **options).sum()]
        values.append(ops.hsic(leaf, y, estimator=estimator))
        return torch.stack([v.detach().double() for v in values]), torch.stack(grads)

    with pyflow.backend(backend):
        want = everything(1.0)
        assert z.isfinite().all() and want[0].abs().min() > 0
        for exponent in exponents:
            got = everything(2.0**exponent)
            torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
            # gradients of bfloat16 leaves are rounded to bfloat16
            rtol = 2.0**-7 if dtype == torch.bfloat16 else 1e-3
            torch.testing.assert_close(got[1], want[1], rtol=rtol, atol=1e-5, msg=f"gradient at 2**{exponent}")


def test_items_of_a_batch_may_have_different_units():
    x, y = dependent(40, 2)
    batch = torch.stack([x * unit for unit in (1.0, 2.0**-90, 2.0**70, 2.0**100)])
    for kernel in ("rbf", "laplacian", "linear"):
        f = lambda x: ops.cka(x, y, kernel=kernel)
        for values in (f(batch), torch.compile(f, fullgraph=True, backend="eager")(batch), torch.vmap(f)(batch)):
            torch.testing.assert_close(values, f(x).expand(4), rtol=1e-6, atol=0)
    # no overflow on the way to a value that fits into the dtype
    torch.testing.assert_close(
        ops.hsic(x * 2.0**70, y * 2.0**-70, kernel="linear"), ops.hsic(x, y, kernel="linear"), rtol=1e-6, atol=0
    )


def scattered(how, d):
    """Return rows with outliers or clusters so far apart that float32 dot products lose the distances of close rows."""
    x, y = dependent(150, d, seed=5)
    if how == "two clusters":
        x, y = x + 2.0**14 * (torch.arange(150)[:, None] % 2), y - 2.0**14 * (torch.arange(150)[:, None] % 2)
    elif how == "heavy tails":
        x = x / draw((150, 1), seed=6).abs().pow(4)
    else:
        x[0] = x[2] = how
        y[1] = -how
    return x, y


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


@pytest.mark.parametrize("kernel", ["rbf", "linear", "polynomial"])
@pytest.mark.parametrize("unit", [1.0, 1e20])
def test_traces_do_not_depend_on_the_values_that_were_traced(kernel, unit):
    x, y = dependent(12, 2)
    cka = lambda x, y: ops.cka(x, y, kernel=kernel, estimator="unbiased")
    traces = [torch.jit.trace(cka, (unit * x, y)), make_fx(cka)(unit * x, y)]
    for other in (x, 1e20 * x, 1e-25 * x, torch.ones_like(x)):
        for trace in traces:
            torch.testing.assert_close(trace(other, y), cka(other, y), rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize("setting", ["meta", torch.float64, torch.bfloat16])
def test_default_dtype_and_device_do_not_matter(setting):
    x, y = dependent(40, 3)
    labels = torch.arange(40) % 3

    def everything():
        values = [ops.cka(v, y, kernel=kernel) for v in (x, x * 2.0**80, x[:1].expand(40, 3)) for kernel in KERNELS]
        values += [ops.hsic(x, y, approximate=how) for how in ("rff", "nystrom")]
        values += [ops.cka(x, labels, kernel_y="delta"), ops.hsic(x, y, bandwidth=1e20), ops.nhsic(x, y)]
        return [*values, ops.center_gram(x @ x.mT)]

    want = everything()
    if setting == "meta":
        torch.set_default_device(setting)
    else:
        torch.set_default_dtype(setting)
    try:
        got = everything()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(F32)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        testing.assert_same_bits(a, b)


def test_nhsic_refuses_an_epsilon_below_the_rounding_of_its_matrix():
    x, y = dependent(60, 2, F64)
    assert 0 < ops.nhsic(1e3 * x, y, kernel="linear") <= 2 + 1e-6
    with pytest.raises(
        ValueError, match=r"^nhsic: epsilon must be above the rounding of the kernel matrix, .*, got 1e-05$"
    ):
        ops.nhsic(1e8 * x, y, kernel="linear")
    compiled = torch.compile(lambda x: ops.nhsic(x, y, kernel="linear"), backend="eager", fullgraph=True)
    assert compiled(1e8 * x).isnan() and compiled(x) == ops.nhsic(x, y, kernel="linear")
    constant = torch.full((9, 2), 1e9)
    assert ops.nhsic(constant, y[:9], kernel="polynomial", kernel_y="rbf") == 0


def test_nhsic_refuses_indefinite_matrices():
    x, y = dependent(12, 2, F64)
    gram = x @ x.mT
    assert ops.nhsic(gram, y, kernel="precomputed", kernel_y="rbf") == pytest.approx(
        ops.nhsic(x, y, kernel="linear", kernel_y="rbf").item(), rel=1e-6
    )
    indefinite = gram - 2 * torch.eye(12, dtype=F64)
    with pytest.raises(ValueError, match=r"^nhsic: x must be positive semi-definite with a precomputed kernel, got"):
        ops.nhsic(indefinite, y, kernel="precomputed", kernel_y="rbf")
    with pytest.raises(ValueError, match=r"^nhsic: y must be positive semi-definite with a precomputed kernel, got"):
        ops.nhsic(y, indefinite, kernel_y="precomputed")
    compiled = torch.compile(lambda k: ops.nhsic(k, y, kernel="precomputed", kernel_y="rbf"), backend="eager")
    assert compiled(indefinite).isnan() and compiled(gram).isfinite()


def test_bandwidths_may_be_numbers_of_any_type():
    x, y = dependent(12, 2)
    for one, same in ((2**70, 2.0**70), (Fraction(1, 4), 0.25)):
        assert ops.cka(x, y, bandwidth=one).equal(ops.cka(x, y, bandwidth=same))


X = torch.zeros(6, 2)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda f: f([1.0], X), TypeError, "x must be a tensor, got list"),
        (lambda f: f(X, X.long()), TypeError, "y must be float32, float64, bfloat16 or float16, got int64"),
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
            "bandwidth must be from 1.18e-38 to .* in float32, got other values",
        ),
        (lambda f: f(X[:, :0], X, kernel="delta"), ValueError, r"x must have at least one column, got shape \(6, 0\)"),
        (lambda f: f(X / 0, X, kernel="delta"), ValueError, "x must be labels that equal themselves, got NaN"),
        (
            lambda f: f(torch.stack((torch.full((6, 6), 1e9), torch.triu(torch.ones(6, 6)))), X, kernel="precomputed", kernel_y="rbf"),
            ValueError,
            "x must be symmetric with a precomputed kernel, off by 1",
        ),
        (lambda f: f(X, X, bandwidth="mean"), ValueError, "bandwidth must be a number, a tensor or 'median', got 'mean'"),
        (lambda f: f(X, X, bandwidth=torch.zeros(())), ValueError, "bandwidth must be positive and finite, got other values"),
        (
            lambda f: f(X, X, bandwidth=torch.ones(3)),
            ValueError,
            r"bandwidth must broadcast to the batch dims \(\), got shape \(3,\)",
        ),
        (lambda f: f(X, X, kernel="polynomial", degree=0), ValueError, "degree must be at least 1, got 0"),
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
