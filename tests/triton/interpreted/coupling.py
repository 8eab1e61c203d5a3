"""Coupling layers under the interpreter."""

from __future__ import annotations

import math

import pytest
import torch

import pyflow
from pyflow import _backend, ops, testing
from pyflow._schemas import PACKINGS, SCALE_MAPS
from pyflow.ops.coupling import scale_map_constant
from pyflow.reference import coupling as ref
from pyflow.triton_kernels import _launch

from .common import DTYPES, compare, draw, run

FORMS = [(inverse, first) for inverse in (False, True) for first in (False, True)]
MAPS = [(name, {}) for name in SCALE_MAPS] + [("sigmoid", {"eps": 1e-3}), ("softplus", {"eps": 1e-2})]
PAIRS = [(d, d) for d in DTYPES] + [
    (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float64, torch.float16),
    (torch.float16, torch.float64),
]  # fmt: skip


def additive(x, shift, mask=None, inverse=False):
    """Call the operator: the public function computes the case without a mask in torch."""
    return torch.ops.pyflow.additive_coupling(x, shift, mask, inverse)


@pytest.mark.parametrize("inverse, first", FORMS)
@pytest.mark.parametrize("scale_map, options", MAPS)
def test_affine_maps_and_forms(scale_map, options, inverse, first):
    def function(x, shift, scale):
        return ops.affine_coupling(
            x, shift, scale, scale_map=scale_map, inverse=inverse, shift_first=first, **options
        )  # fmt: skip

    compare(function, [draw((5, 37)), draw((5, 37), seed=1), draw((5, 37), seed=2, spread=1.5)], sums=(1,))


@pytest.mark.parametrize("scale_map, options", MAPS)
def test_extreme_values(scale_map, options):
    values = [0.0, -0.0, 1e-40, -1e-30, 0.5499999, 0.55, 1.0, -15.0, -15.000001, 20.0, 88.0, -88.0, 103.9, -120.0, 3e38]
    scale = torch.tensor([[*values, math.inf, -math.inf, math.nan]])
    x, shift = torch.ones_like(scale), -torch.ones_like(scale)
    for inverse, first in FORMS:
        keywords = dict(scale_map=scale_map, inverse=inverse, shift_first=first, event_dims=0, **options)
        function = lambda x, t, s: ops.affine_coupling(x, t, s, **keywords)
        got = run("triton", function, (x, shift, scale))
        if _backend.cpu_missing is None:
            for a, b in zip(got, run("cpu", function, (x, shift, scale)), strict=True):
                testing.assert_same_bits(a + 0, b + 0)  # a zero logdet may have either sign


# every form with two pairs of dtypes
@pytest.mark.parametrize("x_dtype, dtype, inverse, first", [(*d, *FORMS[i % 4]) for i, d in enumerate(PAIRS)])
def test_dtypes(x_dtype, dtype, inverse, first):
    leaves = [draw((3, 45), x_dtype), draw((3, 45), dtype, 1), draw((3, 45), dtype, 2)]
    mask = draw((3, 45), seed=3) > 0.5
    for keywords in ({}, {"mask": mask}):
        for scale_map in SCALE_MAPS:
            keywords |= dict(scale_map=scale_map, inverse=inverse, shift_first=first)
            compare(lambda x, t, s: ops.affine_coupling(x, t, s, **keywords), leaves, sums=(1,))
        compare(lambda x, t: additive(x, t, keywords.get("mask"), inverse), leaves[:2])


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("inverse, first", FORMS)
def test_packings(packing, dim, inverse, first):
    shape = (2, 3, 4, 6)
    packed = tuple(n * (1 + (d == dim)) for d, n in enumerate(shape))
    keywords = dict(packing=packing, dim=dim, scale_map="tanh", inverse=inverse, shift_first=first)
    function = lambda x, p: ops.affine_coupling_packed(x, p, **keywords)
    compare(function, [draw(shape), draw(packed, seed=1)], sums=(1,))
    mask = draw(shape[1:], seed=2) > 0
    compare(lambda x, p: function_with(mask, x, p, keywords), [draw(shape), draw(packed, seed=1)], sums=(1,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64])
def test_interleaved_pairs_and_strides_have_the_same_bits(x_dtype, dtype):
    shape = (3, 4, 6)
    x, params = draw(shape, x_dtype), draw((3, 4, 12), dtype, 1)
    function = lambda x, p, dim=2: ops.affine_coupling_packed(x, p, packing="interleaved", dim=dim, scale_map="tanh")
    want = compare(function, [x, params], sums=(1,))
    shifted = torch.zeros(3, 4, 13, dtype=dtype)[..., 1:].copy_(params)
    spread = torch.zeros(3, 4, 14, dtype=dtype)[..., 1:-1].copy_(params)
    turned = params.transpose(0, 1).contiguous().transpose(0, 1)
    for other in (shifted, spread, turned, torch.zeros(3, 4, 14, dtype=dtype)[..., :-2].copy_(params)):
        for a, b in zip(compare(function, [x, other], sums=(1,)), want, strict=True):
            testing.assert_same_bits(a, b)
    # pairs that neighbour along a dim other than the last
    last = lambda v: v.movedim(1, -1).contiguous().movedim(-1, 1)
    images = compare(lambda x, p: function(x, p, 1), [last(x.movedim(2, 1)), last(params.movedim(2, 1))], sums=(1,))
    testing.assert_same_bits(images[0].movedim(1, 2), want[0])


def function_with(mask, x, params, keywords):
    return ops.affine_coupling_packed(x, params, mask=mask, **keywords)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (3, 2, 4, 8)])
