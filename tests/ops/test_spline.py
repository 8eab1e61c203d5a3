"""Rational-quadratic splines against their reference, bit by bit and under every transform."""

from __future__ import annotations

import functools
import hashlib
import math

import pytest
import torch

import pyflow
from pyflow import ops, testing
from pyflow._schemas import SPLINE_VARIANTS, TAILS
from pyflow.reference import spline as ref

COUNTS = {"linear": -1, "circular": 0, None: 1, "mixed": 1}
FORMS = [(variant, tails, inverse) for variant in SPLINE_VARIANTS for tails in COUNTS for inverse in (False, True)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MINIMA = dict(param_scale=1.0, min_bin=1e-3, min_slope=1e-3)


def tails_of(tails, features):
    """A list of both kinds for "mixed", one per feature."""
    return ["linear" if f % 3 else "circular" for f in range(features)] if tails == "mixed" else tails


def inputs(shape, bins, tails="linear", dtype=torch.float32, param_dtype=None, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(s, generator=generator, dtype=torch.float64)
    x = torch.rand(shape, generator=generator, dtype=torch.float64) if tails is None else draw(*shape)
    return x.to(dtype), (spread * draw(*shape, 3 * bins + COUNTS[tails])).to(param_dtype or dtype)


def operator_arguments(
    x, params, *, bins, tails="linear", variant="nflows", inverse=False, bound=1.0, mask=None, **more
):
    """Arguments of the operator by name, as the public function passes them."""
    bounds = bound if isinstance(bound, torch.Tensor) else None
    kinds = () if tails is None else (tails,) if isinstance(tails, str) else tails
    return {
        "x": x, "params": params, "bounds": bounds, "mask": mask, "bound": 1.0 if bounds is not None else bound,
        "bins": bins, "tails": tuple(TAILS.index(kind) for kind in kinds), "form": variant, **MINIMA, "inverse": inverse,
        "event_dims": x.dim() - 1, **more,
    }  # fmt: skip


def bins_of(x, params, bins, tails, variant, inverse, bound, **more):
    """Of every element in float64: width, height, the slopes at both ends of its bin, and dy/dx."""
    arguments = operator_arguments(x, params, bins=bins, tails=tails, variant=variant, inverse=inverse, bound=bound)
    o = ref.Options(**{name: arguments[name] for name in ref.Options._fields})
    low, high = ref._ends(x, arguments["bounds"], o)
    used, _ = ref._used(x, low, high, None, o)
    place = ref._place(ref._seen(x, params, used, low, high)[0], ref.spline_of(params, low, high, o), inverse, o)
    each = ref.rq_spline(**{**arguments, "event_dims": 0})[1]
    return place, torch.exp(-each if inverse else each)


def check(x, params, bins, tails="linear", variant="nflows", inverse=False, bound=1.0, mask=None, gradients=True):
    """Hold a call to the reference in float64; the bounds on errors are those of SPEC, the gradients' wider."""
    options = dict(bins=bins, tails=tails_of(tails, x.shape[-1]), variant=variant, inverse=inverse, bound=bound)
    leaves = [v.detach().requires_grad_(gradients) for v in (x, params)]
    y, logdet = ops.rq_spline(*leaves, mask=mask, **options)
    dtype = testing.compute_dtype(x.dtype)
    assert y.dtype == x.dtype and logdet.dtype == dtype and logdet.shape == x.shape[:1]
    wide = dict(options, bound=bound.double() if isinstance(bound, torch.Tensor) else bound)
    exact = [v.detach().double().requires_grad_(gradients) for v in (x, params)]
    want, want_logdet = ref.rq_spline(**operator_arguments(*exact, mask=mask, **wide))
    eps, b = 2 * testing.UNIT[dtype], torch.as_tensor(wide["bound"] if tails else 1.0)
    place, rise = bins_of(*(v.detach() for v in exact), **wide)
    s = place.h / place.w
    most = torch.maximum(s, torch.maximum(place.d0, place.d1))
    least = torch.minimum(place.d0, place.d1)
    # the error of an inverse is that of a forward over the slope
    y_error = 8 * eps * b * (1 + most) / (rise if inverse else 1)
    each = 8 * eps * (1 + b * (1 / place.w + 1 / place.h) * (1 + most / s + s / least))
    testing.assert_within(y, want, y_error, "y")
    terms, total = math.prod(x.shape[1:]), lambda v: v.reshape(len(v), -1 if v.numel() else 0).sum(1)
    log_error = total(each) + testing.sum_error(terms, total(rise.log().abs()), dtype)
    testing.assert_within(logdet, want_logdet, log_error, "logdet")
    if not gradients:
        return
    gy = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).reshape(x.shape).to(y.dtype)
    gl = torch.linspace(1, 0, len(x), dtype=torch.float64).to(dtype)
    got = torch.autograd.grad((y, logdet), leaves, (gy, gl))
    expected = torch.autograd.grad((want, want_logdet), exact, (gy.double(), gl.double()))
    # derivatives of log y' change by as much again as log y' over a fraction 1 / 8 of the bin
    worst = 8 * each * (1 + most) ** 2 * (1 + 1 / least) ** 2 * (1 + 1 / s) * b * (1 / place.w + 1 / place.h)
    worst = worst / (rise.clamp(max=1) ** 2 if inverse else 1)
    testing.assert_within(got[0], expected[0], worst, "grad_x")
    testing.assert_within(got[1], expected[1], worst[..., None] * b.reshape(-1, 1), "grad_params")


@pytest.mark.parametrize("variant, tails, inverse", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(variant, tails, inverse, dtype):
    for shape, bins in [((3, 1), 8), ((2, 63), 3), ((1, 100), 8), ((5, 2, 7, 3), 5)]:
        bound = 1.0 if tails is None else 1.5
        check(*inputs(shape, bins, tails, dtype), bins, tails, variant, inverse, bound)


@pytest.mark.parametrize("bins", [2, 3, 8, 31, 32, 33])
@pytest.mark.parametrize("tails", COUNTS)
def test_bins(bins, tails):
    for inverse in (False, True):
        check(*inputs((9, 7), bins, tails), bins, tails, inverse=inverse)


@pytest.mark.parametrize(
    "shape", [(0, 5), (4, 0), (0, 0), (1,), (17,), (63, 1), (64, 1), (65, 1), (1, 1000), (2, 8193), (70, 3), (3, 257)]
)
@pytest.mark.parametrize("inverse", [False, True])
def test_sizes(shape, inverse):
    check(*inputs(shape, 3), 3, inverse=inverse)


@pytest.mark.parametrize(
    "x_dtype, param_dtype",
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.float16, torch.bfloat16),
    ],
)
def test_mixed_dtypes(x_dtype, param_dtype):
    check(*inputs((5, 70), 4, dtype=x_dtype, param_dtype=param_dtype), 4)


