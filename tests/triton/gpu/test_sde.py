"""SDE steps on a GPU: the bits of the C++ kernels, sums within rounding, in CUDA graphs, without synchronising."""

from __future__ import annotations

import pytest
import torch

from pyflow import ops, testing

from .common import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    check_compiled,
    check_graph,
    compare,
    draw,
    few,
    moved,
    needs_memory,
    run,
    sized,
)  # fmt: skip

SHAPES = [(), (0,), (7,), (65, 3), (33, 37), (16, 392), (5, 3, 7, 4), (3, 9001), (2, 50001), (3000, 2)]
COEFFICIENTS = ("numbers", "0-d", "per sample")
# bound for row sums of products; elementwise results have the bits of the CPU in float64 too
WITHIN = dict(error=2e-4, libm=False)


def coefficients(kind, shape):
    if kind == "numbers" or (kind == "per sample" and not shape):
        return 1.1, 0.3, 0.7
    a, b, c = draw((3, *shape[:1]) if kind == "per sample" else (3,), seed=5).unbind(0)
    return a, b, c.abs()


def seeds(shape):
    return (2**64 - 5, torch.tensor(7), *(torch.arange(n) * 2**33 - 2 for n in shape[:1]))


def step(*values):
    return ops.sde_step(*values[:5], seed=values[5], step=2**33, return_mean=True)


