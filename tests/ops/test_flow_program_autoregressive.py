"""Autoregressive inverses in programs of flows: they undo the forward, with the reference's gradients, bit by bit."""

from __future__ import annotations

import hashlib
import itertools
import math

import pytest
import torch

import pyflow
from pyflow import ops, testing
from pyflow._schemas import SPLINE_VARIANTS
from pyflow.flows import _schedule
from pyflow.program import (
    ACTIVATIONS,
    Activation,
    Affine,
    Autoregressive,
    Context,
    Dense,
    Elementwise,
    Linear,
    Net,
    Norm,
    Prior,
    Program,
    Residual,
    Scale,
    Spline,
)
from pyflow.reference import flow_program as ref

from .programs import Builder
from .test_flow_program import bits, cotangents, exact, rows, run, same

DTYPES = [torch.float32, torch.float64]
COLUMNS = (4, 1, 0, 6, 3)
ORDERS = {"ascending": None, "permuted": [3, 1, 2, 0, 4], "equal": [0, 0, 1, 1, 0], "one": [0] * 5}
CONTEXTS = ["", "inputs", "add", "gate"]


def made(context="", order=None, residual=False, packing="interleaved", activation="relu", hidden=(16, 9), **options):
    """A forward and its inverse, of some of seven columns in no order that the net reads with one more."""
    build = Builder(7, 3 if context else 0)
    transform = build.affine(COLUMNS, "softsign", packing, **options)
    pair = build.made(
        COLUMNS, hidden, transform, order=order, kept=[5], residual=residual, context=context, activation=activation
    )
    return build, build.program(*pair), build.program(build.undo(*pair))


def magnitude(parts, m, context, weights):
    """What the numbers of a net are sums of, and how many of these sums there are, for activations of slope up to 1."""
    steps = 0.0
    entry = lambda place: 0.0 if place < 0 else weights[place].abs()
    for part in parts:
        if isinstance(part, Dense):
            weight = weights[part.weight] if part.mask < 0 else weights[part.weight] * weights[part.mask]
            steps += weight.shape[1] + 4
            m = m @ weight.abs().T + entry(part.bias)
        elif isinstance(part, Residual):
            more, count = magnitude(part.parts, m, context, weights)
            m, steps = m + more, steps + count + 1
        elif isinstance(part, Context):
            more, count = magnitude([part.dense], context, context, weights)
            m, steps = m * more if part.gate else m + more, steps + count + 1
        elif isinstance(part, Elementwise):
            m, steps = m * (1.0 if part.factor < 0 else entry(part.factor)) + entry(part.shift), steps + 2
    return m, steps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("order", ORDERS)
def test_the_forward_of_the_inverse_is_its_input(order, context, residual, dtype):
    build, forward, inverse = made(context, ORDERS[order], residual)
    weights = [w.to(dtype) for w in build.weights]
    y, given = rows(build, 70, dtype)
    x, logdet = ops.flow_program(y, inverse, weights, given)
    wide = [w.double() for w in weights]
    more = None if given is None else given.double()
    with pyflow.backend("reference"):
        again, there = ops.flow_program(x.double(), forward, wide, more)
    net = forward.instructions[0]
    inputs = x.double().abs()[:, net.columns]
    inputs = torch.cat((inputs, more.abs()), 1) if net.context else inputs
    sums, steps = magnitude(net.parts, inputs, None if more is None else more.abs(), wide)
    # the numbers are those of x to the rounding of their sums, so that only they and one step differ
    error = (steps * testing.UNIT[dtype] * sums).amax(1, keepdim=True)
    error = (error + 8 * testing.UNIT[dtype]) * (2 + 2 * y.double().abs() + sums.amax(1, keepdim=True))
    testing.assert_within(again.to(y), y, error[:, :1], "y")
    testing.assert_within(logdet.double(), -there, len(COLUMNS) * error[:, 0], "logdet")
    # columns that the transform does not name
    same(x[:, [2, 5]], y[:, [2, 5]])


