"""Wraps and turned splines in programs of flows: the bits of torch's remainder, and what they are made of."""

from __future__ import annotations

import math

import pytest
import torch

import pyflow
from pyflow import ops, testing
from pyflow.program import Program, Wrap

from .programs import Builder
from .test_flow_program import DTYPES, bits, check_bits_of_rows, check_built, rows, run, same
from .test_flow_program_autoregressive import check as check_autoregressive

BOUNDS = (math.pi, 1.0, 0.3)
# narrow bins and steep slopes lose digits
MILD = {"param_scale": 0.3, "min_bin": 0.05, "min_slope": 0.1}


def edges(dtype, bound):
    """Numbers at and next to multiples of the bound, others up to many periods, and special ones."""
    at = (torch.arange(-9, 10, dtype=torch.float64) * bound).to(dtype)
    far = torch.tensor(math.inf, dtype=dtype)
    above, below = at.nextafter(far), at.nextafter(-far)
    drawn = torch.randn(4, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drawn = drawn * torch.tensor([[1.0], [10], [1e3], [1e5]])
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-9, -1e-9, math.inf, -math.inf, math.nan], dtype=dtype)
    return torch.cat(
        (at, above, below, above.nextafter(far), below.nextafter(-far), drawn.flatten().to(dtype), special)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", BOUNDS)
def test_bits_of_the_remainder(bound, dtype):
    x = edges(dtype, bound)
    for shift in (0.0, 0.7, -0.1, bound / 3):
        for inverse in (False, True):
            program = Program(1, 0, (0,), (Wrap((0,), (bound,), (shift,), inverse),))
            y, logdet = ops.flow_program(x[:, None], program, [])
            want = torch.remainder((x - shift if inverse else x + shift) + bound, 2 * bound) - bound
            testing.assert_same_bits(y[:, 0].nan_to_num(7.0), want.nan_to_num(7.0))
            assert y[:, 0].isnan().equal(want.isnan()) and not logdet.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_have_numbers_of_their_own(dtype):
    build = Builder(5)
    wraps = Wrap((4, 0, 2), BOUNDS, (0.1, 0.2, -4.0)), Wrap((1, 3), (0.5,), (0.2, 0.4), True), Wrap((), (1.0,))
    program = build.program(*wraps, build.net((4, 1), [9, 2]), build.affine((2,)))
    check_built(build, program, 67, dtype)
    x, _ = rows(build, 67, dtype)
    y, *_ = run(x, build.program(*wraps), [])
    for columns, bound, shift in (
        ([4], math.pi, 0.1),
        ([0], 1.0, 0.2),
        ([2], 0.3, -4.0),
        ([1], 0.5, -0.2),
        ([3], 0.5, -0.4),
    ):
        same(y[:, columns], torch.remainder(x[:, columns] + shift + bound, 2 * bound) - bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("variant, tails", [("zuko", "linear"), ("nflows", "circular")])
def test_a_turned_spline_is_that_of_the_remainder(variant, tails, own, dtype):
    for inverse in (False, True):
        build = Builder(3)
        spline = build.spline((2, 0), tails, variant, bound=BOUNDS[:2], own=own, inverse=inverse)
        nets = () if own else (build.net((1,), [9, 2 * (2 * spline.bins + spline.slopes)]),)
        x, weights = 2 * rows(build, 70, dtype)[0], [w.to(dtype) for w in build.weights]
        bound = torch.tensor((BOUNDS[1], math.inf, BOUNDS[0]), dtype=dtype)

        def turned(x, bound=bound):
            return torch.where(bound.isinf(), x, torch.remainder(x, 2 * bound) - bound)

        got = run(x, build.program(*nets, spline._replace(turned=True)), weights)
        want = run(x if inverse else turned(x), build.program(*nets, spline), weights)
        want[0] = turned(want[0]) if inverse else want[0]
        for a, b in zip(got, want, strict=True):
            same(a, b)
        assert not want[0].equal(run(x, build.program(*nets, spline), weights)[0])


def circular(context="", order=None):
    """A program of wraps and of a masked net with a turned spline, and what undoes it."""
    build = Builder(5, 2 if context else 0)
    spline = build.spline((4, 1, 0), "linear", "zuko", bound=math.pi, turned=True, min_slope=0.1)
    pair = build.made((4, 1, 0), (9, 6), spline, kept=[3], context=context, activation="tanh", order=order)
    wrap = Wrap((4, 0, 2), (math.pi,), (0.3, -1.0, 2.0))
    undone = build.program(build.undo(*pair), wrap._replace(inverse=True))
    return build, build.program(wrap, *pair), undone


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context", ["", "inputs", "add"])
def test_autoregressive_inverses(context, dtype):
    build, forward, inverse = circular(context, [1, 0, 1] if context else None)
    check_autoregressive(build, forward, dtype=dtype)
    check_autoregressive(build, inverse, dtype=dtype)
    x, given = rows(build, 200, dtype)
    weights, wrapped = [w.to(dtype) for w in build.weights], build.program(Wrap((0, 1, 2, 4), (math.pi,)))
    x = ops.flow_program(x, wrapped._replace(context=0), [])[0]
    y, logdet = ops.flow_program(x, forward, weights, given)
    back, undone = ops.flow_program(y, inverse, weights, given)
    # on the circle; slopes from 0.1 to 10 and three generations
    away = torch.remainder(back - x + math.pi, 2 * math.pi) - math.pi
    testing.assert_within(away, torch.zeros_like(x).double(), 1e5 * testing.UNIT[dtype])
    torch.testing.assert_close(undone, -logdet, rtol=0, atol=1e5 * testing.UNIT[dtype])


@bits
def test_a_row_has_its_bits_in_any_batch_and_on_any_threads():
    build, *programs = circular()
    for program in programs:
        check_bits_of_rows(3 * rows(build, 700)[0], program, [w.float() for w in build.weights])


def test_gradients_of_gradients():
    build, forward, _ = circular()
    x = rows(build, 3, torch.float64)[0].requires_grad_()
    call = lambda x: ops.flow_program(x, forward, build.weights)
    assert torch.autograd.gradcheck(call, x) and torch.autograd.gradgradcheck(call, x)
    with pyflow.backend("reference"):
        assert torch.autograd.gradcheck(call, x)


@pytest.mark.parametrize("change, text", [
    ({"bound": (1.0, 2.0)}, r"bound must be a tuple of one or one per column, got \(1.0, 2.0\)"),
    ({"shift": ()}, r"shift must be a tuple of one or one per column, got \(\)"),
    ({"bound": (0.0,)}, "bound must be positive and finite, got 0.0"),
    ({"shift": (math.inf,)}, "shift must be a number"),
    ({"shift": ("1",)}, "shift must be a number"),
    ({"inverse": None}, "inverse must be true or false, got None"),
    ({"columns": (0, 0, 1)}, r"columns must differ, got \(0, 0, 1\)"),
])  # fmt: skip
def test_wrong_wraps(change, text):
    with pytest.raises(ValueError, match=f"flow_program: instruction 0, Wrap: {text}"):
        ops.flow_program(torch.zeros(1, 3), Program(3, 0, (), (Wrap((0, 2, 1), (1.0,))._replace(**change),)), [])


def test_a_turned_spline_has_a_bound():
    build = Builder(2)
    program = build.program(build.spline((0,), None, own=True, turned=True))
    with pytest.raises(ValueError, match="turned must be false without tails, got True"):
        ops.flow_program(torch.zeros(1, 2), program, [w.float() for w in build.weights])
