"""Centred Gram matrices: definition, gradients, in place, error texts."""

from __future__ import annotations

import pytest
import torch

import pyflow
from pyflow import ops, testing

F32, F64 = torch.float32, torch.float64


def draw(shape, dtype=F32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (63, 63), (600, 600), (2, 3, 40, 40), (0, 7, 7)])
def test_center_gram(shape, dtype):
    gram = (draw(shape, F64) + 3).to(dtype)
    h = torch.eye(shape[-1], dtype=F64) - 1 / shape[-1]
    want = h @ gram.double() @ h
    for layout in ("contiguous", "stepped", "transposed") if len(shape) < 4 else ("contiguous",):
        given = testing.laid_out(gram, layout) if gram.numel() > 1 else gram
        expected = want if given is gram or torch.equal(given, gram) else h @ given.double() @ h
        got = ops.center_gram(given)
        assert got.dtype == dtype and got.is_contiguous()
        u = testing.UNIT[testing.compute_dtype(dtype)]
        testing.assert_within(got, expected, 40 * u * (gram.double().abs().max() if gram.numel() else 0.0))
        copy = given.clone()
        assert ops.center_gram(copy, inplace=True) is copy
        testing.assert_same_bits(copy, got)
    leaf = gram.double().requires_grad_()
    grad = draw(shape, F64, 1)
    testing.assert_within(torch.autograd.grad(ops.center_gram(leaf), leaf, grad)[0], h @ grad @ h, 1e-12)


def test_inplace_center_gram_increments_the_version():
    for backend in ("auto", "reference"):
        x = draw((4, 4)).requires_grad_()
        saved = x.exp()
        with pyflow.backend(backend):
            ops.center_gram(saved.detach(), inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.sum().backward()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_center_gram_in_place_rejects_overlapping_memory(backend):
    memory = torch.arange(25.0)
    shared = (
        memory[:5].expand(5, 5), memory[:5, None].expand(5, 5), memory[:9].unfold(0, 5, 1),
        memory.view(1, 5, 5).expand(2, 5, 5),
    )  # fmt: skip
    text = "^center_gram: inplace must not be used on a tensor whose elements share memory$"
    with pyflow.backend(backend):
        for gram in shared:
            with pytest.raises(ValueError, match=text):
                ops.center_gram(gram, inplace=True)
        assert memory.equal(torch.arange(25.0))
        for gram in (memory.view(5, 5).mT, memory[:20].view(4, 5)[:, :4], memory[:1].expand(1, 1)):
            want = ops.center_gram(gram)
            assert ops.center_gram(gram, inplace=True).equal(want)


def test_errors():
    with pytest.raises(ValueError, match=r"^center_gram: gram must be \(..., n, n\), got shape \(6, 2\)$"):
        ops.center_gram(torch.zeros(6, 2))
    with pytest.raises(
        ValueError, match=r"^center_gram: inplace must not be used on a tensor that requires a gradient$"
    ):
        ops.center_gram(torch.eye(3).requires_grad_(), inplace=True)