@pytest.mark.parametrize("event_dims", [0, 1, 3, 4])
def test_layouts(layout, shape, event_dims):
    x, shift, scale = draw(shape), draw(shape, seed=1), draw(shape, seed=2)
    function = lambda x, t, s: ops.affine_coupling(x, t, s, scale_map="tanh", event_dims=event_dims)
    plain = run("triton", function, (x, shift, scale))
    viewed = compare(function, [testing.laid_out(x, layout), shift, testing.laid_out(scale, layout)], sums=(1,))
    for a, b in zip(plain, viewed, strict=True):
        # event dims are summed in memory order; everything else has the same bits
        if layout in ("transposed", "channels_last") and a.dim() != len(shape):
            torch.testing.assert_close(a, b)
        else:
            testing.assert_same_bits(a, b)
    checkerboard = torch.zeros(2 * shape[0], *shape[1:-1], 2 * shape[-1])[::2, ..., 1::2]
    compare(function, [checkerboard.copy_(x), shift, scale], sums=(1,))


def test_masks_broadcast():
    x, shift, scale = draw((4, 3, 8)), draw((4, 3, 8), seed=1), draw((4, 3, 8), seed=2)
    for shape in [(8,), (3, 1), (4, 1, 1), (4, 3, 8), ()]:
        mask = draw(shape, seed=3) > -0.2
        mask[(0,) * len(shape)] = True
        function = lambda x, t, s: ops.affine_coupling(x, t, s, mask=mask)
        clean = compare(function, [x, shift, scale], sums=(1,))
        hidden = torch.where(mask, math.nan, 0)
        for a, b in zip(run("triton", function, (x, shift + hidden, scale + hidden)), clean, strict=True):
            testing.assert_same_bits(a, b)


@pytest.mark.parametrize(
    "shape", [(0, 4), (4, 0), (1, 1), (9,), (2, 1), (65, 3), (1, 513), (3, 1000), (2, 9001), (1, 20011)]
)
def test_sizes(shape):
    leaves = [draw(shape, seed=i) for i in range(3)]
    compare(lambda x, t, s: ops.affine_coupling(x, t, s, scale_map="atan"), leaves, sums=(1,), error=2e-4)
    compare(lambda x, t: additive(x, t), leaves[:2])


def test_missing_and_expanded_gradients():
    leaves = [draw((3, 10), seed=i).requires_grad_() for i in range(3)]
    for pick in (lambda y, g: y.sum(), lambda y, g: g.sum(), lambda y, g: y.t()[::2].sum() + g[0]):
        results = []
        for backend in ("triton", "reference"):
            with pyflow.backend(backend):
                grads = torch.autograd.grad(pick(*ops.affine_coupling(*leaves)), leaves, allow_unused=True)
                results.append([torch.zeros_like(v) if g is None else g for g, v in zip(grads, leaves, strict=True)])
        torch.testing.assert_close(*results)


def test_rows_do_not_depend_on_the_batch():
    for cols in (3, 37, 392, 3000, 9001):
        x, shift, scale = (draw((7, cols), seed=i) for i in range(3))
        whole = ops.affine_coupling(x, shift, scale)
        for rows in (slice(0, 1), slice(2, 5)):
            for a, b in zip(whole, ops.affine_coupling(x[rows], shift[rows], scale[rows]), strict=True):
                testing.assert_same_bits(a[rows], b)
        head = ops.flow_log_prob(x)
        testing.assert_same_bits(head[2:5], ops.flow_log_prob(x[2:5]))


def test_rows_do_not_depend_on_the_size_of_tiles():
    sizes, whole = set(), []
    for rows in (8200, 600, 5):
        x, shift, scale = (draw((8200, 3), seed=i)[:rows] for i in range(3))
        sizes.add(_launch.collapse(1, [x]).spread.rows)
        results = [*ops.affine_coupling(x, shift, scale), ops.additive_coupling(x, shift, mask=x > 0)]
        whole = whole or results
        for a, b in zip(whole, results, strict=True):
            testing.assert_same_bits(a[:rows], b)
    assert sizes == {256, 32}


def test_float64_is_accurate():
    s = torch.cat((torch.linspace(-40, 40, 2001), 10.0 ** torch.linspace(-30, -1, 400)), 0).double()
    zero = torch.zeros_like(s)
    softplus = lambda v: torch.clamp(v, min=0) + torch.log1p(torch.exp(-v.abs()))
    expected = {
        "exp": s, "sigmoid": -softplus(-(s + 2)), "sigmoid_inv": softplus(-(s + 2)), "tanh": 2 * torch.tanh(s / 2),
        "atan": 2 * 0.636 * torch.atan(s), "softsign": s / (1 + s.abs() / -math.log(1e-3)),
        "softplus_clamp": torch.log(torch.clamp(softplus(s) + 1e-3, max=3)),
        "softplus": torch.where(s < -15, s - 0.5 * torch.exp(s), torch.log(softplus(s))),
    }  # fmt: skip
    for scale_map in SCALE_MAPS:
        constant = scale_map_constant("coupling", scale_map, 2.0, 0.0, 1e-3)[1]
        g = expected[scale_map] if scale_map in expected else ref.log_scale(s, scale_map, constant)
        _, got = ops.affine_coupling(zero, zero, s, scale_map=scale_map, event_dims=0)
        torch.testing.assert_close(got, g, rtol=4e-15, atol=4e-16 if "softplus" in scale_map else 0, msg=scale_map)
    densities = {"gaussian": -0.5 * s * s - 0.5 * math.log(2 * math.pi), "logistic": -softplus(s) - softplus(-s)}
    for prior, density in densities.items():
        torch.testing.assert_close(ops.flow_log_prob(s[:, None], prior=prior), density, rtol=4e-15, atol=4e-15)