def check(build, program, batch=37, dtype=torch.float32, within=2e-5):
    """All results against those in float64: the steps on the way, a hundred or so, pass on errors that grow little."""
    x, context = rows(build, batch, dtype)
    context, weights = context if program.context else None, [w.to(dtype) for w in build.weights]
    unit = within * testing.UNIT[dtype] / testing.UNIT[torch.float32]
    got, want = run(x, program, weights, context), exact(x, program, weights, context)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == dtype
        testing.assert_within(a, b, unit * (1 + b.abs().max()) if b.numel() else 0.0, f"result {i}")
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("order", ORDERS)
def test_gradients(order, context, residual, dtype):
    # by autograd through a pass of the whole net for each generation
    for packing, activation in [("interleaved", "silu"), ("shift_scale", "tanh"), ("scale_shift", "elu")]:
        build, _, inverse = made(context, ORDERS[order], residual, packing, activation)
        check(build, inverse, dtype=dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    for residual in (False, True):
        check(*made("add", None, residual, activation=activation)[::2])


@pytest.mark.parametrize("scale_map", ["exp", "sigmoid", "softplus", "tanh", "atan", "softplus_clamp"])
def test_scale_maps(scale_map):
    for first, forward in itertools.product((False, True), repeat=2):
        build = Builder(4)
        pair = build.made((2, 0, 3), [12, 9], build.affine((2, 0, 3), scale_map, shift_first=first, inverse=forward))
        check(build, build.program(build.undo(*pair)), within=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", SPLINE_VARIANTS)
@pytest.mark.parametrize("tails", ["linear", "circular", ("circular", "linear", "linear", "circular", "linear")])
def test_splines(tails, variant, dtype):
    mild = {"bins": 5, "bound": 2.5 if isinstance(tails, str) else [2.5, 2.0, 3.0, 1.5, 2.5]}
    mild |= {"param_scale": 0.3, "min_bin": 0.05, "min_slope": 0.1}
    for order, residual in itertools.product(ORDERS.values(), (False, True)):
        build = Builder(7, 3)
        spline = build.spline(COLUMNS, tails, variant, inverse=residual, **mild)
        pair = build.made(
            COLUMNS, (16, 9), spline, order=order, kept=[5], residual=residual, context="gate", activation="silu"
        )
        forward, inverse = build.program(*pair), build.program(build.undo(*pair))
        check(build, inverse, dtype=dtype, within=1e-4)
        (y, context), weights = rows(build, 37, dtype), [w.to(dtype) for w in build.weights]
        x, _ = ops.flow_program(y, inverse, weights, context)
        again, _ = ops.flow_program(x, forward, weights, context)
        testing.assert_within(again, y.double(), 400 * testing.UNIT[dtype] * (1 + y.abs().max()), "y")


@pytest.mark.parametrize("dtype", DTYPES)
def test_periodic_inputs(dtype):
    for order, context in itertools.product(ORDERS.values(), ("", "inputs")):
        build = Builder(7, 2)
        transform = build.affine(COLUMNS, "tanh")
        options = {"order": order, "context": context, "kept": [5, 2], "residual": context == ""}
        net, _ = build.made(COLUMNS, (9, 6), transform, periodic=[6, 0, 3, 1], activation="silu", **options)
        check(build, build.program(build.undo(net, transform)), dtype=dtype, within=1e-4)


@pytest.mark.parametrize("count, hidden", [(1, (4,)), (1, ()), (2, (1, 1)), (3, ()), (17, (5,)), (33, (64, 40)), (9, (130, 8, 33))])  # fmt: skip
def test_widths(count, hidden):
    build = Builder(count, 2)
    order = torch.randperm(count, generator=build.source).tolist()
    columns = tuple(torch.randperm(count, generator=build.source).tolist())
    pair = build.made(columns, hidden, build.affine(columns, "softsign"), order=order, context="inputs")
    for batch in (1, 33, 130):
        check(build, build.program(build.undo(*pair)), batch)


def test_a_net_that_begins_with_a_context():
    # each column by itself
    for columns in (2, 5):
        build = Builder(columns, 3, seed=5)
        net, transform = build.made(range(columns), [9], build.affine((*range(columns),)))
        net = net._replace(parts=(Context(build.dense(3, columns, "tanh"), gate=True), *net.parts))
        check(build, build.program(build.undo(net, transform)), 50, torch.float64)


def test_with_other_instructions():
    build = Builder(6, 2)
    all_six = (5, 3, 1, 0, 2, 4)
    net, shift = build.net((0, 1), [8, 8], "silu", context=True), build.affine((2, 3, 4, 5), "tanh")
    blocks = [build.made(all_six, [13], build.affine(all_six, "softsign"), context="gate", residual=True) for _ in "ab"]
    few = build.made((2, 4), [7, 7], build.affine((2, 4), "exp", shift_first=True), kept=[3, 0], activation="tanh")
    for outer in (False, True):
        # one between a conditioner and its transform
        program = build.program(
            Scale(all_six, build.weight(6), build.weight(6)), build.undo(*blocks[0]), net, build.undo(*few),
            *[shift] * outer, *[] if outer else [shift], build.undo(*blocks[1]), Prior((0, 5)), outputs=(3, 3, 0),
        )  # fmt: skip
        for batch in (1, 200):
            check(build, program, batch, torch.float64, 1e-3)


def test_the_work_is_that_of_half_a_pass():
    """nflows' MADE of 8 features, 64 units and two blocks: 5,453 of the 9,728 products of a pass."""
    build, degrees = Builder(8), torch.arange(64) % 7 + 1
    features = torch.arange(1, 9)
    numbers = features.repeat_interleave(2) - 1
    masks = [degrees[:, None] >= features, *[degrees[:, None] >= degrees] * 2, numbers[:, None] >= degrees]
    net = Net(tuple(range(8)), False, tuple(build.masked(mask, "relu") for mask in masks))
    undo = build.undo(net, build.affine(range(8), packing="interleaved"))
    assert undo.generations == tuple(range(1, 9)) and undo.levels == (tuple(degrees.tolist()),) * 3
    levels = [features, *map(torch.tensor, undo.levels), numbers]
    assert sum(int((out[:, None] >= inner).sum()) for inner, out in itertools.pairwise(levels)) == 5453
    assert sum(mask.numel() for mask in masks) == 9728


@pytest.mark.parametrize("rule", ["cycle", "later", "norm"])
def test_masks_without_an_inverse(rule):
    build = Builder(2)
    layer = build.masked(
        torch.tensor([[0, 1], [1, 0], [1, 0], [1, 0]] if rule == "cycle" else [[0, 0], [0, 0], [1, 0], [1, 0]])
    )
    parts = [layer] if rule != "norm" else [Norm(-1, -1, 1e-5), layer]
    parts = [Residual((build.masked(torch.ones(2, 2)),)), layer] if rule == "later" else parts
    found = _schedule.autoregressive(
        Net((0, 1), False, tuple(parts)),
        build.affine((0, 1), packing="interleaved"),
        0,
        lambda d: build.weights[d.mask],
    )
    assert found is None


def test_levels_of_residual_nets_are_raised_where_sums_need_it():
    # a unit of the stream that sees nothing gets what sees the second column
    build = Builder(3)
    first = build.masked(torch.tensor([[1, 0, 0], [0, 0, 0]]))
    block = Residual((build.masked(torch.tensor([[1, 0], [0, 1]])), build.masked(torch.tensor([[1, 0], [1, 1]]))))
    last = build.masked(torch.tensor([[0, 0]] * 2 + [[1, 0]] * 2 + [[1, 1]] * 2))
    undo = build.undo(Net((0, 1, 2), False, (first, block, last)), build.affine((0, 1, 2), packing="interleaved"))
    assert undo.generations == (1, 2, 2) and undo.levels == ((1, 1), (1, 1), (1, 1))
    check(build, build.program(undo))


def test_special_values_reach_later_generations_alone():
    build, _, inverse = made(residual=True)
    y, _ = rows(build, 40)
    plain, logdet = ops.flow_program(y, inverse, weights := [w.float() for w in build.weights])
    for value in (math.nan, math.inf, -math.inf):
        bad = y.clone()
        bad[33, COLUMNS[2]] = value
        got, total = ops.flow_program(bad, inverse, weights)
        others = torch.arange(40) != 33
        same(got[others], plain[others])
        same(total[others], logdet[others])
        same(got[33, list(COLUMNS[:2])], plain[33, list(COLUMNS[:2])])
        assert not got[33, list(COLUMNS[2:])].isfinite().any()


# bits


@bits
@pytest.mark.parametrize("context, residual", [("", False), ("gate", True), ("inputs", False)])
def test_bits(context, residual):
    build, _, inverse = made(context, None, residual, activation="gelu", hidden=(33, 20))
    weights = [w.float() for w in build.weights]
    x, given = rows(build, 200)
    with testing.threads(1):
        whole = run(x, inverse, weights, given)
    with testing.threads(3):
        for a, b in zip(run(x, inverse, weights, given), whole, strict=True):
            testing.assert_same_bits(a, b)
    grads = [g.to(x) for g in cotangents(*whole[:2])]
    for some in (slice(0, 1), slice(31, 64), slice(199, 200), slice(3, 150)):
        part = run(x[some], inverse, weights, None if given is None else given[some], [g[some] for g in grads])
        for a, b in zip(part[:3], whole[:3], strict=True):
            testing.assert_same_bits(a, b[some])


def digest() -> str:
    """Hashes of forwards and of gradients in float32; run in a process per instruction set."""
    hashes = hashlib.sha256(), hashlib.sha256()
    for context, residual, batch in itertools.product(CONTEXTS, (False, True), (1, 70)):
        build, _, inverse = made(context, None, residual, activation="silu")
        if residual:
            spline = build.spline(COLUMNS, "circular", inverse=True)
            inverse = build.program(build.undo(*build.made(COLUMNS, (16,), spline, kept=[2], context=context)))
        x, given = rows(build, batch)
        for i, v in enumerate(run(x, inverse, [w.float() for w in build.weights], given)):
            hashes[i > 1].update(v.numpy().tobytes())
    return ":".join(h.hexdigest() for h in hashes)


@bits
def test_instruction_sets_give_the_same_bits(every_instruction_set):
    forward, backward = (set(each) for each in zip(*(v.split(":") for v in every_instruction_set), strict=True))
    assert len(forward) == 1
    assert len(backward) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_output_element_is_written(dtype):
    build, _, inverse = made("add", None, True)
    for batch in (0, 1, 65):
        x, context = rows(build, batch, dtype)
        with testing.poisoned():
            assert not any(v.isnan().any() for v in run(x, inverse, [w.to(dtype) for w in build.weights], context))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradcheck_twice(backend):
    build = Builder(3, 1)
    pair = build.made((2, 0), [3], build.affine((2, 0)), kept=[1], residual=True, context="gate", activation="tanh")
    program = build.program(build.undo(*pair))
    masks = {dense.mask for dense in layers(pair[0].parts)}
    x, context = rows(build, 2, torch.float64)
    leaves = [v.requires_grad_(i - 2 not in masks) for i, v in enumerate((x, context, *build.weights))]
    f = lambda x, context, *weights: ops.flow_program(x, program, weights, context)
    with pyflow.backend(backend):
        assert torch.autograd.gradcheck(f, leaves)
        assert torch.autograd.gradgradcheck(f, leaves)


def layers(parts):
    for part in parts:
        if isinstance(part, Dense):
            yield part
        elif isinstance(part, Residual):
            yield from layers(part.parts)


def test_reference_backward_is_the_derivative():
    build, _, inverse = made("gate", ORDERS["equal"], True, activation="silu")
    x, context = rows(build, 6, torch.float64)
    given = cotangents(*ref.flow_program(x, context, 1, build.weights, inverse.encode())[:2])
    got = ref.flow_program_backward(*given, x, context, 1, build.weights, inverse.encode(), None, True, True, True)
    for a, b in zip(got, exact(x, inverse, build.weights, context, given)[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# bad input

X = torch.ones(4, 2)
AFFINE = Affine((0, 1), 0, 2, 0.0)
SPLINE = Spline((0, 1), 2, 1, (0,), 0, (3.0,))
NET = Net((0, 1), False, (Dense(0, 1, 3), Dense(2, 3, 4)))
WEIGHTS = [torch.ones(3, 2), torch.ones(3), torch.ones(4, 3), torch.ones(4), torch.ones(2, 2)]
UNDO = Autoregressive(NET, AFFINE, (1, 2), ((0, 1, 2),))
BLOCK = Residual((Dense(4, -1, 2),))
BAD = [
    (UNDO._replace(net=tuple(NET)), "net and transform must be a Net and an Affine or a Spline, got .*"),
    (UNDO._replace(transform=Prior((0, 1))), "net and transform must be a Net and an Affine or a Spline, got .*"),
    (UNDO._replace(transform=SPLINE._replace(params=0)), "its net must return the numbers of its Spline"),
    (UNDO._replace(transform=SPLINE), "the conditioner before it must return 10 numbers, got 4"),
    (UNDO._replace(transform=AFFINE._replace(columns=(0,))), "the conditioner before it must return 2 numbers, got 4"),
    (UNDO._replace(transform=AFFINE._replace(columns=(0, 0))), r"columns must differ, got \(0, 0\)"),
    (UNDO._replace(net=NET._replace(columns=(0, 7))), r"columns must be 0 to 1, got \(0, 7\)"),
    (UNDO._replace(generations=(1,)), r"generations must be 2 integers from 1 to 2, got \(1,\)"),
    (UNDO._replace(generations=[1, 2]), r"generations must be 2 integers from 1 to 2, got \[1, 2\]"),
    (UNDO._replace(generations=(0, 1)), r"generations must be 2 integers from 1 to 2, got \(0, 1\)"),
    (UNDO._replace(generations=(1, 3)), r"generations must be 2 integers from 1 to 2, got \(1, 3\)"),
    (UNDO._replace(levels=[(0, 1, 2)]), r"levels must be a tuple of tuples, got \[\(0, 1, 2\)\]"),
    (UNDO._replace(levels=((0, 1),)), r"levels must be 3 integers from 0 to 2, got \(0, 1\)"),
    (UNDO._replace(levels=((0, 1, 3),)), r"levels must be 3 integers from 0 to 2, got \(0, 1, 3\)"),
    (UNDO._replace(levels=((0, 1, -1),)), r"levels must be 3 integers from 0 to 2, got \(0, 1, -1\)"),
    (UNDO._replace(levels=((0, 1, 0.5),)), r"levels must be 3 integers from 0 to 2, got \(0, 1, 0.5\)"),
    (UNDO._replace(levels=()), "levels must be 3 integers from 0 to 2, got .*"),
    (UNDO._replace(levels=((0, 1, 2),) * 2), r"levels must be 4 integers from 0 to 2, got \(0, 1, 2\)"),
    (UNDO._replace(levels=((0, 1, 2), (0,) * 4, ())), "there must be levels for every Dense of the net but the last, got more"),
    (UNDO._replace(net=NET._replace(parts=(BLOCK, *NET.parts)), levels=((0, 1), (0, 1, 2))), "the parts of a Residual must leave the levels as they are"),
    (UNDO._replace(net=NET._replace(parts=(Norm(-1, -1, 1.0), *NET.parts))), "its net must have no Norm here"),
    (UNDO._replace(net=NET._replace(parts=(Activation(0), *NET.parts, BLOCK))), ".*"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("undo, text", BAD)
def test_bad_input_gets_one_sentence(undo, text, backend):
    program = Program(2, 0, (0, 1), (undo,))
    with (
        pyflow.backend(backend),
        pytest.raises(ValueError, match=f"^flow_program: instruction 0, Autoregressive: {text}$"),
    ):
        ops.flow_program(X, program, WEIGHTS)


def test_its_weights_are_named_once():
    undo = UNDO._replace(net=NET._replace(parts=(Dense(4, -1, 2), *NET.parts)), levels=((0, 1), (0, 1, 2)))
    text = "flow_program: instruction 0, Autoregressive: weight must be named once in the program, got 2 times"
    with pytest.raises(ValueError, match=f"^{text}$"):
        ops.flow_program(X, Program(2, 0, (0, 1), (undo, Linear((0, 1), 4))), WEIGHTS)


TEXTS = {
    "generation": UNDO._replace(generations=(1, 3)), "no generation": UNDO._replace(generations=(0, 0)), "few": UNDO._replace(generations=(1,)),
    "level": UNDO._replace(levels=((0, 1, 3),)), "negative": UNDO._replace(levels=((0, 1, -1),)), "few levels": UNDO._replace(levels=((0, 1),)),
    "no levels": UNDO._replace(levels=()), "more levels": UNDO._replace(levels=((0, 1, 2),) * 2),
    "residual": UNDO._replace(net=NET._replace(parts=(BLOCK, *NET.parts)), levels=((0, 1), (0, 1, 2))),
    "norm": UNDO._replace(net=NET._replace(parts=(Norm(-1, -1, 1.0), *NET.parts))), "numbers": UNDO._replace(transform=AFFINE._replace(columns=(0,))),
    "table": UNDO._replace(transform=SPLINE._replace(columns=(0,), params=3)), "spline": UNDO._replace(transform=SPLINE),
    "column": UNDO._replace(transform=AFFINE._replace(columns=(0, 9))), "twice": UNDO._replace(net=NET._replace(parts=(NET.parts[0]._replace(weight=4, size=2), Dense(4, -1, 2), NET.parts[0], NET.parts[1])), levels=((0, 1), (0, 1), (0, 1, 2))),
}  # fmt: skip


@bits
@pytest.mark.parametrize("undo", TEXTS.values(), ids=TEXTS.keys())
def test_operators_refuse_what_kernels_do_not_take(undo):
    code = Program(2, 0, (0, 1), (undo,)).encode()
    with pytest.raises(RuntimeError, match="flow_program"):
        torch.ops.pyflow.flow_program(X, None, 1, WEIGHTS, code, 0)
    with pytest.raises(RuntimeError, match="flow_program"):
        torch.ops.pyflow.flow_program_backward(None, X[:, 0], X, None, 1, WEIGHTS, code, None, True, False, True)


@bits
def test_levels_that_masks_do_not_have_stay_in_bounds():
    # what they give is not defined, as long as nothing else is touched
    for levels in itertools.product(range(3), repeat=3):
        for generations in itertools.product((1, 2), repeat=2):
            undo = UNDO._replace(generations=generations, levels=(tuple(min(v, max(generations)) for v in levels),))
            run(X, Program(2, 0, (0, 1), (undo,)), WEIGHTS)
