"""Splines on a GPU: within rounding of the reference in float64, the bits of the C++ kernels, in every layout and batch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import pyflow
from pyflow import _backend, ops, testing
from pyflow._schemas import SPLINE_VARIANTS
from pyflow.reference import spline as ref

from .common import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    check_compiled,
    check_graph,
    draw,
    few,
    moved,
    needs_memory,
    run,
    sized,
)  # fmt: skip

F32, F64, BF16, F16 = DTYPES
SLOPES = {"linear": -1, "circular": 0, None: 1, "mixed": 1}
SHAPES = few(sized([(3, 1), (65, 3), (5, 127), (16, 8), (2, 600), (4, 130), (7, 1000), (65, 9001)]), 4)
NAMES = ("y", "logdet", "grad_x", "grad_params")


def named_tails(tails, features):
    """What `tails` of the public function is."""
    return [("linear", "circular")[f % 3 % 2] for f in range(features)] if tails == "mixed" else tails


def leaves_of(shape, bins=3, tails="linear", dtype=F32, param_dtype=None, seed=0, spread=1.0):
    """x, a few of which are outside the bounds, and params."""
    x = draw(shape, F64, seed)
    x = (torch.special.ndtr(x) if tails is None else 1.5 * x).to(dtype)
    return [x, draw((*shape, 3 * bins + SLOPES[tails]), param_dtype or dtype, seed + 1, spread)]


def spline(shape, bins=3, tails="linear", **options):
    """The public function of x, params and perhaps a mask and bounds."""
    options = {"bound": 3.0, **options, "bins": bins, "tails": named_tails(tails, shape[-1] if shape else 1)}
    return lambda x, params, mask=None, **more: ops.rq_spline(x, params, mask=mask, **{**options, **more})


def exact(function, leaves, *given):
    """Outputs and gradients of the reference in float64 for the weights that `run` draws."""
    dtypes = leaves[0].dtype, testing.compute_dtype(leaves[0].dtype)
    leaves = [v.detach().double().requires_grad_() for v in leaves]
    with pyflow.backend("reference"):
        outputs = function(*leaves, *given)
        weights = [draw(o.shape, dtype, 9).double() for o, dtype in zip(outputs, dtypes, strict=True)]
        grads = torch.autograd.grad(outputs, leaves, weights)
    return [v.detach() for v in (*outputs, *grads)]


def rounding(want, function, leaves, *given):
    """How far rounding may move each result: as far as a few roundings of x, params and knots move the exact ones.

    Knots are sums over softmaxes times the length of the domain, so that theirs are relative to the length.
    """
    unit = testing.UNIT[testing.compute_dtype(leaves[0].dtype)]
    x, params = (v.double() for v in leaves)
    spread = [torch.zeros_like(v) for v in want]
    plain = ref._knots
    for seed in range(6):
        dx, dp = (4 * unit * draw(v.shape, F64, 50 + seed).sign() for v in (x, params))
        near = [x + dx * (1 + x.abs().clamp(max=4)), params + dp * (1 + params.abs())]

        def moved_knots(part, low, high, options):
            knots = plain(part, low, high, options)
            error = 4 * unit * (high - low)[..., None] * draw(knots.shape, F64, 60 + seed).sign()
            return torch.cat((knots[..., :1], (knots + error)[..., 1:-1], knots[..., -1:]), -1)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ref, "_knots", moved_knots)
            for most, a, b in zip(spread, exact(function, near, *given), want, strict=True):
                most.copy_(torch.maximum(most, (a - b).abs().nan_to_num(0)))
    # the parameters of an element share its factors
    spread[3] = spread[3].amax(-1, keepdim=True).expand_as(spread[3]) if spread[3].numel() else spread[3]
    return [8 * most + 16 * unit * (1 + b.abs()) for most, b in zip(spread, want, strict=True)]


def check(gpu, function, leaves, *given):
    """Compare outputs and gradients with the reference in float64, and in float32 with the bits of the C++ kernels."""
    got, want = run(gpu, DEVICE, function, leaves, *given), exact(function, leaves, *given)
    bounds = rounding(want, function, leaves, *given)
    for name, a, b, bound in zip(NAMES, got, want, bounds, strict=True):
        testing.assert_within(a, b, bound, name)
    for i, leaf in ((0, leaves[0]), (2, leaves[0]), (3, leaves[1])):
        assert got[i].dtype == leaf.dtype and got[i].stride() == torch.empty_like(leaf).stride(), NAMES[i]
    if _backend.cpu_missing is None and leaves[0].dtype != F64:
        for i, b in enumerate(run("cpu", "cpu", function, leaves, *given)):
            # sums have another order
            if i != 1:
                testing.assert_same_bits(got[i], b, NAMES[i])
    return got


@pytest.mark.parametrize(
    "variant, tails, inverse", few(list(itertools.product(("zuko", "nflows", "normflows"), SLOPES, (False, True))))
)
def test_variants_and_tails(gpu, variant, tails, inverse):
    shape = (9, 5)
    function = spline(shape, 3, tails, variant=variant, inverse=inverse, min_slope=1e-2, param_scale=0.6)
    check(gpu, function, leaves_of(shape, 3, tails, spread=2.0))


@pytest.mark.parametrize("bins", few([2, 3, 10, 16, 17, 31, 32, 8], 3))
def test_bins(gpu, bins):
    tails = list(SLOPES)[bins % 4]
    for number, inverse in enumerate(few((False, True), 1 + (bins > 10))):
        function = spline((7, 6), bins, tails, variant=SPLINE_VARIANTS[(bins + number) % 3], inverse=inverse)
        check(gpu, function, leaves_of((7, 6), bins, tails, spread=1.5))


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes(gpu, shape):
    check(gpu, spline(shape, 3, inverse=len(shape) % 2 == 0), leaves_of(shape, 3))


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0,)])
@pytest.mark.parametrize("event_dims", [0, 1])
def test_empty_tensors(gpu, shape, event_dims):
    for v in check(gpu, spline(shape, event_dims=event_dims), leaves_of(shape)):
        assert not v.count_nonzero()


@pytest.mark.parametrize(
    "dtype, param_dtype", few([(d, d) for d in DTYPES[1:]] + [(F32, BF16), (BF16, F32), (F16, F64), (F64, F32)], 2)
)
def test_dtypes(gpu, dtype, param_dtype):
    mask = draw((9, 7), seed=3) > 0.5
    for number, tails in enumerate(("circular", None)):
        function = spline((9, 7), 3, tails, inverse=bool(number))
        check(gpu, function, leaves_of((9, 7), 3, tails, dtype, param_dtype), mask)


@pytest.mark.parametrize(
    "layout, event_dims", [(name, 3) for name in testing.LAYOUTS]
    + [("half", 1), ("transposed", 1), ("channels_last", 1), ("stepped", 0), ("channels_last", 0)],
)  # fmt: skip
def test_layouts(gpu, layout, event_dims):
    shape = (2, 3, 4, 5)
    for tails in few(("mixed", "linear"), 2):
        leaves = leaves_of(shape, 2, tails)
        bounds = draw((5,), seed=7).abs() + 1
        function = spline(shape, 2, tails, event_dims=event_dims)
        on = lambda x, p: function(x, p, bound=bounds.to(x.device))
        plain = check(gpu, on, leaves)
        viewed = check(gpu, on, [testing.laid_out(v, layout) for v in leaves])
        for i, (a, b) in enumerate(zip(viewed, plain, strict=True)):
            if i == 1:
                # event dims may be summed in memory order
                testing.assert_within(a, b.double(), 1e-5 * (1 + b.abs().double()))
            else:
                testing.assert_same_bits(a, b, NAMES[i])


def test_params_of_any_stride(gpu):
    shape, function = (6, 7), spline((6, 7))
    x, params = leaves_of(shape)
    plain = run(gpu, DEVICE, function, [x, params])
    for order in few([(2, 0, 1), (2, 1, 0), (1, 2, 0), (1, 0, 2)], 2):
        other = params.permute(order).contiguous().permute([order.index(d) for d in range(3)])
        assert not other.is_contiguous()
        for a, b in zip(check(gpu, function, [x, other]), plain, strict=True):
            testing.assert_same_bits(a, b)
    # one spline per feature, as flows without a conditioner have
    shared = params[:1].expand_as(params)
    for a, b in zip(
        run(gpu, DEVICE, function, [x, shared]), run(gpu, DEVICE, function, [x, shared.clone()]), strict=True
    ):
        testing.assert_same_bits(a, b)


@pytest.mark.parametrize("layout", testing.gradient_layouts(torch.zeros(2, 3)))
def test_gradients_of_any_layout(gpu, layout):
    leaves = [v.to(DEVICE).requires_grad_() for v in leaves_of((12, 10))]
    y, logdet = spline((12, 10))(*leaves)
    given = testing.gradient_layouts(draw(y.shape, seed=8).to(DEVICE))[layout]
    of_logdet = draw((1,), seed=9).to(DEVICE).expand_as(logdet)
    got = torch.autograd.grad((y, logdet), leaves, (given, of_logdet), retain_graph=True)
    want = torch.autograd.grad((y, logdet), leaves, (given.clone(), of_logdet.clone()))
    for a, b in zip(got, want, strict=True):
        testing.assert_same_bits(a, b)


@pytest.mark.parametrize("inverse", [False, True])
def test_one_gradient_is_the_sum_of_its_parts(gpu, inverse):
    leaves = [v.to(DEVICE).requires_grad_() for v in leaves_of((6, 7))]
    outputs = spline((6, 7), inverse=inverse)(*leaves)
    grads = [torch.autograd.grad(o.sum(), leaves, retain_graph=True) for o in outputs]
    both = torch.autograd.grad(sum(o.sum() for o in outputs), leaves)
    for whole, *parts in zip(both, *grads, strict=True):
        size = sum(p.abs().double() for p in parts)
        testing.assert_within(whole, sum(p.double() for p in parts), 1e-4 * (size + size.amax()))


@pytest.mark.parametrize("tails, inverse", few(list(itertools.product(SLOPES, (False, True)))))
def test_masked_and_outside_elements_pass_through(gpu, tails, inverse):
    shape, function = (8, 6), spline((8, 6), 3, tails, inverse=inverse)
    x, params = leaves_of(shape, 3, tails)
    passes = draw(shape, seed=3) > 0.3
    x[2, 2:4], passes[2, 2:4] = torch.tensor([math.nan, math.inf]), True
    if tails is not None:
        x[0] = torch.tensor([3.5, -3.5, 3.0001, -math.inf, math.inf, -1e30])
        x[1, 1] = math.nan
    clean = run(gpu, DEVICE, function, [x, params], passes)
    skipped = passes | (False if tails is None else ~(x.abs() <= 3))
    for hidden in few((math.nan, math.inf), 2):
        hostile = torch.where(skipped[..., None], hidden, params)
        for name, a, b in zip(NAMES, run(gpu, DEVICE, function, [x, hostile], passes), clean, strict=True):
            testing.assert_same_bits(a, b, name)
    y, logdet, grad_x, grad_params = clean
    weights = draw(shape, F32, 9)
    testing.assert_same_bits(y[skipped], x[skipped])
    testing.assert_same_bits(grad_x[skipped], weights[skipped])
    assert not grad_params[skipped].count_nonzero() and logdet.isfinite().all()
    assert (grad_params[~skipped].abs().sum(-1) > 0).all()


def test_masks_broadcast(gpu):
    shape, function = (8, 6), spline((8, 6), 3)
    leaves = leaves_of(shape, 3)
    for other in [(6,), (8, 1), (1, 1)]:
        some = draw(other, seed=4) > 0
        results = [run(gpu, DEVICE, function, leaves, mask) for mask in (some, some.expand(shape).clone())]
        for a, b in zip(*results, strict=True):
            testing.assert_same_bits(a, b)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("variant", SPLINE_VARIANTS)
def test_ends_and_knots(gpu, variant, inverse):
    # equal widths and heights: knots at multiples of 0.75, which are exact, and 1e-7 beside them
    knots = torch.linspace(-3, 3, 9)
    x = torch.cat((knots, knots * (1 - 2**-20), knots * (1 + 2**-20)))[:, None]
    params = torch.cat((torch.zeros(27, 1, 16), draw((1, 1, 7)).expand(27, 1, 7)), -1)
    options = dict(variant=variant, inverse=inverse, event_dims=0, min_bin=0.0)
    y, logdet, *_ = check(gpu, spline((27, 1), 8, **options), [x, params])
    assert (y.abs() <= 3.001).all() and y[9:18].flatten().diff().gt(0).all()
    ends = torch.tensor([-3.0, 3.0])[:, None]
    testing.assert_same_bits(y[[0, 8]], ends)
    # zuko's domain does not contain its lower end
    assert logdet[8].item() == pytest.approx(0, abs=1e-5) and logdet[0].item() == pytest.approx(0, abs=1e-5)


def test_without_tails_the_outside_is_nan(gpu):
    x = torch.tensor([[-1e-3, 0.0, 0.5, 1.0, 1.001, math.nan, math.inf, -math.inf]])
    params = draw((1, 8, 13), seed=1)
    for inverse in (False, True):
        function = spline(x.shape, 4, None, inverse=inverse, event_dims=0)
        mask = torch.tensor([False] * 7 + [True])
        with pyflow.backend(gpu):
            leaves = [v.to(DEVICE).requires_grad_() for v in (x, params)]
            # the public function refuses such values where it can see them
            options = (None, mask.expand(x.shape).to(DEVICE), 1.0, 4, [], 0, 1.0, 1e-3, 1e-3, inverse, 0)
            y, logdet = torch.ops.pyflow.rq_spline(*leaves, *options)
            grads = torch.autograd.grad(y.sum() + logdet.sum(), leaves)
        outside = torch.tensor([[True, False, False, False, True, True, True, False]])
        for v in (y, logdet, *grads):
            v = v.detach().cpu()
            assert v[outside].isnan().all() and not v[~outside].isnan().any()
        inside = x[:, 1:4], params[:, 1:4]
        for a, b in zip(run(gpu, DEVICE, function, inside)[:2], (y, logdet), strict=True):
            testing.assert_same_bits(a, b[:, 1:4].detach().cpu())


@pytest.mark.parametrize(
    "where, value", few(list(itertools.product(("widths", "heights", "slopes"), (math.nan, math.inf))), 2)
)
def test_bad_parameters_give_nan_inside(gpu, where, value):
    for tails, inverse in ((None, False), ("linear", True)):
        x, params = leaves_of((3, 4), 4, tails, seed=5)
        x = x.clamp(-2.9, 2.9)
        clean = run(gpu, DEVICE, spline((3, 4), 4, tails, inverse=inverse, event_dims=0), [x, params])
        first = {"widths": 0, "heights": 4, "slopes": 8}[where]
        params[1, 2, first : first + 4] = value
        got = run(gpu, DEVICE, spline((3, 4), 4, tails, inverse=inverse, event_dims=0), [x, params])
        touched = torch.zeros(3, 4, dtype=torch.bool)
        touched[1, 2] = True
        for name, a, b in zip(NAMES, got, clean, strict=True):
            testing.assert_same_bits(a[~touched], b[~touched], name)
        assert got[0][touched].isnan().all() and got[1][touched].isnan().all()


@pytest.mark.parametrize("variant", few(SPLINE_VARIANTS, 2))
def test_large_logits(gpu, variant):
    for tails, spread in (("linear", 20.0), ("circular", 90.0)):
        leaves = leaves_of((12, 9), 3, tails, spread=spread)
        results = run(gpu, DEVICE, spline((12, 9), 3, tails, variant=variant), leaves)
        assert all(v.isfinite().all() for v in results[:2])
        x = leaves[0].clamp(-3, 3).sort(0).values
        order = leaves[1][:1].expand(12, 9, -1)
        y = run(gpu, DEVICE, spline((12, 9), 3, tails, variant=variant), [x, order])[0]
        assert (y.diff(dim=0) >= 0).all() and (y.abs() <= 3 * (1 + 2**-20)).all()


def test_the_inverse_undoes_the_forward(gpu):
    for dtype, variant in ((F32, "nflows"), (F64, "zuko"), (F64, "normflows")):
        x, params = moved(leaves_of((16, 8), dtype=dtype))
        y, logdet = spline((16, 8), variant=variant)(x, params)
        back, undone = spline((16, 8), variant=variant, inverse=True)(y, params)
        # 4 eps (B + B / m + ...) with slopes that are at least 1e-2 here
        error = 8 * testing.UNIT[dtype] * 3 * 200
        testing.assert_within(back.cpu(), x.cpu().double(), error)
        testing.assert_within(undone.cpu(), -logdet.cpu().double(), 100 * error)


def test_same_bits_in_every_run_and_batch(gpu):
    for _, cols in few(sized([(40, n) for n in (3, 13, 130, 392, 3000)]), 2):
        x, params = moved(leaves_of((40, cols), 3))
        function = spline((40, cols), 3)
        whole = function(x, params)
        for a, b in zip(whole, function(x, params), strict=True):
            testing.assert_same_bits(a, b)
        for rows in few((slice(0, 7), slice(0, 1), slice(12, 20), slice(1, None)), 4):
            for a, b in zip(whole, function(x[rows], params[rows]), strict=True):
                testing.assert_same_bits(a[rows], b)


def test_works_in_a_cuda_graph_and_never_waits(gpu):
    (shape,) = sized([(64, 1024)]) or [(6, 20)]
    x, params = moved(leaves_of(shape, tails="mixed"))
    function = spline(shape, tails="mixed")

    def step():
        y, logdet = function(x, params)
        back, again = function(y, params, inverse=True)
        return back, logdet + again

    check_graph(step, lambda: [v.mul_(0.5) for v in (x, params)])


def test_backward_works_in_a_cuda_graph(gpu):
    leaves = [v.requires_grad_() for v in moved(leaves_of((16, 8)))]

    def step():
        y, logdet = spline((16, 8))(*leaves)
        return y.detach(), *torch.autograd.grad(y.square().sum() + logdet.sum(), leaves)

    def change():
        with torch.no_grad():
            leaves[0].mul_(0.5)

    check_graph(step, change)


def test_compiles_without_graph_breaks(kernels):
    check_compiled(spline((12, 8)), leaves_of((12, 8)))


def test_autocast_changes_nothing(gpu):
    leaves = moved(leaves_of((9, 7)))
    with torch.autocast(DEVICE, torch.bfloat16):
        got = spline((9, 7))(*leaves)
    for a, b in zip(got, spline((9, 7))(*leaves), strict=True):
        testing.assert_same_bits(a, b)


def test_unwritten_memory_is_never_read(gpu):
    with testing.poisoned():
        for shape, tails in (((5, 3), "mixed"), ((2, 140), None), ((9, 7), "circular")):
            for v in run(gpu, DEVICE, spline(shape, 3, tails), leaves_of(shape, 3, tails)):
                assert not v.isnan().any(), shape


@pytest.mark.parametrize("inverse", few((False, True), 2))
def test_second_derivatives(gpu, inverse):
    shape, bins = ((1, 2), 2) if INTERPRETED else ((2, 3), 3)
    leaves = [v.to(DEVICE).requires_grad_() for v in leaves_of(shape, bins, dtype=F64)]
    assert torch.autograd.gradgradcheck(spline(shape, bins, inverse=inverse), leaves)


@pytest.mark.slow
def test_more_elements_than_an_int32_counts(gpu):
    needs_memory(30)
    count = 2**31 + 4096
    for shape in [(1, count), (count // 64, 64), (3, count // 2)]:
        x = torch.full(shape, 0.25, dtype=BF16, device="cuda")
        x[-1, -5:] = 3
        # equal bins and slopes 1: the identity
        params = torch.zeros(1, 1, 5, device="cuda").expand(*shape, 5)
        y, logdet = ops.rq_spline(x, params, bins=2, min_slope=1 - math.log(2), min_bin=0.0)
        assert y[0, :5].eq(0.25).all() and y[-1, -5:].eq(3).all() and y[-1, -6] == 0.25
        torch.testing.assert_close(logdet, torch.zeros_like(logdet), atol=1e-6 * shape[1], rtol=0)
        del x, y
