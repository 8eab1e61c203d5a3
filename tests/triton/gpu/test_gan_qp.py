"""GAN-QP on a GPU: within rounding of the C++ kernels, the same bits in every run and batch, no host sync."""

from __future__ import annotations

import pytest
import torch

from pyflow import ops, testing
from pyflow._schemas import DISTANCES

from .common import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    check_compiled,
    check_graph,
    compare,
    draw,
    moved,
    needs_memory,
    run,
    sized,
)  # fmt: skip

SHAPES = [(3, 1), (65, 3), (33, 37), (5, 2049), (3, 9001), (2, 50001), (5, 3, 8, 8), (2000, 64), (9,), (0, 4)]


def inputs(shape, dtype=torch.float32, latents=True):
    """Critic's values, the second in float32, then samples and latents."""
    values = [draw(shape[:1], t, seed) for seed, t in enumerate((dtype, torch.float32))]
    samples = [draw(shape, dtype, seed) for seed in (2, 3)]
    return values + samples + [draw((shape[0], 130), dtype, seed) for seed in (4, 5) if latents]


def loss_of(distance, reduction="none"):
    return lambda *values: ops.gan_qp_loss(*values, reduction=reduction, distance=distance)


def check(gpu, tensors, distance):
    compare(gpu, loss_of(distance), tensors[:2], *tensors[2:], sums=(0, 1, 2))


@pytest.mark.parametrize("shape", sized(SHAPES), ids=str)
def test_sizes(gpu, shape):
    number = SHAPES.index(shape)
    tensors = inputs(shape, latents=number % 3 > 0)
    check(gpu, tensors, DISTANCES[number % 2])
    if number % 4 < 2:
        stepped = [torch.stack((t, t), -1)[..., 0] for t in tensors[2:]]
        check(gpu, tensors[:2] + stepped, DISTANCES[number % 2])


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("latents", [True, False])
def test_dtypes(gpu, distance, dtype, latents):
    check(gpu, inputs((33, 37), dtype, latents), distance)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(gpu, layout):
    tensors = inputs((6, 5, 4, 10))
    viewed = lambda *v: loss_of("l2")(*v[:2], *(testing.laid_out(t, layout) for t in v[2:4]), *v[4:])
    compare(gpu, viewed, tensors[:2], *tensors[2:], sums=(0, 1, 2))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("shape", SHAPES[2::3], ids=str)
def test_triton_and_cuda_agree_bit_for_bit(both_backends, shape, distance):
    tensors = inputs(shape)
    results = [run(name, DEVICE, loss_of(distance), tensors[:2], *tensors[2:]) for name in ("triton", "cuda")]
    for a, b in zip(*results, strict=True):
        testing.assert_same_bits(a, b)


def test_mean_and_generator(gpu):
    tensors = inputs((33, 37))
    compare(gpu, loss_of("l1", "mean"), tensors[:2], *tensors[2:], sums=(0, 1, 2))
    compare(gpu, ops.gan_qp_generator_loss, tensors, sums=range(7))


def test_same_bits_in_every_run_and_batch(gpu):
    for cols in (3, 600) if INTERPRETED else (3, 37, 3000, 9001):
        tensors = inputs((20 if INTERPRETED else 300, cols))
        whole, again = (run(gpu, DEVICE, loss_of("l1"), tensors[:2], *tensors[2:]) for _ in range(2))
        for a, b in zip(whole, again, strict=True):
            testing.assert_same_bits(a, b)
        for rows in (slice(0, 1), slice(7, 19), slice(1, None)):
            part = [t[rows] for t in tensors]
            testing.assert_same_bits(whole[0][rows], run(gpu, DEVICE, loss_of("l1"), part[:2], *part[2:])[0])


def test_works_in_a_cuda_graph_and_never_waits(gpu):
    tensors = moved(inputs((64, 9001) if not INTERPRETED else (4, 300)))
    leaves = [t.requires_grad_() for t in tensors[:2]]

    def step():
        loss = loss_of("l2")(*tensors)
        return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)

    check_graph(step, lambda: [t.data.mul_(0.5) for t in tensors])


def test_compiles_without_graph_breaks(kernels):
    tensors = inputs((32, 100))
    given = moved(tensors[2:])
    check_compiled(lambda *t: loss_of("l1")(*t, *given), tensors[:2])


def test_unwritten_memory_is_never_read(gpu):
    with testing.poisoned():
        for shape in sized(SHAPES):
            tensors = inputs(shape)
            for v in run(gpu, DEVICE, loss_of("l2"), tensors[:2], *tensors[2:]):
                assert not v.isnan().any(), shape


@pytest.mark.slow
def test_more_elements_than_an_int32_counts(gpu):
    needs_memory(40)
    count = 2**31 + 4096
    for shape in [(1, count), (count // 64, 64), (3, count // 2)]:
        x = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
        ones = torch.ones((1, 1), dtype=torch.bfloat16, device="cuda").expand(shape)
        t = torch.ones(shape[0], device="cuda")
        loss = ops.gan_qp_loss(t, t - 1, x, ones, lam=1.0, reduction="none")
        torch.testing.assert_close(loss, torch.full_like(loss, -0.5))
        del x
