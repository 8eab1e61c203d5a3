"""Rational-quadratic splines against their reference, bit by bit and under every transform."""

from __future__ import annotations

import pytest
import torch

import pyflow
from pyflow import ops
from pyflow._schemas import SPLINE_VARIANTS

COUNTS = {"linear": -1, "circular": 0, None: 1, "mixed": 1}


def tails_of(tails, features):
    return ["linear", "circular"] * (features // 2) + ["linear"] * (features % 2) if tails == "mixed" else tails


def inputs(shape, bins, tails="linear", dtype=torch.float32, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(s, generator=generator, dtype=torch.float64)
    x = torch.rand(shape, generator=generator, dtype=torch.float64) if tails is None else draw(*shape)
    return x.to(dtype), (spread * draw(*shape, 3 * bins + COUNTS[tails])).to(dtype)


@pytest.mark.parametrize("variant", SPLINE_VARIANTS)
@pytest.mark.parametrize("tails", COUNTS)
def test_the_inverse_undoes_the_forward(variant, tails):
    x, params = inputs((5, 6), 8, tails, torch.float64)
    options = dict(bins=8, tails=tails_of(tails, 6), variant=variant)
    y, logdet = ops.rq_spline(x, params, **options)
    back, undone = ops.rq_spline(y, params, inverse=True, **options)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(undone, -logdet)
    each = ops.rq_spline(x, params, event_dims=0, **options)[1]
    torch.testing.assert_close(each.sum(1), logdet)


# bad input


X, P = torch.full((2, 4), 0.5), torch.zeros(2, 4, 11)
BAD = [
    (lambda f: f("x", P, bins=4), TypeError, "x must be a tensor, got str"),
    (lambda f: f(X.int(), P, bins=4), TypeError, "x must be float32, float64, bfloat16 or float16, got int32"),
    (lambda f: f(X, None, bins=4), TypeError, "params must be a tensor, got NoneType"),
    (lambda f: f(X, P.to("meta"), bins=4), ValueError, "params must be on the device of x with 3 bins - 1 numbers per element, cpu, got meta"),
    (lambda f: f(X, P, bins=4.0), TypeError, "bins must be an integer, got float"),
    (lambda f: f(X, P, bins=1), ValueError, "bins must be at least 2, got 1"),
    (lambda f: f(X, P, bins=5), ValueError, r"params must have the shape of x with 3 bins - 1 numbers per element, \(2, 4, 14\), got \(2, 4, 11\)"),
    (lambda f: f(X, P, bins=4, tails="circular"), ValueError, r"params must have the shape of x with 3 bins numbers per element, \(2, 4, 12\), got \(2, 4, 11\)"),
    (lambda f: f(X, P, bins=4, tails=None), ValueError, r"params must have the shape of x with 3 bins \+ 1 numbers per element, \(2, 4, 13\), got \(2, 4, 11\)"),
    (lambda f: f(X, P, bins=4, tails=["linear"] * 4), ValueError, r"params must have the shape of x with 3 bins \+ 1 numbers per element, \(2, 4, 13\), got \(2, 4, 11\)"),
    (lambda f: f(X, P, bins=4, tails=["linear"] * 3), ValueError, "tails must name one per feature of x, 4, got 3"),
    (lambda f: f(X, P, bins=4, tails=["linear"] * 3 + ["none"]), ValueError, "tails must be one of linear, circular, got 'none'"),
    (lambda f: f(X, P, bins=4, tails="none"), ValueError, "tails must be one of linear, circular, got 'none'"),
    (lambda f: f(X, P, bins=4, tails=3), TypeError, "tails must be a name, a list of names or None, got int"),
    (lambda f: f(X, P, bins=4, variant="rq"), ValueError, "variant must be one of nflows, normflows, zuko, got 'rq'"),
    (lambda f: f(X, P, bins=4, bound=0), ValueError, "bound must be positive and finite, got 0"),
    (lambda f: f(X, P, bins=4, bound=-1.0), ValueError, "bound must be positive and finite, got -1.0"),
    (lambda f: f(X, P, bins=4, bound="1"), TypeError, "bound must be a number, got str"),
    (lambda f: f(X, P, bins=4, bound=1e20), ValueError, r"bound must be from 9.09e-13 to 1.1e\+12 in float32, got 1e\+20"),
    (lambda f: f(X, P, bins=4, bound=torch.ones(3)), ValueError, r"bound must have the shape of the last dim of x, \(4,\), got \(3,\)"),
    (lambda f: f(X, P, bins=4, bound=torch.tensor(1.0)), ValueError, r"bound must have the shape of the last dim of x, \(4,\), got \(\)"),
    (lambda f: f(X, P, bins=4, bound=torch.arange(4.0)), ValueError, "bound must be positive and finite, got other values"),
    (lambda f: f(X, P, bins=4, bound=torch.ones(4).requires_grad_()), ValueError, "bound must not require a gradient, which is not computed"),
    (lambda f: f(X, P, bins=4, param_scale=0), ValueError, "param_scale must be positive and finite, got 0"),
    (lambda f: f(X, P, bins=4, param_scale=1e-40), ValueError, r"param_scale must be from 7.89e-31 to 1.27e\+30 in float32, got 1e-40"),
    (lambda f: f(X, P, bins=4, min_bin=0.25), ValueError, "min_bin must be at least 0 and less than 1 / bins, 0.25, got 0.25"),
    (lambda f: f(X, P, bins=4, min_bin=-0.1), ValueError, "min_bin must be at least 0 and less than 1 / bins, 0.25, got -0.1"),
    (lambda f: f(X, P, bins=4, min_slope=-1e-3), ValueError, "min_slope must be at least 0 and finite, got -0.001"),
    (lambda f: f(X, P, bins=4, min_slope=1e40), ValueError, r"min_slope must be at most 1.27e\+30 in float32, got 1e\+40"),
    (lambda f: f(X, P, bins=4, min_slope=0.0, variant="zuko"), ValueError, r"min_slope must be in \(0, 1\) for zuko, got 0.0"),
    (lambda f: f(X, P, bins=4, min_slope=1, variant="zuko"), ValueError, r"min_slope must be in \(0, 1\) for zuko, got 1.0"),
    (lambda f: f(X, P, bins=4, mask=torch.zeros(3, dtype=torch.bool)), ValueError, r"mask must broadcast to the shape of x, \(2, 4\), got \(3,\)"),
    (lambda f: f(X, P, bins=4, event_dims=3), ValueError, r"event_dims must be in \[0, 2\], got 3"),
    (lambda f: f(X[0, 0], P[0, 0], bins=4), ValueError, "x must have at least one dim, the batch, got a scalar"),
    (lambda f: f(X, P, bins=4, inverse="no"), TypeError, "inverse must be true or false, got str"),
    (lambda f: f(X + 1, torch.zeros(2, 4, 13), bins=4, tails=None), ValueError, r"x must lie in \[0, 1\] without tails, got 1.5"),
    (lambda f: f(-X, torch.zeros(2, 4, 13), bins=4, tails=None), ValueError, r"x must lie in \[0, 1\] without tails, got -0.5"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("call, error, text", BAD)
def test_bad_input_gets_one_sentence(call, error, text, backend):
    with pyflow.backend(backend), pytest.raises(error, match=f"^rq_spline: {text}$"):
        call(ops.rq_spline)
