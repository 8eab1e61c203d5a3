"""demo_op against its reference, bit by bit and under every transform."""

from __future__ import annotations

import hashlib

import pytest
import torch

import pyflow
from pyflow import ops, testing
from pyflow.reference import demo_op as ref

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(), (9,), (3, 1), (33, 63), (1, 1000), (5, 2, 7, 3), (0, 4), (4, 0), (65, 513), (2, 20011)]


def draw(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def run(x, grad, scale=2.0):
    x = x.detach().requires_grad_()
    y = ops.demo_op(x, scale=scale)
    return y.detach(), *torch.autograd.grad(y, x, grad)


def check(x, grad, scale=2.0):
    y, grad_x = run(x, grad, scale)
    assert y.dtype == grad_x.dtype == x.dtype
    u = testing.UNIT[testing.compute_dtype(x.dtype)]
    want, want_grad = ref.demo_op(x.double(), scale), ref.demo_op_backward(grad.double(), x.double(), scale)
    # softplus has an error of 1.7 ulp, sigmoid of 2.4; one or two products
    testing.assert_within(y, want, 6 * u * want.abs(), "y")
    testing.assert_within(grad_x, want_grad, 8 * u * want_grad.abs(), "grad_x")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(shape, dtype):
    for scale in (2.0, 0.3, 1):
        check(draw(shape, dtype), draw(shape, dtype, 1), scale)


def test_is_a_softplus():
    x = torch.linspace(-30, 15, 100, dtype=torch.float64)
    torch.testing.assert_close(ops.demo_op(x, scale=3.0), 3 * torch.log1p(x.exp()))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(layout):
    check(testing.laid_out(draw((6, 5, 4, 10)), layout), draw((6, 5, 4, 10), seed=1))


@pytest.mark.parametrize("layout", testing.gradient_layouts(torch.zeros(2, 3)))
def test_backward_takes_any_gradient_layout(layout):
    grad = testing.gradient_layouts(draw((6, 20), seed=1))[layout]
    check(draw((6, 20)), grad)


def digest() -> str:
    """One hash over sizes; run in a process per instruction set."""
    h = hashlib.sha256()
    for shape in [(33, 70), (2, 9001), (300, 3)]:
        for v in run(draw(shape), draw(shape, seed=1)):
            h.update(v.numpy().tobytes())
    return h.hexdigest()


def test_instruction_sets_give_the_same_bits(every_instruction_set):
    assert len(every_instruction_set) == 1


def test_bits_do_not_depend_on_threads_or_batch():
    for shape in [(200, 392), (3, 30000)]:
        x, grad = draw(shape), draw(shape, seed=1)
        with testing.threads(1):
            single = run(x, grad)
        with testing.threads(4):
            several = run(x, grad)
        for a, b, first in zip(single, several, run(x[:1], grad[:1]), strict=True):
            testing.assert_same_bits(a, b)
            testing.assert_same_bits(a[:1], first)


def test_every_output_element_is_written():
    with testing.poisoned():
        for shape in [(5, 70), (2, 9000), (40, 3)]:
            assert not any(v.isnan().any() for v in run(draw(shape), draw(shape, seed=1)))


def test_nan_and_infinity_travel_as_in_the_reference():
    special = torch.tensor([0.0, -0.0, 1.0, 30.0, -200.0, 1e30, torch.inf, -torch.inf, torch.nan])
    check(special, torch.ones_like(special))


def test_gradcheck_twice():
    x = draw((3, 4), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(ops.demo_op, x)
    assert torch.autograd.gradgradcheck(ops.demo_op, x)


@pytest.mark.parametrize("layout", ["contiguous", "stepped", "transposed"])
def test_opcheck(layout):
    x, grad = (testing.laid_out(draw((3, 4), seed=i), layout).requires_grad_() for i in (0, 1))
    torch.library.opcheck(torch.ops.pyflow.demo_op.default, (x, 2.0))
    torch.library.opcheck(torch.ops.pyflow.demo_op_backward.default, (grad, x, 2.0))


def test_compiles_without_a_graph_break_to_the_same_bits():
    x, grad = draw((6, 40)).requires_grad_(), draw((6, 40), seed=1)
    y = torch.compile(lambda x: ops.demo_op(x, scale=2.0), fullgraph=True)(x)
    for got, want in zip((y.detach(), *torch.autograd.grad(y, x, grad)), run(x, grad), strict=True):
        testing.assert_same_bits(got, want)


def test_function_transforms_agree_with_the_reference():
    x = draw((3, 4), torch.float64)
    loss = lambda x: ops.demo_op(x, scale=2.0).sum()
    transforms = {
        "grad": lambda: torch.func.grad(loss)(x),
        "jacrev": lambda: torch.func.jacrev(ops.demo_op)(x),
        "jacfwd": lambda: torch.func.jacfwd(ops.demo_op)(x),
        "vmap of grad": lambda: torch.vmap(torch.func.grad(loss))(x),
        "vmap": lambda: torch.vmap(ops.demo_op, 1)(x),
        "jvp": lambda: torch.func.jvp(ops.demo_op, (x,), (x,))[1],
    }
    for name, transform in transforms.items():
        got = transform()
        with pyflow.backend("reference"):
            torch.testing.assert_close(got, transform(), msg=name)


def test_autocast_changes_nothing():
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.demo_op(draw((4, 40)))
    testing.assert_same_bits(got, ops.demo_op(draw((4, 40))))


X = torch.zeros(2, 4)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda f: f([1.0]), TypeError, "x must be a tensor, got list"),
        (lambda f: f(X.long()), TypeError, "x must be float32, float64, bfloat16 or float16, got int64"),
        (lambda f: f(X, scale="1"), TypeError, "scale must be a number, got str"),
        (lambda f: f(X, scale=-1), ValueError, "scale must be positive and finite, got -1"),
        (lambda f: f(X, scale=1e-40), ValueError, r"scale must be from 7.89e-31 to 1.27e\+30 in float32, got 1e-40"),
    ],
)
def test_bad_input_gets_one_sentence(call, error, text, backend):
    with pyflow.backend(backend), pytest.raises(error, match=f"^demo_op: {text}$"):
        call(ops.demo_op)
