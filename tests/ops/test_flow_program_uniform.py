"""Uniform heads in programs of flows: which rows are in the box, and their log-density."""

from __future__ import annotations

import math

import pytest
import torch

from pyflow import ops, testing
from pyflow.program import Prior, Program, Uniform

from .programs import Builder
from .test_flow_program import DTYPES, bits, check_bits_of_rows, check_built, cotangents, rows, run

LOW, HIGH = (-1.0, 0.25, 2.0), (1.5, 0.75, 2.0 + 2.0**-20)


def around(dtype, low, high):
    """Numbers at, next to and far from two ends, and special ones."""
    ends, far = torch.tensor([low, high], dtype=dtype), torch.tensor(math.inf, dtype=dtype)
    special = torch.tensor([0.0, -0.0, 1e30, -1e30, math.inf, -math.inf, math.nan, (low + high) / 2], dtype=dtype)
    return torch.cat((ends, ends.nextafter(far), ends.nextafter(-far), special))


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_in_the_box_if_all_of_its_columns_are(dtype, closed):
    some = [around(dtype, *side) for side in zip(LOW, HIGH, strict=True)]
    x = torch.cartesian_prod(*some)[:, [1, 0, 2]].contiguous().requires_grad_()
    y, nats = ops.flow_program(x, Program(3, 0, (0, 2), (Uniform((1, 0, 2), LOW, HIGH, closed),)), [])
    low, high = (torch.tensor(ends, dtype=dtype) for ends in (LOW, HIGH))
    z = x[:, [1, 0, 2]]
    # those of torch and normflows
    inside = ~((z < low) | (z > high)) if closed else (z >= low) & (z < high)
    want = -torch.log(high - low).sum()
    assert nats.isneginf().equal(~inside.all(1)) and not nats.isnan().any() and 0 < inside.all(1).sum() < len(x)
    testing.assert_within(nats[inside.all(1)], want.expand(int(inside.all(1).sum())), 1e-6 * abs(want))
    grads = [torch.full_like(y, 2.0), torch.ones_like(nats)]
    (grad,) = torch.autograd.grad([v for v in (y, nats) if v.requires_grad], x, grads[: 1 + nats.requires_grad])
    assert grad.equal(torch.tensor([2.0, 0, 2], dtype=dtype).expand(len(x), 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_beside_other_heads_and_behind_layers(dtype):
    build = Builder(5, 2)
    heads = Uniform((4, 0), (-30.0,), (20.0, 30.0)), Uniform((), (0.0,), (1.0,)), Uniform((1,), (-40.0,), (40.0,), True)
    layers = build.net((4, 1), [9, 4], context=True), build.affine((2, 0)), *heads
    check_built(build, build.program(*layers, Prior((3, 2)), build.net((0,), [2]), build.affine((4,))), 67, dtype)
    x, context = rows(build, 67, dtype)
    y, nats = ops.flow_program(x, build.program(*layers), [w.to(dtype) for w in build.weights][:4], context)
    # one more box, with some rows outside, changes their densities alone
    narrow = build.program(*layers, Uniform((1, 4), (-0.5, -1.0), (0.5, 1.0)))
    other, less = ops.flow_program(x, narrow, [w.to(dtype) for w in build.weights][:4], context)
    inside = (y[:, 1] >= -0.5) & (y[:, 1] < 0.5) & (y[:, 4] >= -1) & (y[:, 4] < 1)
    assert less.isneginf().equal(~inside) and 0 < inside.sum() < 67
    testing.assert_same_bits(other, y)
    torch.testing.assert_close(less[inside], nats[inside] - math.log(2))


def boxed(prior=False):
    """A program that ends in a box with about half of the rows inside."""
    build = Builder(4)
    layers = [build.net((0, 2), [9, 4]), build.affine((1, 3)), build.spline((2, 0), own=True, bound=3.0)]
    return build, build.program(*layers, Uniform((3, 1, 0), (-2.0,), (2.0, 3.0, 1.0)), *[Prior((2,))] * prior)


@bits
def test_a_row_has_its_bits_in_any_batch_and_on_any_threads():
    build, program = boxed(prior=True)
    whole = check_bits_of_rows(rows(build, 700)[0], program, [w.float() for w in build.weights])
    assert 0 < whole[1].isneginf().sum() < 700 and not any(v.isnan().any() for v in whole)


def test_the_gradients_are_those_without_the_box():
    build, program = boxed()
    x, weights = rows(build, 33)[0], [w.float() for w in build.weights]
    grads = cotangents(x, x[:, 0])
    got = run(x, program, weights, grads=grads)
    want = run(x, program._replace(instructions=program.instructions[:-1]), weights, grads=grads)
    for a, b in zip(got[2:], want[2:], strict=True):
        testing.assert_same_bits(a, b)


def test_gradients_of_gradients():
    build, program = boxed(prior=True)
    x = rows(build, 3, torch.float64)[0].requires_grad_()
    weights = [w.requires_grad_() for w in build.weights]
    # not through infinities
    heads = Uniform((3, 0), (-99.0,), (99.0,)), Prior((2,))
    inside = program._replace(instructions=(*program.instructions[:-2], *heads))
    call = lambda x, *weights: ops.flow_program(x, inside, weights)
    assert torch.autograd.gradcheck(call, (x, *weights)) and torch.autograd.gradgradcheck(call, (x, *weights))


@pytest.mark.parametrize("change, text", [
    ({"low": (1.0, 2.0)}, r"low must be a tuple of one or one per column, got \(1.0, 2.0\)"),
    ({"high": ()}, r"high must be a tuple of one or one per column, got \(\)"),
    ({"high": [1.0]}, r"high must be a tuple of one or one per column, got \[1.0\]"),
    ({"low": (1.0,)}, "low must be less than high, both finite in float32, got 1.0 and 1.0"),
    ({"high": (2.0, -3.0, 2.0)}, "low must be less than high, both finite in float32, got -1.0 and -3.0"),
    ({"low": (-math.inf,)}, "low must be less than high, both finite in float32, got -inf and 1.0"),
    ({"high": (math.nan,)}, "low must be less than high, both finite in float32, got -1.0 and nan"),
    ({"high": (1e39,)}, r"low must be less than high, both finite in float32, got -1.0 and 1e\+39"),
    ({"low": (1 - 1e-9,)}, "low must be less than high, both finite in float32, got 0.999999999 and 1.0"),
    ({"low": ("0",)}, "low must be less than high, both finite in float32, got '0' and 1.0"),
    ({"closed": None}, "closed must be true or false, got None"),
    ({"columns": (0, 0, 1)}, r"columns must differ, got \(0, 0, 1\)"),
    ({"columns": (0, 3, 1)}, r"columns must be 0 to 2, got \(0, 3, 1\)"),
])  # fmt: skip
def test_wrong_boxes(change, text):
    box = Uniform((0, 2, 1), (-1.0,), (1.0,))._replace(**change)
    with pytest.raises(ValueError, match=f"^flow_program: instruction 0, Uniform: {text}$"):
        ops.flow_program(torch.zeros(1, 3), Program(3, 0, (), (box,)), [])
