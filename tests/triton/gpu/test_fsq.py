"""FSQ on a GPU: indices, codes and gradients equal those of the C++ kernels bit for bit."""

from __future__ import annotations

import math

import pytest
import torch

import pyflow
from pyflow import _backend, ops, testing
from pyflow._schemas import FSQ_VARIANTS

from .common import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    check_compiled,
    check_graph,
    draw,
    every_magnitude,
    moved,
    needs_memory,
)  # fmt: skip

F32, F64, BF16, F16 = DTYPES
# (levels, shape, channel dim)
QUANTIZERS = [
    ((8, 5, 5, 5), (3001, 4), -1), ((7, 5, 5, 5, 5), (2, 1063, 5), 2), ((8, 8, 8, 5, 5, 5), (3, 6, 37, 41), 1),
    ((5,) * 8, (2, 8, 1024), 1), ((3,), (1, 9007), 0), ((12, 1001), (2, 6000), 0), ((4, 6, 9), (3,), 0),
    ((3,) * 39, (900, 39), 1), ((2**22, 2**22, 2**19), (700, 3), 1), ((5, 3, 4), (0, 3), 1),
]  # fmt: skip
RESIDUAL = ("symmetric", "symmetric_hard")


def compare(gpu, function, z, *given):
    """Compare outputs and the gradient through the first one with the C++ kernels bit for bit (float64: rounding)."""
    results = []
    for backend, device in ((gpu, DEVICE), ("auto", "cpu")):
        leaf = z.detach().to(device).requires_grad_()
        with pyflow.backend(backend):
            outputs = function(leaf, *moved(given, device))
            gradient = torch.autograd.grad(outputs[0], leaf, draw(z.shape, z.dtype, 9).to(device))
        results.append([v.detach().cpu() for v in (*outputs, *gradient)])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        name, last = f"output {i}", i == len(results[0]) - 1
        assert a.dtype == b.dtype and (a.stride() == b.stride() or a.numel() == 0), name
        if z.dtype == F64 and last:
            testing.assert_within(a, b, 1e-12 * (1 + b.abs()), name)
        elif z.dtype == F64 or _backend.cpu_missing is not None:
            # float64 tanh is the vendor's: a value near a boundary may round to the other level
            same = (a == b) | (a.isnan() & b.isnan())
            assert a.numel() == 0 or same.double().mean() > 0.999, name
        else:
            testing.assert_same_bits(a, b, name)
    return results[0]


def quantize(levels, dim, variant):
    def function(z):
        codes, indices = ops.fsq(z, levels, variant=variant, dim=dim)
        alone, _ = ops.fsq(z, levels, variant=variant, dim=dim, return_indices=False)
        decoded = ops.fsq_decode(indices, levels, variant=variant, dim=dim, dtype=z.dtype)
        return codes, indices, alone, decoded

    return function


def residual(levels, dim, variant, stages=3):
    return lambda x, active=None: ops.residual_fsq(x, levels, stages, variant=variant, dim=dim, active=active)


def check_consistent(codes, indices, alone, decoded, dim):
    """Check that codes are the same without indices, and that indices decode to the codes where no channel is NaN."""
    testing.assert_same_bits(alone, codes)
    known = (indices >= 0).unsqueeze(dim)
    testing.assert_same_bits(decoded, torch.where(known, codes, math.nan))


@pytest.mark.parametrize("number", range(len(QUANTIZERS)))
def test_quantizers(gpu, number):
    # each pair of levels and variant compiles a kernel: one variant per case here, all of them in the tests below
    levels, shape, dim = QUANTIZERS[number]
    variants = FSQ_VARIANTS if gpu == "cuda" else (FSQ_VARIANTS[number % len(FSQ_VARIANTS)],)
    for variant in variants:
        check_consistent(*compare(gpu, quantize(levels, dim, variant), draw(shape, spread=1.5))[:4], dim)