def check(gpu, shape, dtype, turn):
    """Compare a step with one choice of seed and coefficients, rotated by `turn`, and a step with given noise."""
    # each kind of seed and of coefficients compiles a kernel per shape and dtype, so the kinds rotate
    x, score = draw(shape, dtype), draw(shape, seed=1)
    every = seeds(shape)
    for k in {turn % len(every), (turn + 2) % len(every)} if dtype != torch.float32 else {turn % len(every)}:
        seed, values = every[k], coefficients(COEFFICIENTS[(turn // 2 + k) % 3], shape)
        compare(gpu, step, (x, score, *values), seed, sums=(4, 5, 6), **WITHIN)
        perturb = lambda x, a, c, seed: ops.perturb(x, a, c, seed=seed)
        compare(gpu, perturb, (x, values[0], values[2]), seed, sums=(2, 3), **WITHIN)
    injected = lambda x, s, z: ops.sde_step(x, s, 1.1, 0.3, 0.7, noise=z)
    compare(gpu, injected, (x, score, draw(shape, dtype, 6)), **WITHIN)


@pytest.mark.parametrize("shape", sized(SHAPES), ids=str)
def test_sizes(gpu, shape):
    check(gpu, shape, torch.float32, SHAPES.index(shape))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_dtypes(gpu, dtype):
    check(gpu, (33, 37), dtype, DTYPES.index(dtype))


@pytest.mark.parametrize("kind", COEFFICIENTS)
def test_coefficients(gpu, kind):
    for seed in seeds((16, 40)):
        leaves = (draw((16, 40)), draw((16, 40), seed=1), *coefficients(kind, (16, 40)))
        compare(gpu, step, leaves, seed, sums=(4, 5, 6), **WITHIN)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(gpu, layout):
    for seed in (3, torch.arange(6)):
        viewed = lambda x, s, seed: ops.sde_step(testing.laid_out(x, layout), s, 1.1, 0.3, 0.7, seed=seed)
        compare(gpu, viewed, (draw((6, 5, 4, 10)), draw((6, 5, 4, 10), seed=1)), seed)


@pytest.mark.parametrize(
    "shape, dtype", [(shape, torch.float32) for shape in sized(SHAPES[1:])] + [((33, 37), d) for d in DTYPES[1:]]
)
def test_loss_and_corrector(gpu, shape, dtype):
    pred, score, std = draw(shape, dtype), draw(shape, dtype, 1), draw(shape[:1], seed=2).abs()
    every, turn = seeds(shape), SHAPES.index(shape) + DTYPES.index(dtype)
    for seed in every if (shape, dtype) == ((33, 37), torch.float32) else every[turn % 3 : turn % 3 + 1]:
        compare(gpu, lambda p, c, seed: ops.denoising_loss(p, c, seed=seed), (pred, std), seed, sums=(0, 2), **WITHIN)
        epsilon = lambda p, seed: ops.denoising_loss(p, seed=seed, parameterization="epsilon")
        compare(gpu, epsilon, (pred,), seed, sums=(0,), **WITHIN)
        for norm in ("sample", "batch"):
            corrector = lambda x, s, seed: ops.langevin_step(x, s, snr=0.2, norm=norm, seed=seed)
            compare(gpu, corrector, (pred, score), seed, sums=(0, 2), **WITHIN)


def test_a_sample_does_not_depend_on_its_batch(gpu):
    own = ops.sample_seeds(torch.tensor(3, device=DEVICE), 40)
    for cols in few((7, 392, 9001), 2):
        x, score = draw((40, cols)).to(DEVICE), draw((40, cols), seed=1).to(DEVICE)
        a, b, c = moved(coefficients("per sample", (40,)))

        def advance(rows):
            x_, score_, own_, c_ = x[rows], score[rows], own[rows], c[rows]
            moved_ = ops.sde_step(x_, score_, a[rows], b[rows], c_, seed=own_)
            return (
                moved_,
                ops.langevin_step(x_, score_, snr=0.16, norm="sample", seed=own_),
                ops.denoising_loss(x_, c_, seed=own_),
            )

        whole = advance(slice(None))
        for rows in (slice(None), slice(0, 1), slice(3, 20), slice(1, None)):
            for p, q in zip(whole, advance(rows), strict=True):
                testing.assert_same_bits(p[rows], q)


def test_works_in_a_cuda_graph_and_never_waits(gpu):
    shape = (64, 9001) if not INTERPRETED else (4, 300)
    x, score = draw(shape).to(DEVICE), draw(shape, seed=1).to(DEVICE)
    a, b, c = moved(coefficients("per sample", shape))
    seed, number = torch.arange(shape[0], device=DEVICE), torch.tensor(3, device=DEVICE)

    def advance():
        y = ops.sde_step(x, score, a, b, c, seed=seed, step=number)
        y = ops.langevin_step(y, score, snr=0.16, norm="sample", seed=seed, step=number)
        y = ops.sde_step(y, score, 1.01, 0.05, 0.3, seed=11, step=4)
        return y, ops.denoising_loss(y, c, seed=seed, step=number)

    check_graph(advance, lambda: number.add_(1), lambda: seed.add_(1000))


def test_compiles_without_graph_breaks(kernels):
    function = lambda x, s: ops.sde_step(x, s, 1.01, 0.05, 0.3, seed=11, step=4)
    check_compiled(function, [draw((32, 100)), draw((32, 100), seed=1)])
    loss = lambda p, c: ops.denoising_loss(p, c, seed=11, step=4)
    check_compiled(loss, [draw((32, 100)), draw((32,), seed=1).abs()])


def test_unwritten_memory_is_never_read(gpu):
    with testing.poisoned():
        for shape in sized(SHAPES):
            leaves = (draw(shape), draw(shape, seed=1), *coefficients("0-d", shape))
            assert not any(v.isnan().any() for v in run(gpu, DEVICE, step, leaves, 3)), shape


def test_errors_name_the_device(gpu):
    if INTERPRETED:
        pytest.skip("the interpreter has one device")
    x = torch.zeros(2, 4, device="cuda")
    with pytest.raises(ValueError, match=r"^sde_step: seed must be on the device of the result, cuda:0, got cpu$"):
        ops.sde_step(x, x, 1, 1, 1, seed=torch.tensor(1))
    with pytest.raises(ValueError, match=r"^sde_step: c must be on the device of x, cuda:0, got cpu$"):
        ops.sde_step(x, x, 1, 1, torch.tensor(1.0), seed=1)


@pytest.mark.slow
def test_more_elements_than_an_int32_counts(gpu):
    needs_memory(40)
    count, tail = 2**31 + 4096, 8192
    x = torch.full((count,), 2.0, dtype=torch.bfloat16, device="cuda")
    score = torch.ones((), device="cuda").expand(count)
    y = ops.sde_step(x, score, 0.5, 3.0, 0.25, seed=7)
    z = ops.normal((count,), seed=7, dtype=torch.bfloat16, device="cuda")
    for part in (slice(0, tail), slice(count - tail, None)):
        # z and y are each rounded to bfloat16
        testing.assert_within(y[part], 4 + 0.25 * z[part].double(), 2.0**-7)
    del y
    loss = ops.denoising_loss(x.view(2, -1), seed=7, parameterization="epsilon")
    # E (2 - z)^2 / 2 = 2.5, standard deviation 4.2
    assert ((loss / (count / 2) - 2.5).abs() < 5 * 4.2 / (count / 2) ** 0.5).all()
