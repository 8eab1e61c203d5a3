"""Accept steps and gradient penalties on a GPU: decisions as on the CPU, in CUDA graphs, without synchronising."""

from __future__ import annotations

import pytest
import torch

import pyflow
from pyflow import ops, testing

from .common import DEVICE, DTYPES, INTERPRETED, check_compiled, check_graph, compare, draw, moved, sized

SHAPES = [(7,), (33, 5), (64, 128), (12, 600), (3, 9001), (5, 3, 4, 6), (4, 0), (0, 3)]
STEP = 2**35 + 1


def chain(shape, dtype=torch.float32):
    """Arguments for which mala_accept accepts about half of the rows; two energies are NaN or infinite."""
    z, grad = draw(shape, dtype), draw(shape, dtype, 1)
    u = draw(shape[:1], seed=4)
    u_new = u + draw(shape[:1], seed=5) + 0.5
    if len(u) > 3:
        u_new[1], u_new[2] = torch.nan, torch.inf
    return z, z + 0.1 * draw(shape, dtype, 2), u, u_new, grad, grad + 0.05 * draw(shape, dtype, 3)


@pytest.mark.parametrize(
    "shape, dtype", [(shape, torch.float32) for shape in sized(SHAPES)]
    + [(shape, dtype) for dtype in DTYPES[1:] for shape in ((33, 5), (12, 600))],
)  # fmt: skip
def test_accept(gpu, shape, dtype):
    args = chain(shape, dtype)
    with pyflow.backend("auto"):
        seeds = (2**64 - 5, torch.tensor(7), ops.sample_seeds(5, shape[0]))
    for alpha, seed in zip((0.01, torch.tensor(0.01), torch.full(shape[:1], 0.02)), seeds, strict=True):
        got = ops.mala_accept(*moved(args), moved(alpha), seed=moved(seed), step=STEP)
        with pyflow.backend("auto"):
            want = ops.mala_accept(*args, alpha, seed=seed, step=STEP)
        assert torch.equal(got[3].cpu(), want[3])
        for a, b in zip(got[:3], want[:3], strict=True):
            assert a.stride() == b.stride()
            testing.assert_same_bits(a.cpu(), b)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(gpu, layout):
    z, new, u, u_new, grad, grad_new = moved(chain((6, 5, 4, 10)))
    views = [testing.laid_out(v, layout) for v in (z, new, grad, grad_new)]
    got = ops.mala_accept(views[0], views[1], u, u_new, *views[2:], 0.01, seed=3)
    for a, b in zip(got[:3], ops.mala_accept(z, new, u, u_new, grad, grad_new, 0.01, seed=3), strict=False):
        testing.assert_same_bits(a, b)


@pytest.mark.parametrize(
    "shape, dtype", [(shape, torch.float32) for shape in sized(SHAPES)] + [((12, 600), d) for d in DTYPES[1:]]
)
def test_penalty(gpu, shape, dtype):
    compare(gpu, ops.grad_norm_penalty, [draw(shape, dtype)], sums=(0,), libm=False)
    grad = draw(shape, dtype)
    exact = grad.double().reshape(shape[0], -1 if grad.numel() else 0).square().sum(1)
    got = ops.grad_norm_penalty(grad.to(DEVICE)).cpu()
    testing.assert_within(got, exact, (1e-13 if dtype == torch.float64 else 1e-5) * exact)


def test_same_bits_in_every_run_and_batch(gpu):
    for cols in (5, 600) if INTERPRETED else (5, 128, 600, 9001):
        args, own = moved(chain((40, cols))), ops.sample_seeds(torch.tensor(3, device=DEVICE), 40)
        whole = ops.mala_accept(*args, 0.01, seed=own), ops.grad_norm_penalty(args[0])
        for rows in (slice(None), slice(0, 1), slice(3, 20), slice(1, None)):
            part = [v[rows] for v in args]
            for a, b in zip(whole[0], ops.mala_accept(*part, 0.01, seed=own[rows]), strict=True):
                testing.assert_same_bits(a[rows], b)
            testing.assert_same_bits(whole[1][rows], ops.grad_norm_penalty(part[0]))


def test_works_in_a_cuda_graph_and_never_waits(gpu):
    shape = (64, 9001) if not INTERPRETED else (4, 300)
    args = moved(chain(shape))
    seed, step = torch.arange(shape[0], device=DEVICE), torch.tensor(3, device=DEVICE)
    alpha = torch.full(shape[:1], 0.01, device=DEVICE)

    def advance():
        new = ops.mala_propose(args[0], args[4], alpha, seed=seed, step=step)
        return *ops.mala_accept(args[0], new, *args[2:], alpha, seed=seed, step=step), ops.grad_norm_penalty(new)

    check_graph(advance, lambda: step.add_(1))


def test_compiles_without_graph_breaks(kernels):
    check_compiled(ops.grad_norm_penalty, [draw((32, 100))])
    args = moved(chain((12, 40)))
    function = lambda *v: ops.mala_accept(*v, 0.01, seed=3)
    for a, b in zip(torch.compile(function, fullgraph=True)(*args), function(*args), strict=True):
        testing.assert_same_bits(a, b)


@pytest.mark.parametrize("kind", ["linear", "hinge", "ebgan"])
def test_losses(gpu, kind):
    compare(gpu, lambda a, b: ops.energy_loss(a, b, kind), [draw((40,)), draw((40,), seed=1)], sums=(0, 1, 2))
