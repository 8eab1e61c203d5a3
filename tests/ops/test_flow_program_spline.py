"""Splines in programs of flows: the bits of rq_spline, its reference in float64, and what the checker refuses."""

from __future__ import annotations

import math

import pytest
import torch

import pyflow
from pyflow import ops, testing
from pyflow._schemas import SPLINE_VARIANTS, TAILS
from pyflow.program import Additive, Dense, Net, Program, Scale, Spline
from pyflow.reference import flow_program as ref

from .programs import Builder
from .test_flow_program import DTYPES, bits, check_built, cotangents, run, same
from .test_spline import bins_of

FORMS = [(v, tails, inverse) for v in SPLINE_VARIANTS for tails in (*TAILS, None, "list") for inverse in (False, True)]
COLUMNS = (4, 1, 2)
BOUNDS = (1.5, 0.7, 3.0)


def built(tails, variant="nflows", inverse=False, bins=8, bound=BOUNDS, own=False, **options):
    """A builder, and a spline whose numbers are those of a weight or of the context."""
    named = ["circular", "linear", "circular"] if tails == "list" else tails
    build = Builder(5)
    spline = build.spline(
        COLUMNS, named, variant, bins=bins, bound=bound, own=own, spread=1.0, inverse=inverse, **options
    )
    return build, spline


def of_context(spline, dtype=torch.float32):
    """A program whose conditioner returns the context, and its weights."""
    size = len(spline.columns) * (2 * spline.bins + spline.slopes)
    net = Net((), True, (Dense(0, -1, size),))
    return Program(5, size, (0, 1, 2, 3, 4), (net, spline)), [torch.eye(size, dtype=dtype)]


def operator(spline, x, params):
    """What `rq_spline` makes of the columns of x, and its log-determinant by element."""
    names = [TAILS[tail] for tail in spline.tails]
    tails = None if not names else names if spline.slopes == spline.bins + 1 else names[0]
    bound = torch.tensor(spline.bound, dtype=x.dtype) if len(spline.bound) > 1 else spline.bound[0]
    y, logdet = ops.rq_spline(
        x[:, list(spline.columns)], params, bins=spline.bins, bound=bound, tails=tails, event_dims=0,
        variant=SPLINE_VARIANTS[spline.variant], param_scale=spline.param_scale, min_bin=spline.min_bin,
        min_slope=spline.min_slope, inverse=spline.inverse,
    )  # fmt: skip
    return x.index_copy(1, torch.tensor(spline.columns), y), logdet


def drawn_rows(build, batch, dtype, tails):
    x = build.draw(batch, 5)
    return (torch.sigmoid(x) if tails is None else 1.5 * x).to(dtype)


# against rq_spline


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant, tails, inverse", FORMS)
def test_numbers_of_a_conditioner(variant, tails, inverse, dtype):
    for bins, batch in [(8, 67), (2, 1), (32, 33)]:
        build, spline = built(tails, variant, inverse, bins, param_scale=0.7)
        program, weights = of_context(spline, dtype)
        x, context = drawn_rows(build, batch, dtype, tails), build.draw(batch, program.context).to(dtype)
        y, logdet, gx, gcontext, _ = run(x, program, weights, context)
        leaves = [x.clone().requires_grad_(), context.clone().requires_grad_()]
        want, each = operator(spline, leaves[0], leaves[1].view(batch, 3, -1))
        gy, gl = cotangents(y, logdet)
        grads = torch.autograd.grad((want, each), leaves, (gy, gl[:, None].expand(-1, 3)))
        for name, a, b in (("y", y, want), ("grad x", gx, grads[0]), ("grad context", gcontext, grads[1])):
            same(a, b.detach(), name)
        error = testing.sum_error(3, each.detach().abs().sum(1), dtype)
        testing.assert_within(logdet, each.detach().double().sum(1), error, "logdet")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("tails", [*TAILS, "list"])
def test_zero_outside(tails, own, dtype):
    for inverse in (False, True):
        # narrow bins and steep slopes lose digits
        build, spline = built(tails, inverse=inverse, own=own, param_scale=0.3, min_bin=0.05, min_slope=0.1)
        zero, columns = spline._replace(zero_outside=True), list(COLUMNS)
        nets = () if own else (build.net((0, 3), [9, 3 * (2 * spline.bins + spline.slopes)]),)
        check_built(build, build.program(*nets, zero), 67, dtype)
        x, weights = drawn_rows(build, 67, dtype, tails), [w.to(dtype) for w in build.weights]
        x[:2, 4], x[2, 1] = torch.tensor([1.5, -1.5]), math.nan
        got, want = (ops.flow_program(x, build.program(*nets, one), weights) for one in (zero, spline))
        outside = ~(x[:, columns].abs() <= torch.tensor(BOUNDS))
        assert got[0][:, columns].equal(want[0][:, columns].masked_fill(outside, 0)) and 0 < outside.sum() < 200
        assert got[1].equal(want[1]) and not outside[:2, 0].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant, tails, inverse", FORMS)
