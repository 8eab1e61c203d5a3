"""Programs of flows on a GPU: the CPU's results within rounding, the same bits in every run, batch and graph replay."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch

import pyflow
from pyflow import ops, testing
from pyflow.flows import NSF, RealNVP, fuse
from pyflow.program import Program, Uniform, Wrap

from ...ops.programs import Builder, drawn
from ...ops.test_flow_program import exact, rows, terms
from ...ops.test_flow_program_uniform import around
from ...ops.test_flow_program_wrap import edges
from .common import DEVICE, INTERPRETED, check_compiled, check_graph, moved, run

DTYPES = [torch.float32, torch.float64]
BATCHES = [1, 33] if INTERPRETED else [1, 33, 4096, 100_003]


def built(columns=6, context=3, hidden=(33, 17), layers=4, dtype=torch.float32):
    build = Builder(columns, context)
    program = build.real_nvp(hidden, layers, "silu")
    return build, program, [w.to(dtype) for w in build.weights]


def calls(build, program, batch, dtype, weights):
    x, context = rows(build, batch, dtype)
    leaves = [x, *([context] if program.context else []), *weights]

    def function(x, *more):
        given, own = (more[0], more[1:]) if program.context else (None, more)
        return ops.flow_program(x, program, list(own), given)

    return function, leaves, context if program.context else None


def check(gpu, build, program, batch, dtype, within=1.0):
    weights = [w.to(dtype) for w in build.weights]
    function, leaves, context = calls(build, program, batch, dtype, weights)
    got = run(gpu, DEVICE, function, leaves)
    grads = [v.cpu() for v in cotangents(got)]
    want = exact(leaves[0], program, weights, context, grads)
    unit = within * testing.UNIT[dtype] * terms(leaves[0], program)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        testing.assert_within(a, b, unit * (1 + b.abs().max()) if b.numel() else 0.0, f"output {i}")


def cotangents(got):
    """Those that `common.run` draws."""
    from .common import draw

    return [draw(o.shape, o.dtype, 9) for o in got[:2]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_flows_match_float64(triton, batch, dtype):
    build, program, _ = built()
    check(triton, build, program, batch, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_flows_match_float64(triton, dtype):
    if INTERPRETED:
        pytest.skip("the interpreter takes minutes")
    for columns, hidden in [(64, (256, 256)), (33, (300,)), (8, (64, 64))]:
        build, program, _ = built(columns, 0, hidden, 8)
        check(triton, build, program, 1000, dtype)


@pytest.mark.parametrize("seed", range(3 if INTERPRETED else 200))
def test_drawn_programs_match_float64(triton, seed):
    choices = random.Random(seed)
    one = lambda *several: choices.choice(several)
    build = Builder(one(1, 2, 3, 5, 8), one(0, 0, 3), seed)
    program = drawn(one, build, one(1, 2, 3))
    # an autoregressive inverse passes on errors
    check(triton, build, program, one(1, 5, 33, 67), DTYPES[seed % 2], 10.0)


# the interpreter's fma of float64 rounds twice
@pytest.mark.parametrize("dtype", DTYPES[:1] if INTERPRETED else DTYPES)
def test_wraps_have_the_bits_of_a_cpu(triton, dtype):
    x = edges(dtype, 3.0)[:, None]
    y, _ = ops.flow_program(x.to(DEVICE), Program(1, 0, (0,), (Wrap((0,), (3.0,), (0.1,)),)), [])
    testing.assert_same_bits(y.cpu(), torch.remainder(x + 0.1 + 3.0, 6.0) - 3.0)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ends_of_a_box_are_those_of_a_cpu(triton, dtype, closed):
    z = around(dtype, -1.0, 0.5)
    box = Uniform((1, 0), (-1.0, -9.0), (0.5, 9.0), closed)
    _, nats = ops.flow_program(torch.stack((torch.zeros_like(z), z), 1).to(DEVICE), Program(2, 0, (), (box,)), [])
    outside = (z < -1) | (z > 0.5) if closed else ~((z >= -1) & (z < 0.5))
    want = torch.full_like(z, -math.log(1.5 * 18)).masked_fill(outside, -math.inf)
    torch.testing.assert_close(nats.cpu(), want)


@pytest.fixture
def triton():
    if why := pyflow._backend.status()["triton"]:
        pytest.skip(why)
    with pyflow.backend("triton"):
        yield "triton"


def test_bits_depend_on_neither_batch_nor_run(triton):
    build, program, weights = built(layers=2)
    batch = 70 if INTERPRETED else 5000
    function, leaves, _ = calls(build, program, batch, torch.float32, weights)
    first, second = (run(triton, DEVICE, function, leaves) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        testing.assert_same_bits(a, b)
    # numpy's products have other bits in another place of a tile
    part = slice(32, 67) if INTERPRETED else slice(5, 40)
    some = run(triton, DEVICE, function, [leaves[0][part], leaves[1][part], *leaves[2:]])
    for a, b in zip(some[:2], first, strict=False):
        testing.assert_same_bits(a, b[part])


def test_works_in_a_cuda_graph_and_never_waits(triton):
    build, program, weights = built(layers=2)
    x, context = moved(list(rows(build, 70)))
    weights = moved(weights)

    def step():
        with torch.enable_grad():
            leaves = [v.detach().requires_grad_() for v in (x, context, *weights)]
            y, logdet = ops.flow_program(leaves[0], program, leaves[2:], leaves[1])
            return y.detach(), logdet.detach(), *torch.autograd.grad((y.sum() + logdet.sum()), leaves)

    check_graph(step, lambda: x.mul_(0.5), lambda: weights[0].add_(0.1))


def test_compiles_without_graph_breaks(triton):
    build, program, weights = built(layers=2)
    function, leaves, _ = calls(build, program, 35, torch.float32, weights)
    check_compiled(function, leaves)


@pytest.mark.parametrize("kind", [RealNVP, NSF])
def test_fused_flows_match_their_layers(triton, kind):
    torch.manual_seed(0)
    flow = kind(4, hidden=(8,), **{"couplings" if kind is RealNVP else "layers": 2}).to(DEVICE)
    x = torch.randn(40, 4, device=DEVICE)
    got = flow.log_prob(x)
    with pyflow.backend("reference"):
        want = copy.deepcopy(flow).log_prob(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert fuse(flow) is not None