@pytest.mark.parametrize("variant", FSQ_VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_magnitude(gpu, variant, dtype):
    z = every_magnitude(dtype).reshape(4, -1)
    check_consistent(*compare(gpu, quantize((8, 6, 5, 1000), 0, variant), z)[:4], 0)


@pytest.mark.parametrize("number", range(len(QUANTIZERS)))
def test_residual(gpu, number):
    levels, shape, dim = QUANTIZERS[number]
    for variant in RESIDUAL if gpu == "cuda" else (RESIDUAL[number % 2],):
        compare(gpu, residual(levels, dim, variant), draw(shape))
        for active in (0, 2, 5):
            compare(gpu, residual(levels, dim, variant), draw(shape), torch.tensor(active))


@pytest.mark.parametrize("variant", RESIDUAL)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_residual_dtypes(gpu, variant, dtype):
    levels, shape, dim = QUANTIZERS[1]
    compare(gpu, residual(levels, dim, variant), draw(shape, dtype))
    compare(gpu, residual(levels, dim, variant), draw(shape, dtype), torch.tensor(2))


@pytest.mark.parametrize(
    "layout, dim", [(name, 1) for name in testing.LAYOUTS]
    + [("half", 0), ("stepped", -1), ("transposed", 0), ("channels_last", -1)],
)  # fmt: skip
def test_layouts(gpu, layout, dim):
    shape = [4, 6, 5, 12]
    shape[dim] = 3
    z = draw(shape)
    laid_out = lambda function: lambda v: function(testing.laid_out(v, layout))
    compare(gpu, laid_out(quantize((7, 5, 6), dim, "vqp")), z)
    if layout in ("stepped", "transposed"):
        compare(gpu, laid_out(residual((7, 5, 6), dim, "symmetric")), z)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_part_of_the_channels(gpu, dim):
    shape = [4, 6, 5, 12]
    shape[dim] = 3
    part = lambda v: torch.cat((v, v), dim).narrow(dim, 1, 3)
    compare(gpu, lambda v: quantize((7, 5, 6), dim, "symmetric")(part(v)), draw(shape))


def test_many_channels(gpu):
    for levels in ((3,) * 40 + (5,) * 39, (6,) * 100):
        for z in (draw((200, len(levels))), draw((len(levels), 200)).t()):
            z = z[:20] if INTERPRETED else z
            compare(gpu, lambda v: ops.fsq(v, levels, return_indices=False)[:1], z)
    compare(gpu, quantize((3,) * 39, -1, "symmetric"), draw((20, 39), F64))


def test_invalid_indices_decode_to_nan(gpu):
    wild = torch.tensor([-(2**63), -2, -1, 420, 2**31 + 5, 2**63 - 1], device=DEVICE)
    if not INTERPRETED:
        # on a CPU invalid indices are an error
        assert ops.fsq_decode(wild, (3, 4, 5, 7)).isnan().all()
    codes = torch.ops.pyflow.fsq_decode(wild, [3, 4, 5, 7], 0, 1, F32)
    assert codes.isnan().all()
    z = torch.full((5, 4), math.nan, device=DEVICE)
    codes, indices = ops.fsq(z, (3, 4, 5, 7))
    assert codes.isnan().all() and indices.eq(-1).all()


def test_codebook_usage_matches_the_cpu(gpu):
    _, indices = ops.fsq(draw((1000, 3)).to(DEVICE), (5, 4, 3))
    got, want = (ops.codebook_usage(i, 60) for i in (indices, indices.cpu()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(torch.as_tensor(a).cpu(), torch.as_tensor(b))


def test_works_in_a_cuda_graph_that_follows_active(gpu):
    z, active = draw((1000, 5)).to(DEVICE).requires_grad_(), torch.tensor(1, device=DEVICE)

    def step():
        codes, indices = ops.fsq(z, (7, 5, 5, 5, 5))
        out, stages = ops.residual_fsq(codes, (7, 5, 5, 5, 5), 3, active=active)
        grads = torch.autograd.grad(out.square().sum(), z)
        return codes.detach(), indices, out.detach(), stages, ops.fsq_decode(indices, (7, 5, 5, 5, 5)), *grads

    def change(count):
        active.fill_(count)
        z.data.mul_(0.7)

    for count in (1, 3, 0):
        change(count)
        assert (step()[3] >= 0).all(0).tolist() == [stage < count for stage in range(3)]
    check_graph(step, *(lambda count=count: change(count) for count in (1, 3, 0)))


def test_compiles_without_graph_breaks(kernels):
    def function(z):
        codes, indices = ops.fsq(z, (7, 5, 5, 5, 5))
        out, stages = ops.residual_fsq(z, (7, 5, 5, 5, 5), 2)
        return codes, indices, out, stages

    check_compiled(function, [draw((300, 5))])


@pytest.mark.slow
def test_more_elements_than_an_int32_counts(gpu):
    needs_memory(40)
    levels = (5, 5, 5)
    for shape, dim in [((2**31 // 3 + 4097, 3), -1), ((3, 2**31 // 3 + 4096), 0), ((2, 3, 2**30 // 3 + 4096), 1)]:
        z = torch.zeros(shape, dtype=BF16, device="cuda").movedim(dim, 0)
        last = (slice(None), *(-1,) * (z.dim() - 1))
        z[last] = torch.tensor([-9.0, 9.0, 9.0], dtype=BF16, device="cuda")
        codes, indices = ops.fsq(z, levels, dim=0)
        assert indices.flatten()[:5].eq(62).all() and indices.flatten()[-2:].tolist() == [62, 120]
        assert codes[last].tolist() == [-1, 1, 1] and int(codes.count_nonzero()) == 3
        del z
        assert int((ops.fsq_decode(indices, levels, dim=0, dtype=BF16) != codes).sum()) == 0
        del codes, indices
