"""Programs of flows under the interpreter, against their reference in float64; see tests/ops/test_flow_program.py."""

from __future__ import annotations

import random

import pytest
import torch

import pyflow
from pyflow import ops, testing
from pyflow._schemas import PRIORS, SCALE_MAPS, SPLINE_VARIANTS, TAILS
from pyflow.program import (
    ACTIVATIONS,
    PACKINGS,
    Activation,
    Additive,
    Context,
    Elementwise,
    Linear,
    Multiplicative,
    Net,
    Norm,
    Periodic,
    Prior,
    Program,
    Residual,
    Scale,
    Uniform,
    Wrap,
)
from pyflow.reference import flow_program as ref
from pyflow.triton_kernels import flow_program as launcher

from ...ops.programs import Builder, drawn
from ...ops.test_flow_program import check, check_built, rows, run
from ...ops.test_flow_program_autoregressive import check as check_autoregressive
from ...ops.test_flow_program_uniform import around
from ...ops.test_flow_program_wrap import edges

DTYPES = [torch.float32, torch.float64]
FORMS = [(first, inverse) for first in (False, True) for inverse in (False, True)]
# narrow bins and steep slopes lose digits
MILD = {"param_scale": 0.3, "min_bin": 0.05, "min_slope": 0.1}


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_linear_maps_and_priors(dtype):
    build = Builder(5)
    scales = [Scale((3, 0, 2), build.weight(3), build.weight(3), *form) for form in FORMS]
    scales += [Scale((1, 2), build.weight(2), -1), Scale((0, 4), -1, build.weight(2)), Scale((1,), -1, -1)]
    linear = Linear((4, 1, 0), build.matrix(3), build.weight(3), build.weight())
    priors = [Prior((3, 1), prior) for prior in range(len(PRIORS))]
    check_built(build, build.program(*scales, linear, *priors, Linear((2, 0), build.matrix(2))), 35, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_activation(dtype):
    build = Builder(4)
    # 70 units are more than a product computes at once
    layers = [build.dense(2, 70, "relu"), *(build.dense(size, 6, name, arg=0.2) for size, name in zip([70] + [6] * 8, ACTIVATIONS, strict=True))]  # fmt: skip
    net = Net((0, 2), False, (*layers, build.dense(6, 2)))
    program = build.program(net, Additive((1, 3)), build.net((1, 3), [2]), Multiplicative((0, 2), inverse=True))
    check_built(build, program, 7, dtype)


@pytest.mark.parametrize("number", range(len(PACKINGS)))
def test_affine_maps(number):
    build = Builder(4)
    instructions = []
    for i, name in enumerate((*SCALE_MAPS, "sigmoid", "softplus")):
        first, inverse = FORMS[(i + number) % 4]
        affine = build.affine((3, 1), name, PACKINGS[number], shift_first=first, inverse=inverse)
        # twice, then with eps
        affine = affine._replace(map_arg=0.1) if i >= len(SCALE_MAPS) else affine
        instructions += [build.net((0, 2), [4]), affine]
    check_built(build, build.program(*instructions, outputs=(3, 3, 0)), 5, DTYPES[number % 2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_nets(dtype):
    build = Builder(4, 3)
    gelu = ACTIVATIONS.index("gelu")
    parts = (
        Periodic((2, 0), *(build.weight(2) for _ in range(4))), build.dense(7, 9, "tanh"),
        Residual((Activation(gelu), build.dense(9, 9, "silu"), Context(build.dense(3, 9, "sigmoid"), True),
                  Residual((build.dense(9, 9),)))),
        Norm(build.weight(9), build.weight(9), 1e-3, True), Context(build.dense(3, 9, "elu")), Norm(-1, -1, 1e-2),
        Context(build.dense(3, 9)), Elementwise(build.weight(9), build.weight(9)), Elementwise(-1, build.weight(9)),
        build.masked(torch.tril(torch.ones(4, 9)), "tanh"), Periodic((1,), *(build.weight(1) for _ in range(3))),
    )  # fmt: skip
    program = build.program(Net((0, 2, 0, 3), True, parts), build.affine((1, 3)), Prior((0, 1, 2, 3)))
    constants = build.constants | {parts[0].scale, parts[-1].scale}
    got = check_built(build, program, 5, dtype)
    assert all((got[4 + place] == 0).all() for place in constants)


@pytest.mark.parametrize("variant", SPLINE_VARIANTS)
@pytest.mark.parametrize("number, tails", enumerate((*TAILS, ("linear", "circular"), None)))
def test_splines(number, tails, variant):
    build, dtype = Builder(5), DTYPES[(number + SPLINE_VARIANTS.index(variant)) % 2]
    # the domain without tails
    inside = [Scale((0, 1, 2, 3, 4), build.weight(5, spread=0.01), -1)] if tails is None else []
    options = {"bins": 3 + number, "bound": [2.0, 1.5] if number % 2 else 2.5, **MILD}
    own = build.spline((3, 1), tails, variant, own=True, inverse=number % 2 == 1, **options)
    spline = build.spline((4, 0), tails, variant, inverse=number % 2 == 0, **options)
    spline = spline._replace(zero_outside=number == 2)
    net = build.net((1, 2), [6, 2 * (2 * spline.bins + spline.slopes)])
    x, _ = rows(build, 9, dtype)
    x = torch.sigmoid(x) if tails is None else 1.5 * x
    check(x, build.program(*inside, own, net, spline), [w.to(dtype) for w in build.weights])


def test_outside_of_a_domain_without_tails_is_nan():
    build = Builder(2)
    program = build.program(build.spline((0,), None, own=True))
    y, logdet, grad, table = run(torch.tensor([[1.5, 2.0], [0.5, 3.0]]), program, [build.weights[0].float()])
    assert y.isnan().tolist() == [[True, False], [False, False]] and logdet.isnan().tolist() == [True, False]
    assert grad.isnan().tolist() == [[True, False], [False, False]] and table.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_wraps(dtype):
    build = Builder(5)
    wraps = Wrap((4, 0), (3.0, 0.4), (0.1, -2.0)), Wrap((0, 2), (0.5,), (0.2,), True), Wrap((), (1.0,))
    x = torch.cat((3 * rows(build, 40, dtype)[0], edges(dtype, 3.0)[:95, None].expand(-1, 5)))
    y, _ = ops.flow_program(x, build.program(*wraps), [])
    # the interpreter's fma of float64 rounds twice
    if dtype == torch.float32:
        with pyflow.backend("reference"):
            testing.assert_same_bits(y, ops.flow_program(x, build.program(*wraps), [])[0])
    turned = {"own": True, "turned": True, "bound": [3.0, 2.0], **MILD}
    splines = [build.spline((3, 1), "linear", "zuko", inverse=inverse, **turned) for inverse in (False, True)]
    masked = build.spline((4, 1, 0), "linear", "zuko", turned=True, **MILD)
    undone = build.undo(*build.made((4, 1, 0), (5,), masked))
    check_autoregressive(build, build.program(*wraps, *splines, undone), 9, dtype, 1e-4)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_boxes(dtype, closed):
    build = Builder(9)
    ends = (-1.0, -2.0, 0.0, *[-3.0] * 6), (0.5,)
    box = Uniform(tuple(range(8, -1, -1)), *ends, closed)
    # every row has one column that may be outside
    x = torch.zeros(0, 9, dtype=dtype)
    for column, low in enumerate(reversed(ends[0])):
        some = torch.zeros(14, 9, dtype=dtype)
        some[:, column] = around(dtype, low, 0.5)
        x = torch.cat((x, some))
    more = Uniform((), (0.0,), (1.0,)), Prior((3,)), build.net((0,), [3, 2]), build.affine((4,))
    program = build.program(box, *more)
    weights = [w.to(dtype) for w in build.weights]
    nats = ops.flow_program(x, program, weights)[1]
    with pyflow.backend("reference"):
        want = ops.flow_program(x, program, weights)[1]
    # NaN is that of the other instructions
    assert nats.isneginf().equal(want.isneginf()) and nats.isnan().equal(want.isnan())
    finite = want.isfinite()
    testing.assert_within(nats[finite], want[finite], 1e-5)
    assert 14 < finite.sum() < len(x)
    check_built(build, build.program(box._replace(low=(-50.0,), high=(50.0,)), *more), 9, dtype)


@pytest.mark.parametrize("number, context", enumerate(["", "inputs", "add", "gate"]))
def test_autoregressive_inverses(number, context):
    build = Builder(5, 2 if context else 0)
    columns, options = (4, 1, 0), {"kept": [3], "context": context, "activation": "tanh"}
    if number % 2:
        spline = build.spline(columns, bins=4, **MILD)
        pair = build.made(columns, (5, 3), spline, residual=True, **options)
    else:
        affine = build.affine(columns, "softsign", "scale_shift")
        pair = build.made(columns, (9, 6), affine, order=[1, 0, 1], periodic=[0, 3], **options)
    check_autoregressive(build, build.program(build.undo(*pair)), 5, DTYPES[number // 2], 1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_drawn_programs(seed):
    choices = random.Random(seed)
    one = lambda *several: choices.choice(several)
    build = Builder(one(1, 2, 3, 5, 8), one(0, 0, 3), seed)
    # an autoregressive inverse passes on errors, see its tests in tests/ops
    while True:
        program = drawn(one, build, one(1, 2, 3))
        if not any(type(i).__name__ == "Autoregressive" for i in program.instructions):
            break
        build.weights.clear()
    check_built(build, program, one(1, 5, 33), DTYPES[seed % 2])


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, True, True)]
)
def test_only_what_needs_a_gradient_gets_one(needs):
    build = Builder(4, 2)
    program = build.real_nvp((5,), 2)
    x, context = rows(build, 33)
    weights = [w.float() for w in build.weights]
    for grads in [
        (torch.ones(33, 4), torch.ones(33)),
        (None, torch.ones(())[None].expand(33)),
        (torch.ones(4, 33).mT, None),
    ]:
        got = torch.ops.pyflow.flow_program_backward(*grads, x, context, 1, weights, program.encode(), None, *needs)
        want = ref.flow_program_backward(*grads, x, context, 1, weights, program.encode(), None, *needs)
        for a, b in zip(got, want, strict=True):
            if b is None:
                assert a.numel() == 0
            else:
                testing.assert_within(a, b.double(), 1e-4 * (1 + b.abs().max()))


@pytest.mark.parametrize("repeats", [1, 3])
def test_rows_share_a_row_of_the_context(repeats):
    build = Builder(3, 2)
    program = build.program(build.net((0,), [4, 2], context=True), build.affine((2,)))
    x, context = rows(build, 12)
    weights = [w.float() for w in build.weights]
    leaves = [v.requires_grad_() for v in (x, context[:2].clone())]
    y, logdet = ops.flow_program(leaves[0], program, weights, leaves[1], repeats)
    got = torch.autograd.grad(y.square().sum() + logdet.sum(), leaves)
    spread = ref.of_rows(leaves[1], 12, repeats)
    y, logdet = ops.flow_program(leaves[0], program, weights, spread)
    want = torch.autograd.grad(y.square().sum() + logdet.sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_views_and_sizes():
    build = Builder(3)
    program = build.program(build.net((0,), [2]), build.affine((2,)), Linear((0, 1, 2), build.matrix(3)))
    weights = [w.float().repeat_interleave(2, -1)[..., ::2] for w in build.weights]
    x = rows(build, 66)[0].repeat(1, 2)[::2, 1:4]
    y, logdet = ops.flow_program(x, program, weights)
    want = ops.flow_program(x.contiguous(), program, [w.contiguous() for w in weights])
    testing.assert_same_bits(y, want[0])
    # neither the batch nor the number of programs
    testing.assert_same_bits(ops.flow_program(x[3:9], program, weights)[0], y[3:9])
    testing.assert_same_bits(ops.flow_program(x[3:9], program, weights)[1], logdet[3:9])
    for batch in (0, 1, 33):
        check_built(build, program, batch)
    y, logdet = ops.flow_program(torch.ones(3, 0), Program(0, 0, (), ()), [])
    assert y.shape == (3, 0) and torch.equal(logdet, torch.zeros(3))
    few = Builder(3, 2)
    check_built(few, few.program(few.net((), [5, 2]), Additive((0, 1)), few.net((), [2], context=True), few.affine((2,)), outputs=()), 3)  # fmt: skip


def test_a_program_that_is_too_large_runs_the_reference(monkeypatch):
    build = Builder(3)
    program = build.program(build.net((0, 2), [7, 1]), Additive((1,)))
    want = check_built(build, program)
    monkeypatch.setattr(launcher, "MOST_WORDS", 10)
    launcher._call.cache_clear()
    got = check_built(build, program)
    launcher._call.cache_clear()
    assert [v.shape for v in got] == [v.shape for v in want]


def test_programs_share_the_tiles(monkeypatch):
    build = Builder(3)
    program = build.program(build.net((0, 2), [7, 2]), build.affine((1,)))
    monkeypatch.setattr(launcher, "MOST_PROGRAMS", 2)
    check_built(build, program, 150)


def test_a_row_that_is_not_finite_stays_alone():
    build = Builder(3)
    program = build.program(build.net((0, 2), [7, 2]), build.affine((1,)))
    x, _ = rows(build, 20)
    weights = [w.float() for w in build.weights]
    with pyflow.backend("triton"):
        clean = ops.flow_program(x, program, weights)
        x[7, 0] = float("nan")
        for a, b in zip(clean, ops.flow_program(x, program, weights), strict=True):
            keep = torch.arange(20) != 7
            assert torch.equal(a[keep], b[keep]) and b[7].isnan().any()