def test_numbers_of_a_weight(variant, tails, inverse, dtype):
    for bins, batch in [(8, 150), (2, 1), (32, 33)]:
        build, spline = built(tails, variant, inverse, bins, own=True)
        weight = build.weights[0].to(dtype)
        x = drawn_rows(build, batch, dtype, tails)
        y, logdet, gx, gweight = run(x, build.program(spline), [weight])
        leaves = [x.clone().requires_grad_(), weight.expand(batch, -1, -1).clone().requires_grad_()]
        want, each = operator(spline, *leaves)
        gy, gl = cotangents(y, logdet)
        grads = torch.autograd.grad((want, each), leaves, (gy, gl[:, None].expand(-1, 3)))
        same(y, want.detach(), "y")
        same(gx, grads[0], "grad x")
        error = testing.sum_error(3, each.detach().abs().sum(1), dtype)
        testing.assert_within(logdet, each.detach().double().sum(1), error, "logdet")
        error = testing.sum_error(batch, grads[1].double().abs().sum(0), dtype)
        testing.assert_within(gweight, grads[1].double().sum(0), error, "grad weight")


@pytest.mark.parametrize("variant, tails, inverse", FORMS)
def test_errors_against_float64(variant, tails, inverse):
    build, spline = built(tails, variant, inverse, own=True)
    x = drawn_rows(build, 200, torch.float32, tails)
    weight = build.weights[0].float()
    program = build.program(spline)
    y, logdet = ops.flow_program(x, program, [weight])
    want, exact = ref.flow_program(x.double(), None, 1, [weight.double()], program.encode())[:2]
    eps, b = 2 * testing.UNIT[torch.float32], torch.tensor(BOUNDS, dtype=torch.float64) if tails else torch.tensor(1.0)
    named = ["circular", "linear", "circular"] if tails == "list" else tails
    at = torch.tensor(COLUMNS)
    place, rise = bins_of(
        x[:, at].double(), weight.double().expand(200, -1, -1), 8, named, variant, inverse, b if tails else 1.0
    )
    s = place.h / place.w
    most, least = torch.maximum(s, torch.maximum(place.d0, place.d1)), torch.minimum(place.d0, place.d1)
    testing.assert_within(y[:, at], want[:, at], 8 * eps * b * (1 + most) / (rise if inverse else 1), "y")
    each = 8 * eps * (1 + b * (1 / place.w + 1 / place.h) * (1 + most / s + s / least))
    error = each.sum(1) + testing.sum_error(3, rise.log().abs().sum(1), torch.float32)
    testing.assert_within(logdet, exact, error, "logdet")
    others = [0, 3]
    assert torch.equal(y[:, others], x[:, others])


