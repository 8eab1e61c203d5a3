"""Sums over Gram matrices under the interpreter."""

from __future__ import annotations

import pytest
import torch

from pyflow import ops, testing
from pyflow._schemas import HSIC_KERNELS
from pyflow.reference import hsic as reference
from pyflow.triton_kernels import _gram

from .common import compare, draw

F32, F64 = torch.float32, torch.float64
DISTANCES = ("rbf", "laplacian")


def variables(kernels, n, dims, dtype, seed=0):
    """Arguments of the operator: labels with two values, symmetric matrices."""
    parts = []
    for index, (kernel, dim) in enumerate(zip(kernels, dims, strict=True)):
        part = draw((2, n, n if kernel == "precomputed" else dim), dtype, seed + index)
        if kernel == "delta":
            part = part.round().clamp(0, 1)
        parts.append(part + part.mT if kernel == "precomputed" else part)
    numbers = [HSIC_KERNELS.index(kernel) for kernel in kernels]
    scale = torch.tensor([[1.0, 0.1], [0.1, 2.0]], dtype=dtype)[:, : len(dims)]
    return parts, scale, numbers


def sums(z, scale, numbers, degrees, pairs, part=0, parts=1):
    return torch.ops.pyflow.hsic_sums(z, scale, numbers, degrees, pairs, False, part, parts)


def exact(z, scale, numbers, degrees, pairs):
    """Return row sums, sums of products and gradients of z from the float64 reference."""
    z = [part.detach().double().requires_grad_() for part in z]
    outputs = reference.hsic_sums(z, scale.double(), numbers, degrees, pairs)[:2]
    return *outputs, *torch.autograd.grad(outputs, z, cotangents(*outputs), materialize_grads=True)


def cotangents(rows, cross):
    return draw(rows.shape, F64, 5), draw(cross.shape, F64, 6)


def made(z, *arguments):
    z = [part.detach().requires_grad_() for part in z]
    outputs = sums(z, *arguments)[:2]
    return *outputs, *torch.autograd.grad(outputs, z, cotangents(*outputs))


def close(got, want, dtype):
    for a, b in zip(got, want, strict=True):
        testing.assert_within(a, b.detach(), (2e-5 if dtype == F32 else 1e-12) * (b.abs().amax() if b.numel() else 0.0))


@pytest.mark.parametrize("kernel", HSIC_KERNELS)
@pytest.mark.parametrize("dtype, n, dim", [(F32, 1, 3), (F32, 70, 10), (F64, 33, 3)])
def test_hsic_sums(kernel, n, dim, dtype):
    z, scale, numbers = variables((kernel, "rbf"), n, (dim, 20), dtype)
    arguments = (scale, numbers, [2, 1], [0, 1, 0, 0])
    close(made(z, *arguments), exact(z, *arguments), dtype)
    whole, parts = sums(z, *arguments), [sums(z, *arguments, part, 2) for part in range(2)]
    for i in range(2):
        torch.testing.assert_close(parts[0][i] + parts[1][i], whole[i], rtol=1e-12, atol=1e-12)


def test_hsic_of_a_variable_in_no_pair():
    z, scale, numbers = variables(DISTANCES, 40, (3, 4), F32)
    arguments = (scale, numbers, [1, 1], [0, 0])
    close(made(z, *arguments), exact(z, *arguments), F32)


@pytest.mark.parametrize("kernels", [("rbf", "rbf"), ("rbf", "polynomial")])
def test_hsic_gradients_of_a_single_pair(kernels):
    z, scale, numbers = variables(kernels, 70, (10, 70), F32)
    for pairs in ([0, 1], [1, 0]):
        close(made(z, scale, numbers, [1, 2], pairs), exact(z, scale, numbers, [1, 2], pairs), F32)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("pairs", [[0, 1], [0, 1, 0, 0, 2, 1], [0, 1, 2, 2] * 5], ids=len)
def test_hsic_terms(pairs, unbiased):
    variables, count = max(pairs) + 1, len(pairs) // 2
    rows, cross, shift = (
        draw((2, *rest), F64, i) for i, rest in enumerate([(variables, 1300), (count,), (variables,)])
    )
    for diagonals in (draw((2, variables, 1300), F64, 4), draw((2, variables, 1), F64, 4).expand(rows.shape)):
        results = []
        for function in (torch.ops.pyflow.hsic_terms, reference.hsic_terms):
            leaves = [v.detach().requires_grad_() for v in (rows, cross, diagonals)]
            outputs = function(*leaves[:2], shift, leaves[2], pairs, unbiased)
            grads = [
                torch.autograd.grad(outputs[i].sum(), leaves, retain_graph=True, materialize_grads=True) for i in (0, 1)
            ]
            results.append([*outputs, *grads[0], *grads[1]])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-10)


def test_hsic_matches_the_cpp_kernels():
    function = lambda x, y: ops.hsic(x, y, bandwidth=1.5, estimator="unbiased")
    compare(function, [draw((2, 50, 3)), draw((2, 50, 12), seed=1)], sums=(0, 1, 2))


def test_hsic_permuted():
    generator = torch.Generator().manual_seed(0)
    x, y = (draw((45, 45), seed=seed) for seed in range(2))
    x, y = x + x.mT, y + y.mT
    permutations = torch.stack([torch.randperm(45, generator=generator) for _ in range(3)]).int()
    got = torch.ops.pyflow.hsic_permuted(x, y, permutations)
    want = reference.hsic_permuted(x.double(), y.double(), permutations)
    testing.assert_within(got, want, 1e-10 * want.abs().max())


def test_hsic_products_of_split_rows_are_accurate():
    """Tensor cores cut the low parts to 11 bits: an error of 2^-22 and the product of the low parts, 2^-22 of a b."""
    a, b = draw((500, 64), seed=1), draw((500, 64), seed=2)
    high, low = zip(*map(_gram.split, (a, b)), strict=True)
    for x, top, rest in zip((a, b), high, low, strict=True):
        testing.assert_same_bits(top + rest, x)
        assert not (top.view(torch.int32) & ~_gram.HIGH_BITS).any()
        assert (rest.abs() <= 2.0**-11 * x.abs()).all()
    cut = [(part.view(torch.int32) & _gram.HIGH_BITS).view(F32).double() for part in low]
    whole = high[0].double() @ high[1].double().mT
    got = whole + high[0].double() @ cut[1].mT + cut[0] @ high[1].double().mT
    error = got - a.double() @ b.double().mT
    assert (error.abs() <= 3 * 2.0**-22 * (a.abs().double() @ b.abs().double().mT)).all()
    # the high parts alone are TF32
    assert (whole - a.double() @ b.double().mT).abs().max() > 1000 * error.abs().max()
    # low parts have both signs, so their products do not add up
    assert error.mean().abs() < 0.1 * error.std()
