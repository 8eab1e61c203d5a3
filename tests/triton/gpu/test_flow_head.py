"""flow_log_prob on a GPU: within rounding of the C++ kernels, the same bits in every run and batch."""

from __future__ import annotations

import pytest
import torch

from pyflow import ops, testing
from pyflow._schemas import PRIORS

from .common import DEVICE, DTYPES, check_compiled, check_graph, compare, draw, moved, run, sized

SHAPES = [
    (3, 1), (65, 3), (33, 37), (16, 392), (7, 1000), (5, 2049), (3, 9001), (2, 50001), (5, 3, 8, 8), (2000, 64), (9,),
    (0, 4), (4, 0),
]  # fmt: skip


def head(prior):
    return lambda *v: ops.flow_log_prob(*v, prior=prior)


def leaves_of(shape, dtype=torch.float32):
    return [draw(shape, dtype), draw(shape[1:], dtype, 1, 0.3)]


@pytest.mark.parametrize("shape", sized(SHAPES), ids=str)
def test_sizes(gpu, shape):
    compare(gpu, head(PRIORS[SHAPES.index(shape) % 2]), leaves_of(shape), sums=(0, 2))


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(gpu, prior, dtype):
    compare(gpu, head(prior), leaves_of((33, 37), dtype), sums=(0, 2))
    compare(gpu, head(prior), leaves_of((40, 64), dtype)[:1], sums=(0,))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(gpu, layout):
    compare(gpu, lambda h, s: ops.flow_log_prob(testing.laid_out(h, layout), s), leaves_of((6, 5, 4, 10)), sums=(0, 2))


def test_same_bits_in_every_run_and_batch(gpu):
    for shape in sized([(300, n) for n in (3, 37, 392, 3000, 9001)]):
        x = draw(shape).to(DEVICE)
        whole = ops.flow_log_prob(x)
        testing.assert_same_bits(whole, ops.flow_log_prob(x))
        for rows in (slice(0, 1), slice(0, 7), slice(123, 200), slice(1, None)):
            testing.assert_same_bits(whole[rows], ops.flow_log_prob(x[rows]))
        log_scale = draw(shape[1:], seed=4).to(DEVICE).requires_grad_()
        grads = [torch.autograd.grad(ops.flow_log_prob(x, log_scale).sum(), log_scale)[0] for _ in range(2)]
        testing.assert_same_bits(*grads)


def test_works_in_a_cuda_graph_and_never_waits(gpu):
    (shape,) = sized([(64, 9001)]) or [(4, 600)]
    h, log_scale = (v.requires_grad_() for v in moved(leaves_of(shape)))

    def step():
        value = ops.flow_log_prob(h, log_scale, prior="logistic")
        return value.detach(), *torch.autograd.grad(value.sum(), (h, log_scale))

    check_graph(step, lambda: h.data.mul_(0.5))


def test_compiles_without_graph_breaks(kernels):
    check_compiled(head("gaussian"), leaves_of((32, 100)))


def test_unwritten_memory_is_never_read(gpu):
    with testing.poisoned():
        for shape in sized(SHAPES[:8]):
            for v in run(gpu, DEVICE, head(PRIORS[SHAPES.index(shape) % 2]), leaves_of(shape)):
                assert not v.isnan().any(), shape
