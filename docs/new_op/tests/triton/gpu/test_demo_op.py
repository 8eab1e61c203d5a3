"""demo_op on a GPU, with the bits of the C++ kernels.

Without a GPU, tests/triton/test_interpreter.py runs this file under Triton's interpreter, and
tests/cuda/test_emulated.py runs it with the CUDA kernels on a CPU.
"""

from __future__ import annotations

import pytest
import torch

from pyflow import ops, testing

from .common import DEVICE, DTYPES, check_compiled, check_graph, compare, draw, every_magnitude, moved, run, sized

SHAPES = [
    (), (9,), (3, 1), (65, 3), (33, 37), (16, 392), (7, 1000), (5, 2049), (1, 9001), (3, 9001), (2, 50001),
    (5, 3, 8, 8), (0, 4), (4, 0),
]  # fmt: skip


def demo_op(x):
    return ops.demo_op(x, scale=0.7)


@pytest.mark.parametrize("shape", sized(SHAPES), ids=str)
def test_sizes(gpu, shape):
    compare(gpu, demo_op, [draw(shape, spread=3.0)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(gpu, dtype):
    compare(gpu, demo_op, [draw((33, 37), dtype)])
    compare(gpu, demo_op, [draw((40, 64), dtype)])


def test_every_magnitude(gpu):
    compare(gpu, demo_op, [every_magnitude()])


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(gpu, layout):
    compare(gpu, lambda x: demo_op(testing.laid_out(x, layout)), [draw((6, 5, 4, 10))])


def test_same_bits_in_every_run_and_batch(gpu):
    for shape in sized([(300, n) for n in (3, 37, 392, 3000)]):
        x = draw(shape).to(DEVICE)
        whole = demo_op(x)
        testing.assert_same_bits(whole, demo_op(x))
        for rows in (slice(0, 1), slice(0, 7), slice(123, 200), slice(1, None)):
            testing.assert_same_bits(whole[rows], demo_op(x[rows]))


def test_works_in_a_cuda_graph_and_never_waits(gpu):
    x = moved(draw((64, 200))).requires_grad_()

    def step():
        y = demo_op(x)
        return y.detach(), *torch.autograd.grad(y.sum(), x)

    check_graph(step, lambda: x.data.mul_(0.5))


def test_compiles_without_graph_breaks(kernels):
    check_compiled(demo_op, [draw((32, 100))])


def test_unwritten_memory_is_never_read(gpu):
    with testing.poisoned():
        for shape in sized(SHAPES):
            for v in run(gpu, DEVICE, demo_op, [draw(shape)]):
                assert not v.isnan().any(), shape
