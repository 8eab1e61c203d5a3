"""HSIC: gradients, reproducible bits, layouts, transforms; its values and error texts are in tests/hsic."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import pyflow
from pyflow import ops, testing
from pyflow._schemas import HSIC_KERNELS
from pyflow.reference import hsic as ref

from ..hsic.dense import ESTIMATORS, F32, F64, KERNELS, dependent, draw, leaves_of, matrix, scattered

# of three variables: all kinds of pairs, one twice
TERM_PAIRS = [0, 1, 2, 2, 1, 0, 1, 2]


def term_inputs(batch, n, diagonals="whole"):
    """Row sums, sums of products, shifts and diagonals of three variables."""
    whole = draw((batch, 3, n + 1), F64, 3)
    chosen = {
        "whole": whole[..., :n].contiguous(),
        "expanded": whole[..., :1].expand(batch, 3, n),
        "strided": whole[..., 1:],
    }
    return [draw((batch, 3, n), F64, 1), draw((batch, 4), F64, 2), draw((batch, 3), F64, 4), chosen[diagonals]]


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
    for result in torch.ops.pyflow.hsic_terms(*term_inputs(3, 100), TERM_PAIRS, False):
        h.update(result.numpy().tobytes())
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
    for diagonals in ("whole", "expanded"):
        inputs = term_inputs(2, 9, diagonals)
        leaves = [v.requires_grad_(i != 2 and v.is_contiguous()) for i, v in enumerate(inputs)]
        yield "hsic_terms", (*leaves, TERM_PAIRS, diagonals == "whole")
    grads, (rows, _, *rest) = (draw((2, 4), F64), None), term_inputs(2, 9)
    yield "hsic_terms_backward", (*grads, rows, *rest, draw((2, 3), F64), TERM_PAIRS, True)
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


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("diagonals", ["whole", "expanded", "strided"])
@pytest.mark.parametrize("batch, n", [(1, 16), (3, 37), (0, 5)])
def test_terms_match_the_reference(batch, n, diagonals, unbiased):
    inputs = term_inputs(batch, n, diagonals)
    grads = [draw((batch, 4), F64, seed) for seed in (7, 8)]
    for cotangents in (grads, [grads[0], None], [None, grads[1]]):
        results = []
        for function in (torch.ops.pyflow.hsic_terms, ref.hsic_terms):
            leaves = [v.detach().requires_grad_(i != 2) for i, v in enumerate(inputs)]
            outputs = function(*leaves, TERM_PAIRS, unbiased)
            ends, weights = zip(
                *((o, g) for o, g in zip(outputs, cotangents, strict=False) if g is not None), strict=True
            )
            inner = [leaves[i] for i in (0, 1, 3)]
            results.append([*outputs, *torch.autograd.grad(ends, inner, weights, materialize_grads=True)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * n)


def test_terms_are_twice_differentiable():
    rows, cross, shift, diagonals = term_inputs(1, 5)
    leaves = [v.requires_grad_() for v in (rows, cross, diagonals)]
    for unbiased in (False, True):
        function = lambda r, c, d, u=unbiased: torch.ops.pyflow.hsic_terms(r, c, shift, d, TERM_PAIRS, u)[:2]
        assert torch.autograd.gradcheck(function, leaves) and torch.autograd.gradgradcheck(function, leaves)


def test_terms_of_an_item_alone_have_the_same_bits():
    inputs = term_inputs(5, 700)
    whole = torch.ops.pyflow.hsic_terms(*inputs, TERM_PAIRS, False)
    with testing.threads(3):
        again = torch.ops.pyflow.hsic_terms(*inputs, TERM_PAIRS, False)
    alone = torch.ops.pyflow.hsic_terms(*(v[3:4] for v in inputs), TERM_PAIRS, False)
    for a, b, c in zip(whole, again, alone, strict=True):
        testing.assert_same_bits(a, b)
        testing.assert_same_bits(a[3:4], c)


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
