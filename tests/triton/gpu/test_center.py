"""Centred Gram matrices on a GPU, against the reference in float64; there are no CUDA kernels."""

from __future__ import annotations

import pytest
import torch

from pyflow import ops, testing

from .common import DEVICE, DTYPES, assert_near, draw, moved, run, sized

F64 = torch.float64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", sized([(1, 1), (63, 63), (600, 600), (2, 3, 40, 40), (0, 7, 7)]), ids=str)
def test_center_gram(gpu, shape, dtype):
    gram = (draw(shape, F64) + 3).to(dtype)
    h = torch.eye(shape[-1], dtype=F64) - 1 / shape[-1]
    for layout in ("contiguous", "stepped", "transposed") if shape == (63, 63) else ("contiguous",):
        given = testing.laid_out(gram, layout)
        want = h @ given.double() @ h
        got = ops.center_gram(testing.laid_out(moved(gram), layout))
        assert got.dtype == dtype and got.is_contiguous()
        error = 40 * testing.UNIT[testing.compute_dtype(dtype)]
        testing.assert_within(got.cpu(), want, error * (gram.double().abs().max() if gram.numel() else 0.0))
        copy = testing.laid_out(moved(gram), layout)
        assert ops.center_gram(copy, inplace=True) is copy
        testing.assert_same_bits(copy, got)


def test_center_gram_of_a_gradient_and_a_batch(gpu):
    gram = draw((3, 40, 40))
    (got, grad), want = (
        run(gpu, DEVICE, ops.center_gram, [gram]),
        run("reference", "cpu", ops.center_gram, [gram.double()]),
    )
    for a, b in zip((got, grad), want, strict=True):
        assert_near(a, b, 1e-5)
    if gpu == "triton":
        whole, alone = ops.center_gram(moved(gram)), ops.center_gram(moved(gram[1:2]))
        testing.assert_same_bits(whole[1:2], alone)
        testing.assert_same_bits(whole, ops.center_gram(moved(gram)))