@pytest.mark.parametrize("variant, tails", [(v, t) for v in SPLINE_VARIANTS for t in (*TAILS, "list")])
def test_the_inverse_undoes_it(variant, tails):
    build, spline = built(tails, variant, own=True)
    x, weight = drawn_rows(build, 300, torch.float32, tails), build.weights[0].float()
    y, logdet = ops.flow_program(x, build.program(spline), [weight])
    back, undone = ops.flow_program(y, build.program(spline._replace(inverse=True)), [weight])
    named = ["circular", "linear", "circular"] if tails == "list" else tails
    at, b = torch.tensor(COLUMNS), torch.tensor(BOUNDS, dtype=torch.float64)
    wide = [v[:, at].double() for v in (x, back)]
    (place, rise), (_, again) = (
        bins_of(v, weight.double().expand(300, -1, -1), 8, named, variant, False, b) for v in wide
    )
    m, s = torch.minimum(rise, again), place.h / place.w
    bound = 4 * 2 * testing.UNIT[torch.float32] * (b * (1 + 1 / m) + place.w * (place.d0 + place.d1 + s) / m)
    testing.assert_within(back[:, at], wide[0], bound, "x")
    torch.testing.assert_close(undone, -logdet, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_flows(dtype):
    # what normflows builds: a spline of the columns that the net reads, then that of the others
    mild = {"min_bin": 0.05, "min_slope": 0.1}
    for context, inverse in [(0, False), (3, True)]:
        build = Builder(6, context)
        layers = []
        for seen, changed in [((0, 2, 4), (1, 3, 5)), ((5, 1), (0, 2, 3, 4))]:
            own = build.spline(seen, own=True, inverse=inverse, **mild)
            net = build.net(seen, [17, 9, 11 * len(changed)], "silu", context=context > 0)
            layers += [net, build.spline(changed, inverse=inverse, **mild), own]
        scale = Scale((3, 1), build.weight(2), build.weight(2))
        for batch in (1, 32, 70):
            check_built(build, build.program(*layers, scale), batch, dtype)


def test_a_weight_may_serve_several_splines():
    build, spline = built("linear", own=True)
    twice = build.program(spline, spline._replace(columns=(0, 3, 1), inverse=True))
    x, weight = drawn_rows(build, 40, torch.float64, "linear"), build.weights[0]
    apart = build.program(spline, spline._replace(columns=(0, 3, 1), inverse=True, params=1))
    y, logdet, gx, gweight = run(x, twice, [weight])
    want = run(x, apart, [weight, weight])
    for a, b in zip((y, logdet, gx, gweight), (*want[:3], want[3] + want[4]), strict=True):
        torch.testing.assert_close(a, b)


# bits


@bits
@pytest.mark.parametrize("own", [False, True])
def test_a_row_has_its_bits_in_any_batch_and_on_any_threads(own):
    build, spline = built("list", own=own)
    program, weights = (build.program(spline), [build.weights[0].float()]) if own else of_context(spline)
    x = drawn_rows(build, 700, torch.float32, "list")
    context = None if own else build.draw(700, program.context).float()
    gy, gl = cotangents(x, x[:, 0])
    whole = run(x, program, weights, context, (gy, gl))
    for first, last in [(0, 1), (31, 33), (5, 69), (699, 700)]:
        cut = slice(first, last)
        part = run(x[cut], program, weights, None if own else context[cut], (gy[cut], gl[cut]))
        for a, b in zip(part[: 3 + (not own)], whole, strict=False):
            testing.assert_same_bits(a, b[cut], f"rows {first} to {last}")
    for count in (2, 3):
        with testing.threads(count):
            several = run(x, program, weights, context, (gy, gl))
        with testing.threads(1):
            single = run(x, program, weights, context, (gy, gl))
        for a, b in zip(several, single, strict=True):
            testing.assert_same_bits(a, b)


# special values


@pytest.mark.parametrize("variant, tails, inverse", FORMS)
def test_special_values(variant, tails, inverse):
    build, spline = built(tails, variant, inverse, bins=4, bound=2.0, own=True)
    weight = torch.zeros(3, 8 + spline.slopes)  # knots at -2, -1, 0, 1, 2, or quarters of [0, 1]
    special = [math.nan, math.inf, -math.inf, 2.0, -2.0, 1.0, 0.0, -0.0, 0.25, 0.75, 3e38, -3e38, 1e-45]
    special += [math.nextafter(v, w) for v in (2.0, -2.0, 1.0, 0.0) for w in (-9, 9)]
    x = torch.tensor(special)[:, None].expand(-1, 5).contiguous()
    x = torch.cat((x, torch.full((1, 5), 0.3)))
    y, logdet, gx, _ = run(x, build.program(spline), [weight])
    leaf = x.clone().requires_grad_()
    outside = (x > 1) | (x < 0) if tails is None else (x.abs() > 2)
    outside = outside[:, 1]
    with pyflow.backend("reference"):
        want, _ = ops.flow_program(leaf, build.program(spline), [weight])
    at = list(COLUMNS)
    if tails is None:
        assert y[outside][:, at].isnan().all() and logdet[outside].isnan().all()
    else:
        same(y[outside], x[outside])
        assert (logdet[outside] == 0).all()
        same(gx[outside], cotangents(y, logdet)[0][outside])
    assert y[0, at].isnan().all()
    inside = ~outside & ~x[:, 1].isnan()
    torch.testing.assert_close(y[inside], want.detach()[inside])
    assert y[inside].isfinite().all() and logdet[inside].isfinite().all()
    assert torch.equal(y[:, 0].nan_to_num(), x[:, 0].nan_to_num())
    # a row that is outside adds nothing to the gradient of the weight, whatever its gradients are
    if tails is not None:
        zero = run(x[outside], build.program(spline), [weight], None, [torch.ones_like(x[outside]), logdet[outside]])
        assert (zero[3] == 0).all()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("variant", SPLINE_VARIANTS)
@pytest.mark.parametrize("value", [1e30, -1e30, 3e38, 80.0, -80.0])
def test_huge_numbers(value, variant, inverse):
    build, spline = built("linear", variant, inverse, bins=5, bound=1.0, own=True)
    for place in (0, 4, 5, 9, 11):
        weight = build.weights[0].float().clone()
        weight[:, place] = value
        x = drawn_rows(build, 33, torch.float32, "linear")
        y, logdet, *_ = run(x, build.program(spline), [weight])
        want = operator(spline, x, weight.expand(33, -1, -1))
        same(y, want[0])
        if value < 1e4 or place < 10:
            assert y.isfinite().all() and logdet.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_numbers_stay_in_their_column_and_row(value):
    build, spline = built("linear", bins=5, bound=1.0, own=True)
    weight = build.weights[0].float().clone()
    weight[1, 3] = value
    x = drawn_rows(build, 33, torch.float32, "linear")
    x[0] = 5.0
    y, logdet, *_ = run(x, build.program(spline), [weight])
    column = COLUMNS[1]
    inside = x[:, column].abs() <= 1
    assert y[inside, column].isnan().all() and logdet[inside].isnan().all()
    assert torch.equal(y[~inside, column], x[~inside, column]) and logdet[0] == 0
    assert y[:, [0, 2, 3, 4]].isfinite().all()


# gradients of gradients, and torch's own checks


def small(own, variant="nflows", tails="list", inverse=False):
    build, spline = built(tails, variant, inverse, bins=3, bound=(3.0, 2.5, 2.0), own=own)
    program, weights = (build.program(spline), build.weights) if own else of_context(spline, torch.float64)
    x = drawn_rows(build, 3, torch.float64, tails) / 2 + 0.1
    return x, program, weights, None if own else build.draw(3, program.context)


@pytest.mark.parametrize("own, variant, inverse", [(True, "zuko", False), (False, "nflows", True)])
def test_gradients_of_gradients(own, variant, inverse):
    x, program, weights, context = small(own, variant, inverse=inverse)
    leaves = [v.clone().requires_grad_() for v in ((x, weights[0]) if own else (x, context))]

    def call(x, other):
        return ops.flow_program(x, program, [other]) if own else ops.flow_program(x, program, weights, other)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_opcheck():
    x, program, weights, context = small(False)
    given = [v.float().requires_grad_() for v in (x, context)]
    args = (given[0], given[1], 1, [w.float().requires_grad_() for w in weights], program.encode(), 0)
    torch.library.opcheck(torch.ops.pyflow.flow_program.default, args)


# bad input

X = torch.ones(4, 3)
W = [torch.ones(2, 11), torch.ones(11), torch.ones(11, 1), torch.ones(2, 2)]
PLAIN = Spline((0, 2), 4, 3, (0,), 0, (3.0,), params=0)
NET = Net((1,), False, (Dense(2, -1, 11),))


def of(*instructions):
    return X, Program(3, 0, (0, 1, 2), instructions), W


BAD = [
    (of(PLAIN._replace(tails=(), slopes=5, zero_outside=True)), "instruction 0, Spline: zero_outside must be false without tails, got True"),
    (of(PLAIN._replace(zero_outside=0.5)), "instruction 0, Spline: zero_outside must be true or false, got 0.5"),
    (of(PLAIN._replace(columns=())), r"instruction 0, Spline: columns must be at least one, got \(\)"),
    (of(PLAIN._replace(columns=(0, 0))), r"instruction 0, Spline: columns must differ, got \(0, 0\)"),
    (of(PLAIN._replace(columns=(0, 3))), r"instruction 0, Spline: columns must be 0 to 2, got \(0, 3\)"),
    (of(PLAIN._replace(bins=1)), "instruction 0, Spline: bins must be an integer, 2 to 32, got 1"),
    (of(PLAIN._replace(bins=33)), "instruction 0, Spline: bins must be an integer, 2 to 32, got 33"),
    (of(PLAIN._replace(bins=4.0)), "instruction 0, Spline: bins must be an integer, 2 to 32, got 4.0"),
    (of(PLAIN._replace(slopes=4)), "instruction 0, Spline: slopes must be 3 or 5 with these bins and tails, got 4"),
    (of(PLAIN._replace(tails=(1,))), "instruction 0, Spline: slopes must be 4 or 5 with these bins and tails, got 3"),
    (of(PLAIN._replace(tails=())), "instruction 0, Spline: slopes must be 5 with these bins and tails, got 3"),
    (of(PLAIN._replace(tails=(0, 1))), "instruction 0, Spline: slopes must be 5 with these bins and tails, got 3"),
    (of(PLAIN._replace(tails=(0, 0, 0))), r"instruction 0, Spline: tails must be a tuple of none, one or one per column, got \(0, 0, 0\)"),
    (of(PLAIN._replace(tails=0)), "instruction 0, Spline: tails must be a tuple of none, one or one per column, got 0"),
    (of(PLAIN._replace(tails=(2,))), "instruction 0, Spline: tails must be 0 to 1, got 2"),
    (of(PLAIN._replace(variant=3)), "instruction 0, Spline: variant must be 0 to 2, got 3"),
    (of(PLAIN._replace(bound=())), r"instruction 0, Spline: bound must be a tuple of one or one per column, got \(\)"),
    (of(PLAIN._replace(bound=3.0)), "instruction 0, Spline: bound must be a tuple of one or one per column, got 3.0"),
    (of(PLAIN._replace(bound=(1.0, -1.0))), "instruction 0, Spline: bound must be positive and finite, got -1.0"),
    (of(PLAIN._replace(bound=("3",))), "instruction 0, Spline: bound must be a number, got str"),
    (of(PLAIN._replace(bound=(1e30,))), r"instruction 0, Spline: bound must be from 9.09e-13 to 1.1e\+12 in float32, got 1e\+30"),
    (of(PLAIN._replace(param_scale=0.0)), "instruction 0, Spline: param_scale must be positive and finite, got 0.0"),
    (of(PLAIN._replace(min_bin=0.25)), "instruction 0, Spline: min_bin must be at least 0 and less than 1 / bins, 0.25, got 0.25"),
    (of(PLAIN._replace(min_slope=2)), r"instruction 0, Spline: min_slope must be in \[0, 1\], got 2.0"),
    (of(PLAIN._replace(variant=2, min_slope=1)), r"instruction 0, Spline: min_slope must be in \(0, 1\) for zuko, got 1.0"),
    (of(PLAIN._replace(inverse=None)), "instruction 0, Spline: inverse must be true or false, got None"),
    (of(PLAIN._replace(params=1)), r"instruction 0, Spline: params must have the shape \(2, 11\), got \(11,\)"),
    (of(PLAIN._replace(params=4)), "instruction 0, Spline: params must be the place of one of 4 weights, got 4"),
    (of(PLAIN._replace(params=-1)), "instruction 0, Spline: the conditioner before it must return 22 numbers, got 0"),
    (of(NET, PLAIN._replace(params=-1)), "instruction 1, Spline: the conditioner before it must return 22 numbers, got 11"),
    (of(NET, PLAIN), "instruction 1, Spline: a transform must take what the last conditioner returns"),
    (of(PLAIN._replace(columns=(0,), params=-1), NET), "instruction 0, Spline: the conditioner before it must return 11 numbers, got 0"),
    (of(Net((0, 1), False, (Dense(3, -1, 2),)), Additive((0, 1)), PLAIN._replace(bins=2, slopes=1), PLAIN), r"instruction 2, Spline: params must have the shape \(2, 5\), got \(2, 11\)"),
    (of(Net((0,) * 11, False, (Dense(0, -1, 2),)), Additive((0, 1)), PLAIN), "instruction 2, Spline: the params of a spline must be no other weight, got 0"),
]  # fmt: skip


@pytest.mark.parametrize("call, text", BAD)
def test_bad_input_gets_one_sentence(call, text):
    with pytest.raises(ValueError, match=f"^flow_program: {text}$"):
        ops.flow_program(*call)


TEXTS = {
    "no bins": PLAIN._replace(bins=0), "many bins": PLAIN._replace(bins=33, slopes=32), "slopes": PLAIN._replace(slopes=9),
    "tails": PLAIN._replace(tails=(7,)), "three tails": PLAIN._replace(tails=(0, 1, 0)), "no tails": PLAIN._replace(tails=()),
    "variant": PLAIN._replace(variant=3), "bounds": PLAIN._replace(bound=(1.0,) * 3), "no bound": PLAIN._replace(bound=()),
    "place": PLAIN._replace(params=9), "shape": PLAIN._replace(params=1), "columns": PLAIN._replace(columns=(0,)),
    "no columns": PLAIN._replace(columns=()), "no conditioner": PLAIN._replace(params=-1),
}  # fmt: skip


@bits
@pytest.mark.parametrize("spline", TEXTS.values(), ids=TEXTS.keys())
def test_operators_refuse_what_kernels_do_not_take(spline):
    text = of(spline)[1].encode()
    calls = [
        lambda: torch.ops.pyflow.flow_program(X, None, 1, W, text, 0),
        lambda: torch.ops.pyflow.flow_program_backward(None, X[:, 0], X, None, 1, W, text, None, True, False, True),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="flow_program"):
            call()
