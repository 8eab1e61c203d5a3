"""Spectral normalisation on a GPU: the reference within rounding, the same bits in every run and graph replay."""

from __future__ import annotations

import pytest
import torch

import pyflow
from pyflow import ops, testing

from .common import DEVICE, DTYPES, check_compiled, check_graph, draw, moved, sized

SHAPES = sized([(33, 70), (64, 3, 7, 7), (17,), (1, 1), (1, 1000), (1000, 1), (512, 4608)])


def inputs(dtype=torch.float32, shapes=None):
    shapes = shapes or (SHAPES if dtype == torch.float32 else SHAPES[:3])
    weights = [draw(shape, dtype, i) for i, shape in enumerate(shapes)]
    u = [None if w.dim() == 1 else draw(w.shape[:1], dtype, 20) / len(w) ** 0.5 for w in weights]
    v = [None if w.dim() == 1 else draw((w[0].numel(),), dtype, 21) / w[0].numel() ** 0.5 for w in weights]
    return weights, u, v


def results(device, weights, u, v, n_iter):
    leaves = [w.detach().requires_grad_() for w in moved(weights, device)]
    scaled, u, v, sigmas = ops.spectral_normalize(leaves, moved(u, device), moved(v, device), n_iter=n_iter)
    ends = [*scaled, *sigmas]
    grads = torch.autograd.grad(ends, leaves, [draw(o.shape, o.dtype, 9).to(device) for o in ends])
    return [x.detach().cpu() for x in (*ends, *u, *v, *grads) if x is not None]


@pytest.mark.parametrize("n_iter", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference_and_is_the_same_in_every_run(gpu, dtype, n_iter):
    got, again = (results(DEVICE, *inputs(dtype), n_iter) for _ in range(2))
    wide = [[None if x is None else x.double() for x in values] for values in inputs(dtype)]
    with pyflow.backend("reference"):
        want = results("cpu", *wide, n_iter)
    bound = (2000 if n_iter == 0 else 200) * testing.UNIT[dtype]
    for i, (a, b, c) in enumerate(zip(got, again, want, strict=True)):
        testing.assert_same_bits(a, b, f"output {i}")
        testing.assert_within(a, c, bound * (1 + c.abs().max()), f"output {i}")


def test_a_weight_does_not_depend_on_the_others(gpu):
    weights, u, v = moved(inputs())
    together = ops.spectral_normalize(weights, u, v)[0]
    for i, weight in enumerate(together):
        testing.assert_same_bits(weight, ops.spectral_normalize(weights[i : i + 1], u[i : i + 1], v[i : i + 1])[0][0])


def test_transposed_weights(gpu):
    weights, u, v = moved(inputs(shapes=[(70, 33), (6, 4, 3)]))
    turned = [w.transpose(0, 1).contiguous().transpose(0, 1) for w in weights]
    for a, b in zip(ops.spectral_normalize(turned, u, v)[0], ops.spectral_normalize(weights, u, v)[0], strict=True):
        assert a.stride() != b.stride()
        testing.assert_within(a, b, 1e-5)


def test_zero_and_nan(gpu):
    zero = torch.zeros(4, 3, device=DEVICE)
    ones = [torch.ones(n, device=DEVICE) for n in (4, 3)]
    weights, u, v, sigmas = ops.spectral_normalize([zero, zero + torch.nan], ones[:1] * 2, ones[1:] * 2)
    assert torch.equal(weights[0], zero) and torch.equal(u[0], ones[0]) and torch.equal(v[0], ones[1])
    assert sigmas[0].item() == pytest.approx(1e-12) and weights[1].isnan().all() and sigmas[1].isnan()


def test_works_in_a_cuda_graph_and_never_waits(gpu):
    weights, u, v = moved(inputs())
    leaves = [w.requires_grad_() for w in weights]

    def step():
        scaled, new_u, _, sigmas = ops.spectral_normalize(leaves, u, v)
        grads = torch.autograd.grad(sum(s.square().sum() for s in (*scaled, *sigmas)), leaves)
        return *(s.detach() for s in scaled), *(a for a in new_u if a is not None), *grads

    check_graph(step, lambda: [w.data.mul_(0.5).add_(0.1) for w in weights])


def test_compiles_without_graph_breaks(kernels):
    weights, u, v = inputs(shapes=[(33, 70), (17,)])
    u, v = moved(u), moved(v)
    check_compiled(lambda *w: tuple(ops.spectral_normalize(list(w), u, v)[0]), weights)


def test_unwritten_memory_is_never_read(gpu):
    with testing.poisoned():
        assert not any(x.isnan().any() for x in results(DEVICE, *inputs(), 1))