def params_in(layout, params):
    if layout == "parameters first":
        return params.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "parameters second":
        return params.movedim(-1, 1).contiguous().movedim(1, -1)
    return testing.laid_out(params, layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [*testing.LAYOUTS, "parameters first", "parameters second"])
def test_layouts_give_the_same_bits(layout, dtype):
    x, params = inputs((6, 5, 4, 10), 4, dtype=dtype)

    def run(x, params):
        x, params = x.detach().requires_grad_(), params.detach().requires_grad_()
        out = ops.rq_spline(x, params, bins=4)
        return *out, *torch.autograd.grad(out, (x, params), (torch.ones_like(out[0]), torch.ones_like(out[1])))

    plain, own = run(x, params), x if layout.startswith("parameters") else testing.laid_out(x, layout)
    for viewed in (run(own, params_in(layout, params)), run(x, params_in(layout, params)), run(own, params)):
        testing.assert_same_bits(viewed[0], plain[0], layout)
        testing.assert_same_bits(viewed[2], plain[2], layout)
        testing.assert_same_bits(viewed[3], plain[3], layout)
        torch.testing.assert_close(viewed[1], plain[1])
    y = ops.rq_spline(own, params, bins=4)[0]
    assert y.stride() == torch.empty_like(own).stride()


def test_expanded_parameters():
    x, params = inputs((6, 5), 4)
    shared = params[:1].expand(6, 5, -1)
    testing.assert_same_bits(ops.rq_spline(x, shared, bins=4)[0], ops.rq_spline(x, shared.clone(), bins=4)[0])


