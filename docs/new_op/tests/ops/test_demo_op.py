"""demo_op against its reference, bit by bit and under every transform."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

import pyflow
from pyflow import ops, testing
from pyflow.reference import demo_op as ref

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(9,), (3, 1), (33, 63), (1, 1000), (5, 2, 7, 3), (0, 4), (4, 0), (65, 513), (2, 20011)]


def draw(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def draw_grads(shape, event_dims, dtype=torch.float32):
    """Gradients of y and logdet."""
    batch = shape[: len(shape) - event_dims]
    return draw(shape, dtype, 1), draw(batch, testing.compute_dtype(dtype), 2)


def run(x, grads, **options):
    x = x.detach().requires_grad_()
    outputs = ops.demo_op(x, **options)
    return *(v.detach() for v in outputs), *torch.autograd.grad(outputs, x, grads)


def check(x, grads, scale=2.0, event_dims=None):
    y, logdet, grad_x = run(x, grads, scale=scale, event_dims=event_dims)
    dtype = testing.compute_dtype(x.dtype)
    assert y.dtype == grad_x.dtype == x.dtype and logdet.dtype == dtype
    n = x.dim() - 1 if event_dims is None else event_dims
    u, wide = testing.UNIT[dtype], x.double()
    want, want_logdet = ref.demo_op(wide, scale, n)
    # softplus has an error of 1.7 ulp, sigmoid of 2.4; one or two products
    testing.assert_within(y, want, 6 * u * want.abs(), "y")
    # a term has the error of softplus and of a difference; partial sums of at most 70 terms are rounded
    size = abs(math.log(scale)) + torch.nn.functional.softplus(-wide)
    total = size.sum(tuple(range(x.dim() - n, x.dim()))) if n else size
    testing.assert_within(logdet, want_logdet, (4 + 70) * u * total, "logdet")
    parts = [
        ref.demo_op_backward(grads[0].double(), None, wide, scale, n),
        ref.demo_op_backward(None, grads[1].double(), wide, scale, n),
    ]
    testing.assert_within(grad_x, sum(parts), 9 * u * sum(part.abs() for part in parts), "grad_x")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(shape, dtype):
    for scale, event_dims in ((2.0, None), (0.3, 0), (1, len(shape))):
        n = len(shape) - 1 if event_dims is None else event_dims
        check(draw(shape, dtype), draw_grads(shape, n, dtype), scale, event_dims)


def test_logdet_is_that_of_the_jacobian():
    x = torch.linspace(-30, 15, 12, dtype=torch.float64).view(2, 6)
    y, logdet = ops.demo_op(x, scale=3.0)
    torch.testing.assert_close(y, 3 * torch.log1p(x.exp()))
    for row, got in zip(x, logdet, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda row: ops.demo_op(row[None], scale=3.0)[0][0], row)
        torch.testing.assert_close(got, torch.linalg.slogdet(jacobian).logabsdet)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(layout):
    for event_dims in range(5):
        grads = draw_grads((6, 5, 4, 10), event_dims)
        check(testing.laid_out(draw((6, 5, 4, 10)), layout), grads, event_dims=event_dims)


@pytest.mark.parametrize("layout", testing.gradient_layouts(torch.zeros(2, 3)))
def test_backward_takes_any_gradient_layout(layout):
    grad_y, grad_logdet = draw_grads((6, 20), 1)
    check(draw((6, 20)), (testing.gradient_layouts(grad_y)[layout], grad_logdet))
    check(draw((6, 20)), (grad_y, grad_logdet[:1].expand(6)))


@pytest.mark.parametrize("which", [0, 1], ids=["y", "logdet"])
def test_either_gradient_may_be_absent(which):
    x, grads = draw((33, 70)).requires_grad_(), draw_grads((33, 70), 1)
    (got,) = torch.autograd.grad(ops.demo_op(x)[which], x, grads[which])
    zeros = [g if i == which else torch.zeros_like(g) for i, g in enumerate(grads)]
    assert torch.equal(got, run(x, zeros)[2])


def digest() -> str:
    """One hash over sizes; run in a process per instruction set."""
    h = hashlib.sha256()
    for shape in [(33, 70), (2, 9001), (300, 3)]:
        for v in run(draw(shape), draw_grads(shape, 1)):
            h.update(v.numpy().tobytes())
    return h.hexdigest()


def test_instruction_sets_give_the_same_bits(every_instruction_set):
    assert len(every_instruction_set) == 1


def test_bits_do_not_depend_on_threads_or_batch():
    for shape in [(200, 392), (3, 30000)]:
        x, grads = draw(shape), draw_grads(shape, 1)
        with testing.threads(1):
            single = run(x, grads)
        with testing.threads(4):
            several = run(x, grads)
        for a, b, first in zip(single, several, run(x[:1], [g[:1] for g in grads]), strict=True):
            testing.assert_same_bits(a, b)
            testing.assert_same_bits(a[:1], first)


def test_every_output_element_is_written():
    with testing.poisoned():
        for shape in [(5, 70), (2, 9000), (40, 3)]:
            assert not any(v.isnan().any() for v in run(draw(shape), draw_grads(shape, 1)))


def test_nan_and_infinity_travel_as_in_the_reference():
    special = torch.tensor([0.0, -0.0, 1.0, 30.0, -200.0, 1e30, torch.inf, -torch.inf, torch.nan])
    check(special, (torch.ones_like(special), torch.ones_like(special)), event_dims=0)
    for x in (torch.inf, -torch.inf, torch.nan):
        row = torch.tensor([[1.0, x, 2.0]])
        assert torch.equal(ops.demo_op(row)[1].isfinite(), ref.demo_op(row, 1.0, 1)[1].isfinite())


def test_gradcheck_twice():
    x = draw((3, 4), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(ops.demo_op, x)
    assert torch.autograd.gradgradcheck(ops.demo_op, x)


@pytest.mark.parametrize("layout", ["contiguous", "stepped", "transposed"])
def test_opcheck(layout):
    x, grad = (testing.laid_out(draw((3, 4), seed=i), layout).requires_grad_() for i in (0, 1))
    torch.library.opcheck(torch.ops.pyflow.demo_op.default, (x, 2.0, 1))
    torch.library.opcheck(torch.ops.pyflow.demo_op_backward.default, (grad, draw((3,)).requires_grad_(), x, 2.0, 1))
    torch.library.opcheck(torch.ops.pyflow.demo_op_backward.default, (None, draw((3,)), x, 2.0, 1))


def test_compiles_without_a_graph_break_to_the_same_bits():
    x, grads = draw((6, 40)).requires_grad_(), draw_grads((6, 40), 1)
    outputs = torch.compile(lambda x: ops.demo_op(x, scale=2.0), fullgraph=True)(x)
    got = *(v.detach() for v in outputs), *torch.autograd.grad(outputs, x, grads)
    for a, b in zip(got, run(x, grads, scale=2.0), strict=True):
        testing.assert_same_bits(a, b)


def test_function_transforms_agree_with_the_reference():
    x = draw((3, 4), torch.float64)
    loss = lambda x: sum(v.sum() for v in ops.demo_op(x, scale=2.0))
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
    for a, b in zip(got, ops.demo_op(draw((4, 40))), strict=True):
        testing.assert_same_bits(a, b)


X = torch.zeros(2, 4)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda f: f([1.0]), TypeError, "x must be a tensor, got list"),
        (lambda f: f(X.long()), TypeError, "x must be float32, float64, bfloat16 or float16, got int64"),
        (lambda f: f(X[0, 0]), ValueError, "x must have at least one dim, the batch, got a scalar"),
        (lambda f: f(X, event_dims=3), ValueError, r"event_dims must be in \[0, 2\], got 3"),
        (lambda f: f(X, event_dims=1.0), TypeError, "event_dims must be an integer, got float"),
        (lambda f: f(X, scale="1"), TypeError, "scale must be a number, got str"),
        (lambda f: f(X, scale=-1), ValueError, "scale must be positive and finite, got -1"),
        (lambda f: f(X, scale=1e-40), ValueError, r"scale must be from 7.89e-31 to 1.27e\+30 in float32, got 1e-40"),
    ],
)
def test_bad_input_gets_one_sentence(call, error, text, backend):
    with pyflow.backend(backend), pytest.raises(error, match=f"^demo_op: {text}$"):
        call(ops.demo_op)
