"""Couplings on a GPU: the bits of the C++ kernels on every backend, in every run, batch and graph replay."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyflow import ops, testing
from pyflow._schemas import PACKINGS, SCALE_MAPS

from .common import (
    DEVICE,
    DTYPES,
    check_compiled,
    check_graph,
    compare,
    draw,
    every_magnitude,
    moved,
    needs_memory,
    run,
    sized,
)  # fmt: skip

F32, F64, BF16, F16 = DTYPES
FORMS = list(itertools.product((False, True), repeat=2))  # (inverse, shift_first)
MAPS = [(name, {}) for name in SCALE_MAPS] + [("sigmoid", {"eps": 1e-3}), ("softplus", {"eps": 1e-2})]
SHAPES = sized([(3, 1), (65, 3), (33, 37), (16, 392), (7, 1000), (5, 2049), (3, 9001), (2, 50001)])
# (dtype of x, dtype of the parameters)
PAIRS = [(d, d) for d in DTYPES[1:]] + [(F32, BF16), (BF16, F32), (F32, F16), (F16, F64), (F64, F32)]


def affine(**options):
    return lambda x, shift, scale: ops.affine_coupling(x, shift, scale, **options)


def leaves_of(shape, dtype=F32, param_dtype=None):
    return [draw(shape, d, i) for i, d in enumerate((dtype, param_dtype or dtype, param_dtype or dtype))]


@pytest.mark.parametrize("number", range(len(MAPS)), ids=lambda i: f"{MAPS[i][0]}{i}")
def test_maps_at_every_magnitude(gpu, number):
    # each map and form compiles a kernel: two of the four forms per map, all four over the maps
    forms = FORMS if gpu == "cuda" else (FORMS[number % 4], FORMS[3 - number % 4])
    (scale_map, options), scale = MAPS[number], every_magnitude()
    leaves = [draw(scale.shape), draw(scale.shape, seed=1), scale]
    leaves[2] = torch.cat((leaves[2], draw((2000,), seed=2, spread=3.0)))
    leaves[:2] = [torch.cat((v, v[:2000])) for v in leaves[:2]]
    for inverse, first in forms:
        function = affine(scale_map=scale_map, inverse=inverse, shift_first=first, event_dims=0, **options)
        # a zero may have either sign
        compare(gpu, lambda *v: tuple(o + 0 for o in function(*v)), leaves)


@pytest.mark.parametrize("inverse, first", FORMS)
def test_forms(gpu, inverse, first):
    compare(gpu, affine(scale_map="tanh", inverse=inverse, shift_first=first), leaves_of((33, 392)), sums=(1,))


@pytest.mark.parametrize(
    "shape, dtype, param_dtype", [(shape, F32, F32) for shape in SHAPES] + [((33, 37), *pair) for pair in PAIRS]
)
def test_dtypes_and_sizes(gpu, shape, dtype, param_dtype):
    leaves = leaves_of(shape, dtype, param_dtype)
    mask = draw(shape, seed=3) > 0.3
    compare(gpu, affine(scale_map="tanh"), leaves, sums=(1,))
    masked = lambda x, t, s, mask: ops.affine_coupling(x, t, s, inverse=True, mask=mask)
    compare(gpu, masked, leaves, mask, sums=(1,))
    # the public function computes the plain case in torch
    compare(gpu, lambda x, t: torch.ops.pyflow.additive_coupling(x, t, None, True), leaves[:2])
    compare(gpu, lambda x, t, mask: ops.additive_coupling(x, t, mask=mask), leaves[:2], mask)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_empty_tensors(gpu, shape):
    compare(gpu, affine(), leaves_of(shape), sums=(1,))
    compare(gpu, lambda x, t: torch.ops.pyflow.additive_coupling(x, t, None, True), leaves_of(shape)[:2])


@pytest.mark.parametrize(
    "layout, event_dims", [(name, 3) for name in testing.LAYOUTS]
    + [("half", 1), ("transposed", 1), ("channels_last", 1), ("stepped", 0), ("channels_last", 0)],
)  # fmt: skip
def test_layouts(gpu, layout, event_dims):
    coupling = affine(scale_map="atan", event_dims=event_dims)
    viewed = lambda *v: coupling(*(testing.laid_out(u, layout) for u in v))
    compare(gpu, viewed, leaves_of((6, 5, 7, 12)), sums=(1,))


@pytest.mark.parametrize("layout", testing.gradient_layouts(torch.zeros(2, 3)))
def test_gradients_of_any_layout(gpu, layout):
    leaves = [v.to(DEVICE).requires_grad_() for v in leaves_of((12, 40))]
    y, logdet = ops.affine_coupling(*leaves, scale_map="tanh")
    given = testing.gradient_layouts(draw(y.shape, seed=8).to(DEVICE))[layout]
    of_logdet = draw((1,), seed=9).to(DEVICE).expand_as(logdet)
    got = torch.autograd.grad((y, logdet), leaves, (given, of_logdet), retain_graph=True)
    want = torch.autograd.grad((y, logdet), leaves, (given.clone(), of_logdet.clone()))
    for a, b in zip(got, want, strict=True):
        testing.assert_same_bits(a, b)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_packings(gpu, packing, dim):
    shape = (4, 6, 5, 8)
    doubled = tuple(n * (1 + (d == dim)) for d, n in enumerate(shape))
    form = (PACKINGS.index(packing) + dim) % 4
    for inverse, first in FORMS if gpu == "cuda" else (FORMS[form],):
        options = dict(packing=packing, dim=dim, scale_map="tanh", inverse=inverse, shift_first=first)
        function = lambda x, p: ops.affine_coupling_packed(x, p, **options)
        compare(gpu, function, [draw(shape), draw(doubled, seed=1)], sums=(1,))


def test_same_bits_in_every_run_and_batch(gpu):
    for _, cols in sized([(300, n) for n in (3, 37, 392, 3000, 9001)]):
        x, shift, scale = moved(leaves_of((300, cols)))
        whole = ops.affine_coupling(x, shift, scale, scale_map="tanh")
        for a, b in zip(whole, ops.affine_coupling(x, shift, scale, scale_map="tanh"), strict=True):
            testing.assert_same_bits(a, b)
        for rows in (slice(0, 1), slice(0, 7), slice(123, 200), slice(1, None)):
            for a, b in zip(
                whole, ops.affine_coupling(x[rows], shift[rows], scale[rows], scale_map="tanh"), strict=True
            ):
                testing.assert_same_bits(a[rows], b)


def test_a_row_has_the_same_sum_in_any_layout(gpu):
    x, shift, scale = moved(leaves_of((20, 700)))
    _, logdet = ops.affine_coupling(x, shift, scale, scale_map="tanh")
    wide = torch.zeros(20, 1400, device=DEVICE)
    wide[:, 1::2] = scale
    testing.assert_same_bits(logdet, ops.affine_coupling(x, shift, wide[:, 1::2], scale_map="tanh")[1])
    shifted = torch.zeros(20 * 700 + 1, device=DEVICE)[1:].view(20, 700).copy_(scale)
    testing.assert_same_bits(logdet, ops.affine_coupling(x, shift, shifted, scale_map="tanh")[1])


def test_works_in_a_cuda_graph_and_never_waits(gpu):
    (shape,) = sized([(64, 9001)]) or [(4, 600)]
    leaves = moved(leaves_of(shape))
    params = torch.cat(leaves[1:], 1)

    def step():
        y, logdet = ops.affine_coupling(*leaves, scale_map="tanh")
        z, again = ops.affine_coupling_packed(y, params, scale_map="sigmoid", inverse=True)
        return torch.ops.pyflow.additive_coupling(z, leaves[1], None, False), logdet + again

    check_graph(step, lambda: [v.mul_(0.5) for v in (*leaves, params)])


def test_backward_works_in_a_cuda_graph(gpu):
    leaves = [v.requires_grad_() for v in moved(leaves_of((16, 392)))]

    def step():
        y, logdet = ops.affine_coupling(*leaves, scale_map="tanh")
        return y.detach(), *torch.autograd.grad(y.square().sum() + logdet.sum(), leaves)

    def change():
        with torch.no_grad():
            leaves[0].mul_(0.5)

    check_graph(step, change)


def test_compiles_without_graph_breaks(kernels):
    check_compiled(affine(scale_map="tanh"), leaves_of((32, 100)))


def test_autocast_changes_nothing(gpu):
    leaves = moved(leaves_of((33, 37)))
    with torch.autocast(DEVICE, torch.bfloat16):
        got = ops.affine_coupling(*leaves, scale_map="tanh")
    for a, b in zip(got, ops.affine_coupling(*leaves, scale_map="tanh"), strict=True):
        testing.assert_same_bits(a, b)


def test_unwritten_memory_is_never_read(gpu):
    with testing.poisoned():
        for shape in SHAPES:
            for v in run(gpu, DEVICE, affine(scale_map="tanh"), leaves_of(shape)):
                assert not v.isnan().any(), shape


def test_second_derivatives(gpu):
    leaves = [v.to(DEVICE).requires_grad_() for v in leaves_of((3, 5), F64)]
    assert torch.autograd.gradgradcheck(affine(scale_map="tanh"), leaves)


@pytest.mark.slow
def test_more_elements_than_an_int32_counts(gpu):
    needs_memory(40)
    count = 2**31 + 4096
    for shape in [(1, count), (count // 64, 64), (3, count // 2)]:
        x = torch.ones(shape, dtype=BF16, device="cuda")
        x[-1, -5:] = 3
        shift = torch.full((1, 1), 0.5, device="cuda").expand(shape)
        scale = torch.full((1, 1), 2.0**-20, device="cuda").expand(shape)
        y, logdet = ops.affine_coupling(x, shift, scale)
        assert y[0, :5].eq(1.5).all() and y[-1, -5:].eq(3.5).all() and y[-1, -6] == 1.5
        torch.testing.assert_close(logdet.double(), torch.full_like(logdet, shape[1] * 2.0**-20).double())
        del y
        y = torch.ops.pyflow.additive_coupling(x, shift, None, False)
        assert y[0, :5].eq(1.5).all() and y[-1, -5:].eq(3.5).all() and y[-1, -6] == 1.5
        del x, y
