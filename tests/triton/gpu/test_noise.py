"""Noise and SDE steps on a GPU: the bits of the reference, which are those of C++, in graphs and without waiting."""

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
SHAPES = [(), (0,), (7,), (65, 3), (33, 37), (16, 392), (5, 3, 7, 4), (3, 9001), (2, 50001), (3000, 2)]
COEFFICIENTS = ["numbers", "0-d", "per sample"]


@pytest.fixture(params=BACKENDS)
def gpu(request):
    with pyflow.backend(request.param):
        yield request.param


def draw(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def coefficients(kind, shape):
    if kind == "numbers":
        return 1.1, 0.3, 0.7
    a, b, c = draw((3, *shape[:1]) if kind == "per sample" else (3,), seed=5).unbind(0)
    return a, b, c.abs()


def seeds(shape):
    return (3, 2**64 - 5, torch.tensor(7), *(torch.arange(n) * 2**33 - 2 for n in shape[:1]))


def moved(value, device):
    return value.to(device) if isinstance(value, torch.Tensor) else value


def run(backend, device, function, tensors, seed):
    """Outputs, then gradients of what is differentiable, on the CPU."""
    tensors = [moved(t, device) for t in tensors]
    leaves = [t.requires_grad_() for t in tensors if isinstance(t, torch.Tensor)]
    with pyflow.backend(backend):
        outputs = function(*tensors, moved(seed, device))
        weights = [draw(o.shape, o.dtype, 9).to(device) for o in outputs]
        grads = torch.autograd.grad(outputs, leaves, weights)
    return [v.detach().cpu() for v in (*outputs, *grads)]


def compare(gpu, function, tensors, seed, sums=()):
    """Bits of the CPU; results at `sums` within rounding."""
    got, want = run(gpu, "cuda", function, tensors, seed), run("auto", "cpu", function, tensors, seed)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == b.dtype and a.stride() == b.stride(), f"output {i}"
        if i in sums:
            size = 1 + b.double().abs()
            error = 2e-12 if b.dtype == torch.float64 else 2e-4 + testing.UNIT[b.dtype]
            testing.assert_within(a, b.double(), error * size, f"output {i}")
        else:
            testing.assert_same_bits(a, b, f"output {i}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_noise(gpu, kind, dtype):
    for shape in SHAPES:
        for seed in seeds(shape):
            for step in (2**40 + 3, torch.tensor(5)):
                options = dict(dtype=dtype, purpose="prior")
                got = getattr(ops, kind)(
                    shape, seed=moved(seed, "cuda"), step=moved(step, "cuda"), device="cuda", **options
                )
                with pyflow.backend("reference"):
                    testing.assert_same_bits(got.cpu(), getattr(ops, kind)(shape, seed=seed, step=step, **options))
    words = torch.randint(2**32, (5, 70, 4)), torch.randint(2**32, (70, 2))
    testing.assert_same_bits(ops.philox(*(w.cuda() for w in words)).cpu(), ops.philox(*words))
    testing.assert_same_bits(ops.sample_seeds(torch.tensor(5, device="cuda"), 100).cpu(), ops.sample_seeds(5, 100))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", COEFFICIENTS)
def test_sde_step(gpu, kind, dtype):
    for shape in SHAPES[dtype != torch.float32 :: 1 + (dtype != torch.float32)]:
        if kind == "per sample" and not shape:
            continue
        x, score = draw(shape, dtype), draw(shape, seed=1)
        for seed in seeds(shape):
            step = lambda *v: ops.sde_step(*v[:5], seed=v[5], step=2**33, return_mean=True)  # noqa: E731
            compare(gpu, step, (x, score, *coefficients(kind, shape)), seed, sums=(4, 5, 6))
        injected = lambda x, s, z, _: (ops.sde_step(x, s, 1.1, 0.3, 0.7, noise=z),)  # noqa: E731
        compare(gpu, injected, (x, score, draw(shape, dtype, 6)), None)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(gpu, layout):
    for seed in (3, torch.arange(6)):
        step = lambda x, s, seed: (ops.sde_step(testing.laid_out(x, layout), s, 1.1, 0.3, 0.7, seed=seed),)  # noqa: E731
        compare(gpu, step, (draw((6, 5, 4, 10)), draw((6, 5, 4, 10), seed=1)), seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_corrector(gpu, dtype):
    for shape in SHAPES[1:]:
        pred, score, std = draw(shape, dtype), draw(shape, dtype, 1), draw(shape[:1], seed=2).abs()
        for seed in seeds(shape):
            compare(gpu, lambda p, c, seed: (ops.denoising_loss(p, c, seed=seed),), (pred, std), seed, sums=(0, 2))
            epsilon = lambda p, seed: (ops.denoising_loss(p, seed=seed, parameterization="epsilon"),)  # noqa: E731
            compare(gpu, epsilon, (pred,), seed, sums=(0,))
            for norm in ("sample", "batch"):
                corrector = lambda x, s, seed: (ops.langevin_step(x, s, snr=0.2, norm=norm, seed=seed),)  # noqa: B023, E731
                compare(gpu, corrector, (pred, score), seed, sums=(0, 2))


def test_works_in_a_cuda_graph_and_never_waits(gpu):
    x, score = draw((64, 9001)).cuda(), draw((64, 9001), seed=1).cuda()
    a, b, c = (v.cuda() for v in coefficients("per sample", (64,)))
    seed, step = torch.arange(64, device="cuda"), torch.tensor(3, device="cuda")

    def advance():
        y = ops.sde_step(x, score, a, b, c, seed=seed, step=step)
        y = ops.langevin_step(y, score, snr=0.16, seed=seed, step=step)
        y = ops.sde_step(y, score, 1.01, 0.05, 0.3, seed=11, step=4)
        return y, ops.denoising_loss(y, c, seed=seed, step=step), ops.normal((100,), seed=seed[0], step=step)

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
    for p, q in zip(captured, wanted, strict=True):
        testing.assert_same_bits(p, q)
    step += 1
    seed += 1000
    graph.replay()
    for p, q in zip(captured, advance(), strict=True):
        testing.assert_same_bits(p, q)


def test_compiles_without_a_break(gpu):
    x, score = draw((32, 100)).cuda().requires_grad_(), draw((32, 100), seed=1).cuda()
    f = lambda x: ops.sde_step(x, score, 1.01, 0.05, 0.3, seed=11, step=4)  # noqa: E731
    testing.assert_same_bits(torch.compile(f, fullgraph=True)(x), f(x))


def test_errors_name_the_device(gpu):
    x = torch.zeros(2, 4, device="cuda")
    with pytest.raises(ValueError, match="^sde_step: seed must be on the device of the result, cuda:0, got cpu$"):
        ops.sde_step(x, x, 1, 1, 1, seed=torch.tensor(1))
    with pytest.raises(ValueError, match="^sde_step: c must be on the device of x, cuda:0, got cpu$"):
        ops.sde_step(x, x, 1, 1, torch.tensor(1.0), seed=1)
