"""demo_op on a GPU: y and gradients with the bits of the C++ kernels, logdet within rounding.

Without a GPU, tests/triton/test_interpreter.py runs this file under Triton's interpreter, and
tests/cuda/test_emulated.py runs it with the CUDA kernels on a CPU, whose sums it holds to Triton's for SUMS.
"""

from __future__ import annotations

import pytest
import torch

from pyflow import ops, testing

from .common import DEVICE, DTYPES, check_compiled, check_graph, compare, draw, every_magnitude, moved, run, sized

SHAPES = [
    (9,), (3, 1), (65, 3), (33, 37), (16, 392), (7, 1000), (5, 2049), (1, 9001), (3, 9001), (2, 50001),
    (5, 3, 8, 8), (0, 4), (4, 0),
]  # fmt: skip


def demo_op(x, **options):
    return ops.demo_op(x, scale=0.7, **options)


# (operators, function, shapes of its arguments): sums of the CUDA kernels that must have the bits of Triton's
SUMS = [(("demo_op",), demo_op, [(6, 2500)])]


@pytest.mark.parametrize("shape", sized(SHAPES), ids=str)
def test_sizes(gpu, shape):
    compare(gpu, demo_op, [draw(shape, spread=3.0)], sums=(1,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(gpu, dtype):
    compare(gpu, demo_op, [draw((33, 37), dtype)], sums=(1,))
    compare(gpu, demo_op, [draw((40, 64), dtype)], sums=(1,))


def test_every_magnitude(gpu):
    # no dims are summed
    compare(gpu, lambda x: demo_op(x, event_dims=0), [every_magnitude()])


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(gpu, layout):
    for event_dims in range(5):
        function = lambda x, n=event_dims: demo_op(testing.laid_out(x, layout), event_dims=n)
        compare(gpu, function, [draw((6, 5, 4, 10))], sums=(1,))


def test_either_gradient_may_be_absent(gpu):
    for which in (0, 1):
        got = compare(gpu, lambda x, i=which: demo_op(x)[i], [draw((33, 37))], sums=(0,) if which else ())
        assert got[1].count_nonzero()


def test_same_bits_in_every_run_and_batch(gpu):
    for shape in sized([(300, n) for n in (3, 37, 392, 3000)]):
        x = draw(shape).to(DEVICE)
        whole = demo_op(x)
        for a, b in zip(whole, demo_op(x), strict=True):
            testing.assert_same_bits(a, b)
        for rows in (slice(0, 1), slice(0, 7), slice(123, 200), slice(1, None)):
            for a, b in zip(whole, demo_op(x[rows]), strict=True):
                testing.assert_same_bits(a[rows], b)


def test_works_in_a_cuda_graph_and_never_waits(gpu):
    x = moved(draw((64, 200))).requires_grad_()

    def step():
        y, logdet = demo_op(x)
        return y.detach(), logdet.detach(), *torch.autograd.grad(y.sum() + logdet.sum(), x)

    check_graph(step, lambda: x.data.mul_(0.5))


def test_compiles_without_graph_breaks(kernels):
    check_compiled(demo_op, [draw((32, 100))])


def test_unwritten_memory_is_never_read(gpu):
    with testing.poisoned():
        for shape in sized(SHAPES):
            for v in run(gpu, DEVICE, demo_op, [draw(shape)]):
                assert not v.isnan().any(), shape
