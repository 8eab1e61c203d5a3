"""Finite scalar quantisation under the interpreter."""

from __future__ import annotations

import math

import pytest
import torch

import pyflow
from pyflow import _backend, ops, testing
from pyflow._operators import OPERATORS
from pyflow._schemas import FSQ_VARIANTS
from pyflow.triton_kernels import fsq

from .common import DTYPES, both_backends, draw, equal

QUANTIZERS = [
    ((8, 5, 5, 5), (300, 4), -1), ((7, 5, 5, 5, 5), (2, 63, 5), 2), ((8, 8, 8, 5, 5, 5), (3, 6, 7, 11), 1),
    ((3,), (1, 97), 0), ((12, 1001), (2, 130), 0), ((4, 6, 9), (3,), 0), ((5,) * 8, (2, 8, 40), 1),
    ((3,) * 39, (9, 39), 1), ((5, 3, 4), (0, 3), 1),
]  # fmt: skip


def with_nan(z):
    """z with some elements set to NaN or infinity."""
    z = z.clone(memory_format=torch.contiguous_format)
    for i, value in enumerate((math.nan, math.inf, -math.inf, -0.0)):
        z.view(-1)[i * 5 :: 31] = value
    return z


def quantize(levels, dim, variant):
    def function(z):
        codes, indices = ops.fsq(z, levels, variant=variant, dim=dim)
        alone, _ = ops.fsq(z, levels, variant=variant, dim=dim, return_indices=False)
        decoded = ops.fsq_decode(indices, levels, variant=variant, dim=dim, dtype=z.dtype)
        return codes, indices, alone, decoded

    return function


@pytest.mark.parametrize("variant", FSQ_VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fsq(variant, dtype):
    for levels, shape, dim in QUANTIZERS:
        for z in (draw(shape, dtype, spread=1.5), with_nan(draw(shape, dtype, seed=1))):
            got = both_backends(quantize(levels, dim, variant), z)
            testing.assert_same_bits(got["output 2"], got["output 0"])
            unknown = z.isnan().any(dim, keepdim=True)
            testing.assert_same_bits(got["output 3"], torch.where(unknown, math.nan, got["output 0"]))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("levels", [(8, 5, 4, 3), (7, 5, 6)])
def test_fsq_layouts(layout, dim, levels):
    shape = [4, 6, 5, 8]
    shape[dim] = len(levels)
    z = testing.laid_out(draw(shape), layout)
    both_backends(quantize(levels, dim, "vqp"), z)
    residual = lambda v: ops.residual_fsq(v, levels, 2, dim=dim)
    both_backends(residual, z.clamp(-1, 1) if layout == "contiguous" else z)
    wide = torch.cat((z, z), dim).narrow(dim, 1, len(levels))
    both_backends(quantize(levels, dim, "symmetric"), wide)


@pytest.mark.parametrize("variant", FSQ_VARIANTS)
def test_fsq_extreme_values(variant):
    bits = torch.arange(-(2**31), 2**31, 2**21 + 1, dtype=torch.int64).to(torch.int32)
    both_backends(quantize((8, 6, 5, 1000), 0, variant), bits.view(torch.float32)[: bits.numel() // 4 * 4].view(4, -1))


def test_fsq_indices_beyond_int32():
    for levels in [(2**22, 2**22, 2**19), (8,) * 21, (5, 1000, 1000, 999, 1001, 17), (4, 2**20, 3, 7), (2,) * 31]:
        z = draw((70, len(levels)), spread=4)
        got = both_backends(quantize(levels, -1, "symmetric"), z)
        assert got["output 1"].dtype == (torch.int64 if math.prod(levels) > 2**31 else torch.int32)
        top = torch.full((3, len(levels)), 50.0)
        assert ops.fsq(top, levels, variant="symmetric")[1].tolist() == [math.prod(levels) - 1] * 3


def test_fsq_many_channels_and_many_tiles(monkeypatch):
    for levels in ((3,) * 40 + (5,) * 39, (6,) * 100):
        for z in (draw((20, len(levels))), draw((len(levels), 20)).t()):
            function = lambda v: ops.fsq(v, levels, return_indices=False)[:1]
            both_backends(function, z)
    monkeypatch.setattr(fsq, "MANY_TILES", 3)
    tile = fsq._tile
    for wide in (False, True):
        # 64-bit indices, as for 2**31 or more elements
        monkeypatch.setattr(fsq, "_tile", lambda *args: tile(*args)._replace(wide=wide))
        for shape, dim in (((1701, 5), -1), ((3, 5, 1000), 1)):
            both_backends(quantize((7, 5, 5, 5, 5), dim, "vqp"), draw(shape))
            both_backends(lambda z: ops.residual_fsq(z, (7, 5, 5, 5, 5), 2, dim=dim), draw(shape))


def test_fsq_expanded_gradients():
    z = draw((3, 10, 4)).requires_grad_()
    for pick in (lambda c: c.sum(), lambda c: c.transpose(0, 1)[::2].sum(), lambda c: (c * c[:1].detach()).sum()):
        results = []
        for backend in ("triton", "cpu" if _backend.cpu_missing is None else "reference"):
            with pyflow.backend(backend):
                results.append(torch.autograd.grad(pick(ops.fsq(z, (8, 5, 5, 5))[0]), z)[0])
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("variant", FSQ_VARIANTS)
def test_fsq_decode(variant):
    levels = (3, 4, 5, 7)
    indices = torch.arange(-1, 420)
    for dtype in DTYPES:
        for kind, dim in ((torch.int64, 0), (torch.int32, 1), (torch.int64, -1)):
            for given in (indices.to(kind), indices.to(kind)[:420].view(20, 21).t(), indices.to(kind)[5]):
                if -given.dim() - 1 <= dim <= given.dim():
                    call = lambda: ops.fsq_decode(given, levels, variant=variant, dim=dim, dtype=dtype)
                    with pyflow.backend("reference"):
                        want = call()
                    equal(call(), want.contiguous(), f"{dtype} {kind} {dim}")
    # on a GPU the values are not checked: an invalid index decodes to NaN
    number = FSQ_VARIANTS.index(variant)
    for wild in (torch.tensor([-(2**63), -2, 420, 2**31 + 5, 2**63 - 1]), torch.tensor([420, -7]).int()):
        decode = OPERATORS["fsq_decode"].triton_kernel
        assert decode(wild, levels, number, 1, torch.float32).isnan().all()


@pytest.mark.parametrize("variant", ["symmetric", "symmetric_hard"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fsq_residual(variant, dtype):
    for levels, shape, dim in QUANTIZERS:
        z = draw(shape, dtype)
        for active in (None, 0, 2, 5):
            given = None if active is None else torch.tensor(active)
            function = lambda v: ops.residual_fsq(v, levels, 3, variant=variant, dim=dim, active=given)
            got = both_backends(function, with_nan(z) if active == 2 else z)
            if active is not None:
                assert (got["output 1"][..., active:] == -1).all()
    # the scale of the later stages is denormal, then 0
    z = draw((17, 2), dtype)
    both_backends(lambda v: ops.residual_fsq(v, (1000, 4096), 16, variant=variant), z)