@pytest.mark.parametrize("tails", ["linear", "mixed"])
@pytest.mark.parametrize("event_dims", [0, 1, 2, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_bounds_and_tails_by_feature(layout, event_dims, tails):
    x, params = inputs((3, 4, 5), 4, tails)
    bound = torch.linspace(0.3, 1.5, 5)
    options = dict(bins=4, tails=tails_of(tails, 5), event_dims=event_dims)
    y, logdet = ops.rq_spline(testing.laid_out(x, layout), params, bound=bound, **options)
    columns = []
    for f in range(5):
        kind = options["tails"] if tails == "linear" else [options["tails"][f]]
        own = dict(bins=4, tails=kind, bound=float(bound[f]), event_dims=0)
        columns.append(ops.rq_spline(x[..., f : f + 1], params[..., f : f + 1, :], **own))
    testing.assert_same_bits(y, torch.cat([column[0] for column in columns], -1))
    each = torch.cat([column[1] for column in columns], -1)
    torch.testing.assert_close(logdet, each.sum(tuple(range(3 - event_dims, 3))) if event_dims else each)
    check(x, params, 4, tails, bound=bound)


@pytest.mark.parametrize("variant", SPLINE_VARIANTS)
def test_tails_that_agree(variant):
    """A list is linear with other outer slopes, circular without the last number."""
    x, params = inputs((20, 6), 5, "mixed")
    options = dict(bins=5, variant=variant, bound=1.2)
    listed = ops.rq_spline(x, params, tails=["linear"] * 6, **options)
    inner = torch.cat((params[..., :10], params[..., 11:15]), -1)
    for a, b in zip(listed, ops.rq_spline(x, inner, tails="linear", **options), strict=True):
        testing.assert_same_bits(a, b)
    listed = ops.rq_spline(x, params, tails=["circular"] * 6, **options)
    for a, b in zip(listed, ops.rq_spline(x, params[..., :15], tails="circular", **options), strict=True):
        testing.assert_same_bits(a, b)


def test_without_tails_the_bound_does_not_matter():
    x, params = inputs((3, 4), 3, None)
    plain = ops.rq_spline(x, params, bins=3, tails=None)
    for bound in (2.0, torch.linspace(1, 2, 4)):
        for a, b in zip(ops.rq_spline(x, params, bins=3, tails=None, bound=bound), plain, strict=True):
            testing.assert_same_bits(a, b)
    arguments = operator_arguments(x, params, bins=3, tails=None, bound=torch.linspace(1, 2, 4))
    arguments["form"] = 0
    testing.assert_same_bits(torch.ops.pyflow.rq_spline(**arguments)[0], plain[0])


def test_more_tails_than_a_kernel_takes():
    x, params = inputs((1, 2049), 2, "mixed")
    check(x, params, 2, "mixed", gradients=False)


@pytest.mark.parametrize("variant", SPLINE_VARIANTS)
def test_knots_belong_to_the_bin_on_their_side(variant):
    # equal bins, so that knots are exact
    params = torch.zeros(1, 5, 11, dtype=torch.float64)
    params[..., 8:] = torch.tensor([-1.0, 0.5, 2.0])
    x = torch.tensor([[-1.0, -0.5, 0.0, 0.5, 1.0]], dtype=torch.float64)
    options = dict(bins=4, variant=variant, event_dims=0)
    grads = []
    for shift in (0.0, 1e-9, -1e-9):
        moved = (x + shift).requires_grad_()
        grads.append(torch.autograd.grad(ops.rq_spline(moved, params, **options)[1].sum(), moved)[0][0])
    at, right, left = grads
    zuko = variant == "zuko"
    torch.testing.assert_close(at[1:4], (left if zuko else right)[1:4], rtol=1e-6, atol=1e-6)
    # the ends: outside the gradient of the log-determinant is 0
    assert (at[0] == 0) == zuko and right[0] != 0 and left[0] == 0 and right[4] == 0
    torch.testing.assert_close(at[4], left[4], rtol=1e-6, atol=1e-6)


# what is not transformed


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("variant, tails, inverse", FORMS)
def test_masked_and_outside_elements_pass_by_selection(variant, tails, inverse, backend):
    x, params = inputs((4, 6, 5), 4, tails)
    mask = (torch.arange(6) >= torch.tensor([6, 1, 0, 3])[:, None])[..., None].expand(x.shape)
    kept = mask | (x.abs() > 1) if tails else mask
    params = params.masked_fill(kept[..., None], torch.nan).requires_grad_()
    if tails:
        x[0, 0, 0], kept[0, 0, 0] = torch.inf, True
        x[0, 0, 1], kept[0, 0, 1] = -torch.inf, True
    else:
        x[mask] = 7.0
    x.requires_grad_()
    with pyflow.backend(backend):
        options = dict(bins=4, tails=tails_of(tails, 5), variant=variant, inverse=inverse, mask=mask)
        y, logdet = ops.rq_spline(x, params, **options)
        gy = torch.randn(x.shape)
        grads = torch.autograd.grad((y, logdet), (x, params), (gy, torch.ones(4)))
    testing.assert_same_bits(y[kept], x[kept])
    assert not y.isnan().any() and not logdet.isnan().any() and logdet[2] == 0
    testing.assert_same_bits(grads[0][kept], gy[kept])
    assert (grads[1][kept] == 0).all() and not grads[1].isnan().any()
    assert (grads[1][~kept] != 0).any()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("inverse", [False, True])
def test_outside_a_domain_without_tails_is_nan(inverse, backend):
    params = inputs((1, 4), 4, None)[1].requires_grad_()
    x = torch.tensor([[0.5, -0.1, 1.5, 0.0]], requires_grad=True)
    arguments = operator_arguments(x, params, bins=4, tails=None, inverse=inverse, event_dims=0)
    call = torch.ops.pyflow.rq_spline if backend == "auto" else ref.rq_spline
    if backend == "auto":
        arguments["form"] = SPLINE_VARIANTS.index(arguments["form"])
    y, each = call(**arguments)
    wrong = torch.tensor([[False, True, True, False]])
    assert torch.equal(y.isnan(), wrong) and torch.equal(each.isnan(), wrong)
    if backend == "auto":
        found = torch.autograd.grad((y, each), (x, params), (torch.ones_like(y), torch.ones_like(each)))
    else:
        found = ref.rq_spline_backward(torch.ones_like(y), torch.ones_like(each), **arguments)
    assert torch.equal(found[0].isnan(), wrong)
    assert torch.equal(found[1].isnan(), wrong[..., None].expand(params.shape))


@pytest.mark.parametrize("variant, tails, inverse", FORMS)
def test_nan_and_infinity_travel_as_in_the_reference(variant, tails, inverse):
    special = torch.tensor([0.25, 1.0, torch.nan] + [0.0, -0.0, -1.0, torch.inf, -torch.inf] * (tails is not None))
    values = torch.tensor([0.0, 20.0, -200.0, torch.inf, -torch.inf, torch.nan])
    bins = 3
    count = 3 * bins + COUNTS[tails]
    params = torch.zeros(count, len(values), count)
    for place in range(count):
        params[place, :, place] = values
    x = special[:, None].expand(-1, count * len(values))
    params = params.reshape(1, -1, count).expand(len(x), -1, -1)

    def run():
        options = dict(bins=bins, tails=tails_of(tails, x.shape[1]), variant=variant, inverse=inverse, event_dims=0)
        leaves = [v.detach().clone().requires_grad_() for v in (x, params)]
        out = ops.rq_spline(*leaves, **options)
        return *out, *torch.autograd.grad(out, leaves, [torch.ones_like(v) for v in out])

    got = run()
    with pyflow.backend("reference"):
        want = run()
    for a, b, name in zip(got[:2], want[:2], ("y", "logdet"), strict=True):
        assert torch.equal(a.isnan(), b.isnan()), name
        assert torch.equal(a.isinf(), b.isinf()), name
    # a NaN x has no bin
    nan = x.isnan()
    assert got[0][nan].isnan().all()
    for a, b in zip(got[2:], want[2:], strict=True):
        assert torch.equal(a[nan].isnan(), b[nan].isnan())


# bits


@functools.lru_cache
def large(shape, bins):
    return inputs(shape, bins, spread=2.0)


def run(x, params, bins, **options):
    x, params = x.detach().requires_grad_(), params.detach().requires_grad_()
    out = ops.rq_spline(x, params, bins=bins, **options)
    grads = torch.autograd.grad(out, (x, params), (torch.ones_like(out[0]), torch.ones_like(out[1])))
    return *(v.detach() for v in out), *grads


@pytest.mark.parametrize("shape, bins", [((300, 8), 8), ((2, 9000), 3), ((70, 131), 4)])
@pytest.mark.parametrize("inverse", [False, True])
def test_bits_do_not_depend_on_threads_or_batch(shape, bins, inverse):
    x, params = large(shape, bins)
    with testing.threads(1):
        single = run(x, params, bins, inverse=inverse)
    with testing.threads(4):
        several, again = (run(x, params, bins, inverse=inverse) for _ in range(2))
    for rows in (1, 2):
        for a, b, c, first in zip(
            single, several, again, run(x[:rows], params[:rows], bins, inverse=inverse), strict=True
        ):
            testing.assert_same_bits(a, b)
            testing.assert_same_bits(b, c)
            testing.assert_same_bits(a[:rows], first)


def digest() -> str:
    """One hash over every form; run in a process per instruction set."""
    h = hashlib.sha256()
    for variant, tails, inverse in FORMS:
        for shape, bins in [((33, 7), 8), ((2, 70), 32), ((300, 3), 2)]:
            x, params = inputs(shape, bins, tails, spread=3.0)
            options = dict(tails=tails_of(tails, shape[-1]), variant=variant, inverse=inverse)
            for v in run(x, params, bins, **options):
                h.update(torch.nan_to_num(v).numpy().tobytes())
    return h.hexdigest()


def test_instruction_sets_give_the_same_bits(every_instruction_set):
    assert len(every_instruction_set) == 1


def test_every_output_element_is_written():
    with testing.poisoned():
        for shape in [(5, 70), (2, 9000), (40, 3)]:
            x, params = inputs(shape, 3)
            mask = torch.arange(shape[1]) % 5 == 0
            for own in (params, params_in("parameters first", params), testing.laid_out(params, "stepped")):
                assert not any(v.isnan().any() for v in run(x, own, 3, mask=mask))


def test_offsets_beyond_two_to_the_31():
    # a view into more elements than an int32 counts; only what it touches is ever paged in
    storage = torch.empty(2**31 + 2**20, dtype=torch.bfloat16)
    x, values = inputs((1, 2049), 2, dtype=torch.bfloat16)
    params = storage.as_strided((1, 2049, 5), (0, 2**20, 1))
    params.copy_(values)
    testing.assert_same_bits(ops.rq_spline(x, params, bins=2)[0], ops.rq_spline(x, values, bins=2)[0])


# laws


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant, tails", [(v, t) for v in SPLINE_VARIANTS for t in COUNTS])
def test_the_inverse_undoes_the_forward(variant, tails, dtype):
    for seed, spread in enumerate((0.0, 1.0, 4.0)):
        x, params = inputs((500, 6), 8, tails, dtype, seed=seed, spread=spread)
        options = dict(bins=8, tails=tails_of(tails, 6), variant=variant, bound=1.0 if tails is None else 2.0)
        y, logdet = ops.rq_spline(x, params, event_dims=0, **options)
        back, undone = ops.rq_spline(y, params, event_dims=0, inverse=True, **options)
        place, rise = bins_of(x.double(), params.double(), inverse=False, **options)
        # rounding y may move it to another place of the bin, or to the next bin
        m = torch.minimum(rise, torch.exp(-undone.double())).clamp(min=1e-30)
        b = options["bound"]
        bound = b * (1 + 1 / m) + place.w * (place.d0 + place.d1 + place.h / place.w) / m
        assert ((back.double() - x.double()).abs() <= 8 * testing.UNIT[dtype] * bound).all()
        total = ops.rq_spline(x, params, **options)[1]
        torch.testing.assert_close(logdet.sum(1), total)


def check_monotone(variant, inverse, seed=0):
    """At 64 points in each of 4096 splines with logits up to 20."""
    generator = torch.Generator().manual_seed(seed)
    params = (40 * torch.rand(4096, 1, 23, generator=generator) - 20).expand(-1, 64, -1)
    x = (3 * torch.rand(4096, 64, generator=generator) - 1.5).sort(1).values
    y, logdet = ops.rq_spline(x, params, bins=8, variant=variant, inverse=inverse, event_dims=0)
    assert y.isfinite().all() and logdet.isfinite().all()
    assert (y.abs() <= 1.5).all()
    # 8 eps B (1 + M), over the slope for an inverse, where the slope is at least 1e-3 of that in float64
    place, rise = bins_of(
        x.double(), params.double(), bins=8, tails="linear", variant=variant, inverse=inverse, bound=1.0
    )
    most = torch.maximum(place.h / place.w, torch.maximum(place.d0, place.d1))
    error = 16 * testing.UNIT[torch.float32] * (1 + most) / (rise if inverse else 1)
    assert (y[:, 1:] - y[:, :-1] >= -(error[:, 1:] + error[:, :-1])).all()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("variant", ["nflows", "zuko"])
def test_is_monotone_and_finite(variant, inverse):
    check_monotone(variant, inverse)


@pytest.mark.slow
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("variant", ["nflows", "zuko"])
def test_is_monotone_and_finite_everywhere(variant, inverse):
    for seed in range(10):
        check_monotone(variant, inverse, seed)


# peers


def peer_spline(name, params, inverse, bound):
    split = params[..., :6], params[..., 6:12], params[..., 12:]
    if name == "zuko":
        transforms = pytest.importorskip("zuko.transforms")
        transform = transforms.MonotonicRQSTransform(*split, bound=bound)
        return lambda x: (transform.inv if inverse else transform).call_and_ladj(x)
    where = {"nflows": "nflows.transforms.splines.rational_quadratic", "normflows": "normflows.utils.splines"}[name]
    spline = pytest.importorskip(where).unconstrained_rational_quadratic_spline
    return lambda x: spline(x, *split, inverse=inverse, tails="linear", tail_bound=bound)


@pytest.mark.parametrize("name", SPLINE_VARIANTS)
@pytest.mark.parametrize("inverse", [False, True])
def test_a_variant_is_its_peer(name, inverse):
    x, params = (v.requires_grad_() for v in inputs((200, 5), 6, dtype=torch.float64, spread=2.0))
    ours = ops.rq_spline(x, params, bins=6, variant=name, bound=2.5, inverse=inverse, event_dims=0)
    theirs = peer_spline(name, params, inverse, 2.5)(x)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    weights = torch.randn(2, 200, 5, dtype=torch.float64)
    grads, wanted = (torch.autograd.grad(out, (x, params), weights.unbind()) for out in (ours, theirs))
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


# gradients and transforms


@pytest.mark.parametrize("layout", testing.gradient_layouts(torch.zeros(2, 3, 4)))
def test_backward_takes_any_gradient_layout(layout):
    x, params = (v.requires_grad_() for v in inputs((5, 4, 12), 3))
    out = ops.rq_spline(x, params, bins=3)
    gy = testing.gradient_layouts(torch.randn(x.shape))[layout]
    gl = torch.ones(()).expand(5) if layout == "expanded" else torch.randn(10)[::2]
    got = torch.autograd.grad(out, (x, params), (gy, gl), retain_graph=True)
    plain = torch.autograd.grad(out, (x, params), (gy.contiguous(), gl.contiguous()))
    for a, b in zip(got, plain, strict=True):
        testing.assert_same_bits(a, b)


@pytest.mark.parametrize("which", [0, 1], ids=["y", "logdet"])
@pytest.mark.parametrize("inverse", [False, True])
def test_backward_through_one_output(which, inverse):
    x, params = (v.requires_grad_() for v in inputs((5, 40), 4, dtype=torch.float64))
    found = []
    for backend in ("auto", "reference"):
        with pyflow.backend(backend):
            out = ops.rq_spline(x, params, bins=4, inverse=inverse)
            found.append(torch.autograd.grad(out[which].sin().sum(), (x, params)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_inverse_has_a_gradient_at_both_ends(backend):
    params = inputs((200, 2), 8, None, torch.float64)[1]
    x = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat(200, 1).requires_grad_()
    options = dict(bins=8, tails=None, inverse=True, event_dims=0)
    with pyflow.backend(backend):
        y, each = ops.rq_spline(x, params, **options)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], each.detach().exp())


@pytest.mark.parametrize("variant, tails, inverse", FORMS)
def test_gradcheck_twice(variant, tails, inverse):
    leaves = [v.requires_grad_() for v in inputs((2, 3), 3, tails, torch.float64)]
    mask = torch.tensor([False, False, True])
    options = dict(bins=3, variant=variant, tails=tails_of(tails, 3), inverse=inverse, mask=mask)
    f = lambda *v: ops.rq_spline(*v, bound=1.0 if tails is None else torch.tensor([2.5, 2.0, 3.0]).double(), **options)
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


def operator_calls():
    x, params = (v.requires_grad_() for v in inputs((3, 4, 5), 3))
    stepped = testing.laid_out(x.detach(), "stepped").requires_grad_()
    listed = inputs((3, 4, 5), 3, "mixed")[1].requires_grad_()
    mask = (torch.arange(5) < 2).expand(3, 4, 5)
    gy, gl = torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, requires_grad=True)
    plain = (None, None, 2.0, 3, (0,), 0, 1.0, 1e-3, 1e-3, False, 2)
    mixed = (torch.linspace(0.5, 2, 5), mask, 1.0, 3, (0, 1, 0, 0, 1), 2, 1.0, 1e-3, 1e-3, True, 2)
    yield "rq_spline", (x, params, *plain)
    yield "rq_spline", (stepped, listed, *mixed)
    yield "rq_spline_backward", (gy, gl, x, params, *plain)
    yield "rq_spline_backward", (None, gl, stepped, listed, *mixed)
    yield pytest.param("rq_spline_backward", (gy, None, x, listed, *mixed), marks=pytest.mark.slow)


@pytest.mark.parametrize("name, args", list(operator_calls()))
def test_opcheck(name, args):
    torch.library.opcheck(getattr(torch.ops.pyflow, name).default, args)


def test_operators_refuse_what_kernels_do_not_take():
    x, params = inputs((2, 3), 33)
    options = dict(bounds=None, mask=None, bound=1.0, form=0, **MINIMA, inverse=False, event_dims=1)
    with pytest.raises(RuntimeError, match="takes 2 to 32 bins"):
        torch.ops.pyflow.rq_spline(x, params, bins=33, tails=[0], **options)
    with pytest.raises(RuntimeError, match="a spline of 32 bins has no 98 parameters"):
        torch.ops.pyflow.rq_spline(x, params, bins=32, tails=[0], **options)


@pytest.mark.parametrize("inverse", [False, True])
def test_compiles_without_a_graph_break_to_the_same_bits(inverse):
    x, params = (v.requires_grad_() for v in inputs((6, 10), 4))
    bound = torch.linspace(0.5, 2.0, 10)

    def f(x, params):
        y, a = ops.rq_spline(x, params * 1, bins=4, inverse=inverse)
        y, b = ops.rq_spline(y, params, bins=4, bound=bound, variant="zuko", mask=x > 1)
        return y, a + b

    def both(f):
        out = f(x, params)
        return *out, *torch.autograd.grad(out, (x, params), (torch.ones(6, 10), torch.ones(6)))

    compiled, eager = both(torch.compile(f, fullgraph=True)), both(f)
    for a, b in zip(compiled[:2], eager[:2], strict=True):
        testing.assert_same_bits(a, b)
    for a, b in zip(compiled[2:], eager[2:], strict=True):
        torch.testing.assert_close(a, b)  # sums of gradients are Inductor's


@pytest.mark.parametrize("tails", ["linear", "mixed", None])
@pytest.mark.parametrize("inverse", [False, True])
def test_function_transforms_agree_with_the_reference(inverse, tails):
    x, params = inputs((3, 4), 3, tails, torch.float64)

    def loss(x, params):
        y, logdet = ops.rq_spline(x, params, bins=3, tails=tails_of(tails, 4), inverse=inverse)
        return (y**2).sum() + logdet.sum()

    transforms = {
        "grad": lambda f: torch.func.grad(f, (0, 1))(x, params),
        "jacrev": lambda f: torch.func.jacrev(f, (0, 1))(x, params),
        "jacfwd": lambda f: torch.func.jacfwd(f, (0, 1))(x, params),
        "vmap of grad": lambda f: torch.vmap(torch.func.grad(f, (0, 1)))(x[:, None], params[:, None]),
        "jvp": lambda f: torch.func.jvp(f, (x, params), (x, params)),
    }
    for name, transform in transforms.items():
        got = transform(loss)
        with pyflow.backend("reference"):
            want = transform(loss)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("own_bounds", [None, "shared", "batched"])
def test_vmap_runs_the_kernel_and_records_gradients(own_bounds):
    x, params = inputs((5, 3, 4), 3)
    x.requires_grad_()
    bound = torch.linspace(0.5, 2.0, 20).view(5, 4)
    if own_bounds == "batched":
        # one of the bounds for each of the batch
        f = lambda x, p, b: torch.ops.pyflow.rq_spline(x, p, b, None, 1.0, 3, [0], 0, 1.0, 1e-3, 1e-3, False, 1)
        got = torch.vmap(f)(x, params, bound)
        parts = [ops.rq_spline(*each[:2], bins=3, bound=each[2]) for each in zip(x, params, bound, strict=True)]
        want = [torch.stack(v) for v in zip(*parts, strict=True)]
    else:
        options = dict(bins=3, bound=1.0 if own_bounds is None else bound[0])
        got = torch.vmap(functools.partial(ops.rq_spline, **options))(x, params)
        want = ops.rq_spline(x, params, event_dims=1, **options)
    for a, b in zip(got, want, strict=True):
        testing.assert_same_bits(a, b)
    assert got[0].requires_grad and torch.autograd.grad(got[0].sum(), x)[0].shape == x.shape


def test_autocast_changes_nothing():
    x, params = inputs((4, 40), 4)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.rq_spline(x, params, bins=4)
    for a, b in zip(got, ops.rq_spline(x, params, bins=4), strict=True):
        testing.assert_same_bits(a, b)


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
    (lambda f: f(X, P, bins=4, min_slope=-1e-3), ValueError, r"min_slope must be in \[0, 1\], got -0.001"),
    (lambda f: f(X, P, bins=4, min_slope=1.5), ValueError, r"min_slope must be in \[0, 1\], got 1.5"),
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


def test_the_compiled_reference_has_the_gradients_of_eager():
    # where there are no kernels, torch.compile sees the reference; its code for cumsum has wrong gradients
    leaves = [
        v.requires_grad_()
        for v in (
            torch.linspace(-2, 2, 64).view(16, 4),
            torch.randn(16, 4, 23, generator=torch.Generator().manual_seed(0)),
        )
    ]
    function = lambda x, params: ops.rq_spline(x, params, bins=8, bound=3.0, variant="zuko")
    with pyflow.backend("reference"):
        results = [
            torch.autograd.grad(f(*leaves), leaves, [torch.ones(16, 4), torch.ones(16)])
            for f in (function, torch.compile(function, fullgraph=True))
        ]
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
