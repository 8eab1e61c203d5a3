"""Accept steps and gradient penalties on a GPU: the decisions of the CPU, in graphs and without waiting."""

from __future__ import annotations

import pytest
import torch

import pyflow
from pyflow import _backend, ops, testing

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(why), reason=f"{name}: {why}"))
    for name, why in _backend.status().items()
    if name in ("triton", "cuda")
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(7,), (33, 5), (64, 128), (12, 600), (3, 9001), (5, 3, 4, 6), (4, 0), (0, 3)]


@pytest.fixture(params=BACKENDS)
def gpu(request):
    with pyflow.backend(request.param):
        yield request.param


def draw(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def chain(shape, dtype=torch.float32):
    z, grad = draw(shape, dtype), draw(shape, dtype, 1)
    u = draw(shape[:1], seed=4)
    u_new = u + draw(shape[:1], seed=5) + 0.5
    if len(u) > 3:
        u_new[1], u_new[2] = torch.nan, torch.inf
    return z, z + 0.1 * draw(shape, dtype, 2), u, u_new, grad, grad + 0.05 * draw(shape, dtype, 3)


def moved(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("dtype", DTYPES)
def test_accept(gpu, dtype):
    for shape in SHAPES:
        args = chain(shape, dtype)
        for alpha in (0.01, torch.tensor(0.01), torch.full(shape[:1], 0.02)):
            for seed in (3, torch.tensor(7), ops.sample_seeds(5, shape[0])):
                got = ops.mala_accept(*map(moved, args), moved(alpha), seed=moved(seed), step=2**35 + 1)
                with pyflow.backend("auto"):
                    want = ops.mala_accept(*args, alpha, seed=seed, step=2**35 + 1)
                assert torch.equal(got[3].cpu(), want[3]), shape
                for a, b in zip(got[:3], want[:3]):
                    assert a.stride() == b.stride()
                    testing.assert_same_bits(a.cpu(), b, str(shape))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(gpu, layout):
    z, new, u, u_new, grad, grad_new = map(moved, chain((6, 5, 4, 10)))
    views = [testing.laid_out(v, layout) for v in (z, new, grad, grad_new)]
    got = ops.mala_accept(views[0], views[1], u, u_new, *views[2:], 0.01, seed=3)
    for a, b in zip(got[:3], ops.mala_accept(z, new, u, u_new, grad, grad_new, 0.01, seed=3)):
        testing.assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_penalty(gpu, dtype):
    for shape in SHAPES:
        grad = draw(shape, dtype)
        exact = grad.double().reshape(shape[0], -1 if grad.numel() else 0).square().sum(1)
        got = ops.grad_norm_penalty(grad.cuda()).cpu()
        testing.assert_within(got, exact, 1e-5 * exact if got.dtype == torch.float32 else 1e-13 * exact)


def test_works_in_a_cuda_graph_and_never_waits(gpu):
    args = [v.cuda() for v in chain((64, 9001))]
    seed, step = torch.arange(64, device="cuda"), torch.tensor(3, device="cuda")
    alpha = torch.full((64,), 0.01, device="cuda")

    def advance():
        new = ops.mala_propose(args[0], args[4], alpha, seed=seed, step=step)
        return *ops.mala_accept(args[0], new, *args[2:], alpha, seed=seed, step=step), ops.grad_norm_penalty(new)

    wanted = advance()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = advance()
    graph.replay()
    for a, b in zip(captured, wanted):
        assert torch.equal(a, b)
    step += 1
    graph.replay()
    for a, b in zip(captured, advance()):
        assert torch.equal(a, b)
