"""GAN-QP on a GPU: within rounding of the C++ kernels, the same bits in every run and batch, no host sync."""

from __future__ import annotations

import pytest
import torch

import pyflow
from pyflow import _backend, ops, testing
from pyflow._schemas import DISTANCES

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(why), reason=f"{name}: {why}"))
    for name, why in _backend.status().items()
    if name in ("triton", "cuda")
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(3, 1), (65, 3), (33, 37), (5, 2049), (3, 9001), (2, 50001), (5, 3, 8, 8), (2000, 64), (9,), (0, 4)]


@pytest.fixture(params=BACKENDS)
def gpu(request):
    with pyflow.backend(request.param):
        yield request.param


def draw(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(shape, dtype=torch.float32, latents=True):
    """Critic's values, of which the second is float32, samples and latents."""
    values = [draw(shape[:1], t, seed) for seed, t in enumerate((dtype, torch.float32))]
    samples = [draw(shape, dtype, seed) for seed in (2, 3)]
    return values + samples + [draw((shape[0], 130), dtype, seed) for seed in (4, 5) if latents]


def run(backend, tensors, device, **options):
    """Losses and gradients, back on the CPU."""
    tensors = [t.to(device) for t in tensors]
    leaves = [t.requires_grad_() for t in tensors[:2]]
    with pyflow.backend(backend):
        loss = ops.gan_qp_loss(*leaves, *tensors[2:], reduction="none", **options)
        grads = torch.autograd.grad(loss, leaves, draw(loss.shape, loss.dtype, 9).to(device))
    return [v.detach().cpu() for v in (loss, *grads)]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("latents", [True, False])
def test_agrees_with_the_cpu(gpu, distance, dtype, latents):
    for shape in SHAPES:
        tensors = inputs(shape, dtype, latents)
        stepped = tensors[:2] + [torch.stack((t, t), -1)[..., 0] for t in tensors[2:]]
        for given in (tensors, stepped):
            got = run(gpu, given, "cuda", distance=distance)
            for a, b in zip(got, run("auto", given, "cpu", distance=distance)):
                error = 2e-12 if dtype == torch.float64 else 2e-5
                assert a.dtype == b.dtype
                testing.assert_within(a, b, (error + testing.UNIT[a.dtype]) * (1 + b.double().abs()), str(shape))


@pytest.mark.skipif(bool(_backend.status()["cuda"] or _backend.status()["triton"]), reason="needs both backends")
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_and_cuda_agree_bit_for_bit(shape, distance):
    results = [run(backend, inputs(shape), "cuda", distance=distance) for backend in ("triton", "cuda")]
    for a, b in zip(*results):
        testing.assert_same_bits(a, b)


def test_same_bits_in_every_run_and_batch(gpu):
    for cols in (3, 37, 3000, 9001):
        tensors = inputs((300, cols))
        whole = run(gpu, tensors, "cuda")
        for a, b in zip(whole, run(gpu, tensors, "cuda")):
            testing.assert_same_bits(a, b)
        for rows in (slice(0, 1), slice(123, 200), slice(1, None)):
            testing.assert_same_bits(whole[0][rows], run(gpu, [t[rows] for t in tensors], "cuda")[0])


def test_works_in_a_cuda_graph_and_never_waits(gpu):
    tensors = [t.cuda() for t in inputs((64, 9001))]
    step = lambda: ops.gan_qp_loss(*tensors, reduction="none")  # noqa: E731
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        graph.replay()
        testing.assert_same_bits(captured, step())
        for t in tensors:
            t.mul_(0.5)


def test_compiles_without_a_break(gpu):
    tensors = [t.cuda() for t in inputs((32, 100))]
    leaves = [t.requires_grad_() for t in tensors[:2]]
    function = lambda *v: ops.gan_qp_loss(*v, reduction="none")  # noqa: E731
    got, want = torch.compile(function, fullgraph=True)(*tensors), function(*tensors)
    testing.assert_same_bits(got, want)
    for a, b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves)):
        testing.assert_same_bits(a, b)


def test_more_elements_than_an_int32_counts(gpu):
    count = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    for shape in [(1, count), (count // 64, 64), (3, count // 2)]:
        x = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
        ones = torch.ones((1, 1), dtype=torch.bfloat16, device="cuda").expand(shape)
        t = torch.ones(shape[0], device="cuda")
        loss = ops.gan_qp_loss(t, t - 1, x, ones, lam=1.0, reduction="none")
        torch.testing.assert_close(loss, torch.full_like(loss, -0.5))
        del x
