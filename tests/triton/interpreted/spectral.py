"""Spectral normalisation under the interpreter."""

from __future__ import annotations

import pytest
import torch

import pyflow
from pyflow import ops, testing

from .common import DTYPES, draw

SHAPES = [(33, 70), (8, 3, 3, 3), (17,), (1, 1), (5, 300), (40, 1)]


def run(backend, weights, u, v, n_iter):
    leaves = [w.detach().requires_grad_() for w in weights]
    with pyflow.backend(backend):
        scaled, u, v, sigmas = ops.spectral_normalize(leaves, u, v, n_iter=n_iter)
        cotangents = [draw(o.shape, o.dtype, seed=9) for o in (*scaled, *sigmas)]
        grads = torch.autograd.grad([*scaled, *sigmas], leaves, cotangents)
    return [x.detach() for x in (*scaled, *u, *v, *sigmas, *grads) if x is not None]


@pytest.mark.parametrize("n_iter", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_spectral_normalize(dtype, n_iter):
    weights = [draw(shape, dtype, seed=i) for i, shape in enumerate(SHAPES)]
    weights.append(draw((6, 4, 3), dtype, seed=8).transpose(0, 1))
    u = [None if w.dim() == 1 else draw(w.shape[:1], dtype, seed=3) / 4 for w in weights]
    v = [None if w.dim() == 1 else draw((w[0].numel(),), dtype, seed=4) / 4 for w in weights]
    wide = [[None if x is None else x.double() for x in values] for values in (weights, u, v)]
    got, want = run("triton", weights, u, v, n_iter), run("reference", *wide, n_iter)
    # returned u and v are rounded, and the gradient is computed from them
    u_of = max(testing.UNIT[dtype], testing.UNIT[testing.compute_dtype(dtype)])
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        size = 1 + b.abs().max()
        testing.assert_within(a, b, (200 if n_iter == 0 else 40) * u_of * size, f"output {i}")


def layers(shapes, dtype=torch.float32):
    weights = [draw(shape, dtype, seed=i) for i, shape in enumerate(shapes)]
    u = [None if w.dim() == 1 else draw(w.shape[:1], dtype, seed=3) / 4 for w in weights]
    v = [None if w.dim() == 1 else draw((w[0].numel(),), dtype, seed=4) / 4 for w in weights]
    return weights, u, v


def per_layer(weights, u, v, n_iter):
    """Outputs and gradient of every layer."""
    leaves = [w.detach().requires_grad_() for w in weights]
    with pyflow.backend("triton"):
        scaled, new_u, new_v, sigmas = ops.spectral_normalize(leaves, u, v, n_iter=n_iter)
        ends = [*scaled, *sigmas]
        grads = torch.autograd.grad(ends, leaves, [draw(o.shape, o.dtype, seed=9) for o in ends])
    results = zip(scaled, new_u, new_v, sigmas, grads, strict=True)
    return [[x.detach() for x in layer if x is not None] for layer in results]


@pytest.mark.parametrize("n_iter", [0, 2])
def test_a_layer_has_the_same_bits_alone_as_in_a_list(n_iter):
    weights, u, v = layers([(20, 35), (8, 3, 3, 3), (17,), (1, 1), (9, 600), (0,)])
    for dtype, shape in ((torch.bfloat16, (5, 30)), (torch.bfloat16, (40, 8)), (torch.float64, (3, 12))):
        for values, more in zip((weights, u, v), layers([shape], dtype), strict=True):
            values += more
    weights.append(draw((6, 4, 3), seed=8).transpose(0, 1))
    u.append(draw((4,), torch.bfloat16, seed=5))  # dtypes of u and v other than that of the weight
    v.append(draw((36,), torch.float64, seed=6)[::2])
    together = per_layer(weights, u, v, n_iter)
    for i, layer in enumerate(together):
        alone = per_layer(weights[i : i + 1], u[i : i + 1], v[i : i + 1], n_iter)[0]
        for a, b in zip(layer, alone, strict=True):
            assert a.dtype == b.dtype and a.stride() == b.stride()
            testing.assert_same_bits(a, b, f"layer {i}")


def test_unaligned_weights_have_the_bits_of_aligned_ones():
    weights, u, v = layers([(9, 600), (40, 8)])
    held = [torch.empty(w.numel() + 1)[1:].view(w.shape).copy_(w) for w in weights]
    assert all(w.data_ptr() % 16 and w.is_contiguous() for w in held)
    for a, b in zip(per_layer(weights, u, v, 1), per_layer(held, u, v, 1), strict=True):
        for x, y in zip(a, b, strict=True):
            testing.assert_same_bits(x, y)


def test_more_layers_than_one_table_launch_takes():
    weights, u, v = layers([(3 + i % 5, 4 + i % 7) for i in range(58)])
    got = per_layer(weights, u, v, 1)
    with pyflow.backend("reference"):
        wide = [[x.double() for x in values] for values in (weights, u, v)]
        want = ops.spectral_normalize(*wide)
    for i, layer in enumerate(got):
        for a, values in zip(layer, want, strict=False):
            testing.assert_within(a, values[i], 1e-5 * (1 + values[i].abs().max()), f"layer {i}")


def test_every_output_can_be_changed_in_place():
    weights, u, v = layers([(3, 4), (5,), (2, 2)])
    leaves = [w.requires_grad_() for w in weights]
    with pyflow.backend("triton"):
        scaled, new_u, new_v, sigmas = ops.spectral_normalize(leaves, u, v)
    for values in (scaled, sigmas, new_u, new_v):
        for i in range(len(values)):
            before = [None if x is None else x.clone() for x in values]
            if values[i] is not None:
                values[i].mul_(2)
                before[i] = before[i] * 2
            assert all(a is None or torch.equal(a, b) for a, b in zip(values, before, strict=True))


def test_an_empty_vector():
    with pyflow.backend("triton"):
        weights, _, _, sigmas = ops.spectral_normalize([torch.empty(0)], [None], [None])
    assert weights[0].shape == (0,) and sigmas[0].item() == pytest.approx(1e-12)


@pytest.mark.parametrize(("n_iter", "value", "left", "right"), [(3, -3e-7, 0.6, 5e-8), (1, -3e-14, 1e9, 5e3)])
def test_a_stalled_round_leaves_u_and_v_and_divides_by_their_product(n_iter, value, left, right):
    weights = [torch.full((700, 1), value), torch.ones(2, 2)]
    u, v = [torch.full((700,), left), torch.ones(2)], [torch.full((1,), right), torch.ones(2)]
    got = run("triton", weights, u, v, n_iter)
    want = run("reference", *[[x.double() for x in given] for given in (weights, u, v)], n_iter)
    assert float(want[6].abs()) > 2e-12
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_zero_and_nan():
    zero = torch.zeros(4, 3)
    weights, u, v, sigmas = run_plain([zero, torch.full((4, 3), torch.nan)])
    assert torch.equal(weights[0], zero) and torch.equal(u[0], torch.ones(4)) and torch.equal(v[0], torch.ones(3))
    assert sigmas[0].item() == pytest.approx(1e-12) and weights[1].isnan().all() and sigmas[1].isnan()


def run_plain(weights):
    with pyflow.backend("triton"):
        return ops.spectral_normalize(weights, [torch.ones(4)] * len(weights), [torch.ones(3)] * len(weights))
