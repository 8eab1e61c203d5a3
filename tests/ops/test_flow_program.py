"""Programs of flows against their reference in float64, bit by bit and under every transform."""

from __future__ import annotations

import functools
import hashlib
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyflow
from pyflow import _backend, ops, testing
from pyflow._kept import columns_of
from pyflow._schemas import PRIORS, SCALE_MAPS
from pyflow.program import (
    ACTIVATIONS,
    PACKINGS,
    Additive,
    Affine,
    Context,
    Dense,
    Linear,
    Multiplicative,
    Net,
    Prior,
    Program,
    Residual,
    Scale,
    Spline,
)  # fmt: skip
from pyflow.reference import flow_program as ref

from .programs import Builder, drawn, inverse_of

DTYPES = [torch.float32, torch.float64]
FORMS = [(first, inverse) for first in (False, True) for inverse in (False, True)]
BATCHES = [0, 1, 2, 31, 32, 33, 63, 64, 65, 96, 97, 200, 1000]
# around the widths of vectors and register tiles
WIDTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 47, 63, 64, 65, 100, 127, 128, 129, 200, 255, 300]
# the bits of the reference's matrix products are those of a BLAS
COMPILED = _backend.cpu_missing is None
bits = pytest.mark.skipif(not COMPILED, reason=f"no compiled kernels: {_backend.cpu_missing}")


def same(a, b, name=""):
    if COMPILED:
        testing.assert_same_bits(a, b, name)
    else:
        a, b = torch.nan_to_num(a), torch.nan_to_num(b)
        testing.assert_within(a, b, 1e-4 * (1 + b.abs().max()) if b.numel() else 0.0, name)


def rows(build, batch, dtype=torch.float32, spread=1.0):
    """x and the context."""
    x, context = build.draw(batch, build.columns, spread=spread), build.draw(batch, max(1, build.context))
    return x.to(dtype), context.to(dtype) if build.context else None


def run(x, program, weights, context=None, grads=None):
    """y, logdet and the gradients of x, of the context if there is one, and of the weights."""
    leaves = [v.detach().requires_grad_() for v in (x, *([] if context is None else [context]), *weights)]
    given = leaves[1 : len(leaves) - len(weights)]
    out = ops.flow_program(leaves[0], program, leaves[1 + len(given) :], *given)
    return [*(o.detach() for o in out), *gradients(out, leaves, cotangents(*out) if grads is None else grads)]


def gradients(out, leaves, grads):
    """Zeros where the reference's graph has no path."""
    ends = [(v, g) for v, g in zip(out, grads, strict=True) if v.requires_grad]
    found = torch.autograd.grad([v for v, _ in ends], leaves, [g for _, g in ends], allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for g, v in zip(found, leaves, strict=True)]


def cotangents(y, logdet):
    source = torch.Generator().manual_seed(7)
    draw = lambda v: torch.randn(v.shape, generator=source, dtype=torch.float64).to(v.dtype)
    return [draw(y), draw(logdet)]


def exact(x, program, weights, context=None, grads=None):
    """The same by autograd of the reference in float64."""
    wide = [v.detach().double().requires_grad_() for v in (x, *([] if context is None else [context]), *weights)]
    own = None if context is None else wide[1]
    out = ref.flow_program(wide[0], own, 1, wide[len(wide) - len(weights) :], program.encode())[:2]
    grads = cotangents(*(v.to(x.dtype) for v in out)) if grads is None else grads
    return [*(o.detach() for o in out), *gradients(out, wide, [g.double() for g in grads])]


def terms(x, program):
    """How many terms the longest sum of all passes has: rows, for gradients of weights, or inputs and outputs of layers."""
    sizes = [x.shape[0], program.columns]
    total = 0
    for instruction in program.instructions:
        if isinstance(instruction, Net):
            sizes += [
                len(instruction.columns) + program.context,
                *(part.size for part in instruction.parts if isinstance(part, Dense)),
            ]
            total += len(instruction.parts)
        # an error of a knot counts 1 / width times within its bin
        total += 3 * instruction.bins if isinstance(instruction, Spline) else 1
    # every step passes on the errors of those before it
    return max(sizes) + 16 * total


def check(x, program, weights, context=None, grads=None, moves=False):
    """All results within n u (1 + largest value) of those in float64, n the number of terms and steps.

    `moves`: and what they move by when x, context and weights are rounded once more, n times: the second derivatives of
    drawn programs, which the errors of their gradients grow with, may be large.
    """
    got, want = run(x, program, weights, context, grads), exact(x, program, weights, context, grads)
    unit, n, moved = testing.UNIT[x.dtype], terms(x, program), want
    if moves:
        source = torch.Generator().manual_seed(3)
        rounded = lambda v: v.double() * (1 + unit * (2 * torch.rand(v.shape, generator=source).round().double() - 1))
        grads = cotangents(*got[:2]) if grads is None else grads
        given = None if context is None else rounded(context)
        moved = exact(rounded(x), program, [rounded(w) for w in weights], given, grads)
    names = ["y", "logdet", "grad x", *["grad context"] * (context is not None)]
    names += [f"grad weights[{i}]" for i in range(len(weights))]
    for name, a, b, c in zip(names, got, want, moved, strict=True):
        assert a.dtype == x.dtype
        error = unit * (1 + b.abs().max()) if b.numel() else 0.0
        testing.assert_within(a, b, n * (error + (c - b).abs().max() if moves and b.numel() else error), name)
    return got


def check_built(build, program, batch=37, dtype=torch.float32, moves=False):
    x, context = rows(build, batch, dtype)
    return check(x, program, [w.to(dtype) for w in build.weights], context if program.context else None, None, moves)


def check_bits_of_rows(x, program, weights):
    """A row has its bits in any batch and on any threads. Returns the results of all rows."""
    grads = cotangents(x, x[:, 0])
    whole = run(x, program, weights, grads=grads)
    for first, last in [(0, 1), (31, 33), (5, 69), (699, 700)]:
        part = run(x[first:last], program, weights, grads=[g[first:last] for g in grads])
        for a, b in zip(part[:3], whole, strict=False):
            testing.assert_same_bits(a, b[first:last], f"rows {first} to {last}")
    for count in (1, 3):
        with testing.threads(count):
            for a, b in zip(run(x, program, weights, grads=grads), whole, strict=True):
                testing.assert_same_bits(a, b)
    return whole


@functools.cache
def mixed(dtype=torch.float32, columns=6, context=3, hidden=(33, 17), layers=4, activation="silu"):
    """A program of every instruction, and its weights."""
    build = Builder(columns, context)
    program = build.real_nvp(hidden, layers, activation)
    return build, program, [w.to(dtype) for w in build.weights]


# instruction by instruction


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift, log_scale", [(True, True), (True, False), (False, True), (False, False)])
def test_scale(shift, log_scale, dtype):
    for first, inverse in FORMS:
        for columns in [(0,), (4, 1, 2), tuple(range(70)), (*range(0, 70, 3), 1)]:
            build = Builder(70)
            places = [build.weight(len(columns)) if given else -1 for given in (shift, log_scale)]
            check_built(build, build.program(Scale(columns, *places, first, inverse)), 9, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 5, 8, 17, 33, 64, 100])
def test_linear(size, dtype):
    for bias, logdet in [(False, False), (True, False), (False, True), (True, True)]:
        build = Builder(size + 2)
        order = torch.randperm(size + 2, generator=build.source)[:size].tolist()
        places = build.matrix(size), build.weight(size) if bias else -1, build.weight() if logdet else -1
        check_built(build, build.program(Linear(tuple(order), *places)), 35, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_conditioners(activation, dtype):
    for sizes in [(3,), (20, 3), (9, 40, 3)]:
        for context, bias in [(0, True), (4, False)]:
            build = Builder(7, context)
            # a column that comes twice, in no order, and one that the transform changes
            net = build.net((5, 0, 5, 2), sizes, activation, context=context > 0, bias=bias, arg=0.3)
            check_built(build, build.program(net, Additive((6, 2, 1), inverse=bias)), 33, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_and_small_activations(activation):
    # far out in both tails, where exp overflows; the last layer has an activation too
    for dtype in DTYPES:
        build = Builder(2)
        weights = [torch.ones(1, 1), torch.tensor([[0.5]]), torch.zeros(1)]
        layers = Dense(0, -1, 1, ACTIVATIONS.index(activation), 0.2), Dense(1, 2, 1, ACTIVATIONS.index(activation), 0.2)
        x = torch.tensor([[s * 10.0**e, 1.0] for s in (-1, 1) for e in range(-6, 4)] + [[0.0, 1.0], [-0.0, 1.0]])
        program = build.program(Net((0,), False, layers), Additive((1,)))
        check(x.to(dtype), program, [w.to(dtype) for w in weights])


@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width):
    build = Builder(5, 2)
    net = build.net((0, 1, 2), [width, 3], "tanh", context=True)
    wide = build.net((4, 3), [5, width, width, 4], "relu")
    program = build.program(net, Additive((3, 4, 0)), wide, build.affine((1, 2)))
    for batch in (1, 33):
        check_built(build, program, batch)


@pytest.mark.parametrize("width", WIDTHS)
def test_columns(width):
    build = Builder(width + 1, 1)
    half = max(1, width // 2)
    seen, changed = list(range(half)), list(range(half, width + 1))[::-1]
    net = build.net(seen, [9, 2 * len(changed)], "leaky_relu", context=True)
    program = build.program(net, build.affine(changed, packing="interleaved"), Prior(tuple(range(1, width + 1))))
    check_built(build, program, 34)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
def test_affine(scale_map, dtype):
    for packing in PACKINGS:
        for first, inverse in FORMS:
            build = Builder(7)
            net = build.net((0, 3), [12, 10], "elu")
            program = build.program(
                net, build.affine((5, 1, 2, 0, 6), scale_map, packing, shift_first=first, inverse=inverse)
            )
            check_built(build, program, 21, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_multiplicative(dtype):
    for inverse in (False, True):
        for columns in [(1,), (5, 1, 2, 0, 6), tuple(range(40))]:
            build = Builder(40)
            net = build.net((0, 3), [12, len(columns)], "elu")
            check_built(build, build.program(net, Multiplicative(columns, inverse)), 21, dtype)


@pytest.mark.parametrize("scale_map, arg", [("sigmoid", 1e-3), ("softplus", 0.1), ("tanh", 0.5), ("softsign", 7.0)])
def test_constants_of_scale_maps(scale_map, arg):
    build = Builder(2)
    affine = build.affine((1,), scale_map)._replace(map_arg=arg)
    check_built(build, build.program(build.net((0,), [2]), affine))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prior", range(len(PRIORS)))
def test_priors(prior, dtype):
    for columns in [(), (2,), (4, 0, 3), tuple(range(65))]:
        build = Builder(65)
        # what stands before and behind a prior
        scale = [Scale((0, 1, 2), build.weight(3), build.weight(3)) for _ in range(2)]
        check_built(build, build.program(scale[0], Prior(columns, prior), scale[1], Prior((1, 7))), 34, dtype)


@pytest.mark.parametrize("outputs", [(), (3,), (3, 1, 0, 2), (2, 2, 0, 2, 1, 1), (0, 2)])
def test_outputs(outputs):
    build = Builder(4)
    program = build.program(build.net((0,), [6]), build.affine((1, 3, 2)), Prior((1, 2)), outputs=outputs)
    for batch in (1, 33, 64):
        y, logdet, *_ = check_built(build, program, batch)
        assert y.shape == (batch, len(outputs)) and logdet.shape == (batch,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_instructions_between_a_conditioner_and_its_transform(dtype):
    build = Builder(5)
    program = build.program(
        build.net((0, 1), [8, 7, 4], "gelu"), Scale((0, 1, 2), build.weight(3), -1), Prior((0, 4)), Linear((3, 0, 1), build.matrix(3)),
        Additive((1, 2, 3, 4), inverse=True), build.net((4, 1, 2), [9, 4], "silu"), Linear((1, 4, 2, 0), build.matrix(4), build.weight(4)),
        build.affine((3, 2)),
    )  # fmt: skip
    for batch in (1, 40):
        check_built(build, program, batch, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inside", [False, True])
def test_a_net_that_begins_with_a_context(inside, dtype):
    # more and fewer columns than the context has
    for columns in (2, 5):
        build = Builder(columns, 3, seed=7)
        context = Context(build.dense(3, columns, "sigmoid"), gate=True)
        parts = (Residual((context,)) if inside else context, build.dense(columns, 2))
        net = Net((*range(columns),), False, parts)
        check_built(build, build.program(net, build.affine((0,))), 50, dtype)


def test_residuals_in_residuals():
    part = Dense(0, -1, 1)
    for _ in range(13):
        part = Residual((part,))
    weights, x = [torch.full((1, 1), 0.1)], torch.randn(3, 1)
    check(x, Program(1, 0, (0,), (Net((0,), False, (part,)), Additive((0,)))), weights)
    net = Net((0,), False, (Residual((part,)),))
    with pytest.raises(ValueError, match="instruction 0, Net: residuals must be nested at most 13 deep, got more"):
        ops.flow_program(x, Program(1, 0, (0,), (net, Additive((0,)))), weights)


@bits
def test_operators_refuse_sizes_whose_memory_has_no_number():
    code = "2 0 1 0 1 2 2 net 0 0 1 dense 0 -1 {} 0 0.0 -1 additive 1 0 0 1 0"
    for size in (1 << 40, 1 << 58):
        with pytest.raises(RuntimeError, match="flow_program"):
            torch.ops.pyflow.flow_program(torch.zeros(2, 2), None, 1, [torch.empty(size, 0)], code.format(size), 0)
        with pytest.raises(RuntimeError, match="flow_program"):
            torch.ops.pyflow.flow_program(torch.zeros(2, 1).expand(2, size), None, 1, [], f"{size} 0 0 0", 0)


def test_few_columns():
    # no column, no input of a network, no instruction, weights that no instruction names
    build = Builder(3, 2)
    empty = [
        Scale((), build.weight(0), build.weight(0)), Linear((), build.weight(0, 0), build.weight(0), build.weight()),
        build.net((), [5, 2]), Additive((0, 1)), build.net((), [4, 6], context=True), build.affine((0, 1, 2)),
        build.net((0,), [3], context=False)._replace(parts=(build.dense(1, 2),)), Additive((1, 2)),
    ]  # fmt: skip
    for batch in (1, 40):
        check_built(build, build.program(*empty), batch)
        check_built(build, build.program(), batch)
        check_built(build, build.program(outputs=(1,)), batch)
    for instructions in [(), (Prior(()),)]:
        y, logdet = ops.flow_program(torch.ones(3, 0), Program(0, 0, (), instructions), [])
        assert y.shape == (3, 0) and torch.equal(logdet, torch.zeros(3))


def test_a_weight_may_have_several_places():
    build = Builder(4)
    net = build.net((0, 1), [2, 2, 2], "tanh")
    shared = net._replace(parts=(net.parts[0], net.parts[0], net.parts[2]))
    program = build.program(shared, Additive((2, 3)), shared._replace(columns=(2, 3)), Additive((0, 1)))
    x, _ = rows(build, 33)
    weights = [w.float() for w in build.weights]
    got = check(x, program, weights)
    assert (got[5] == 0).all() and (got[6] == 0).all()  # those of the second layer, which no instruction names
    # the same tensor in two places of the list
    leaf = weights[0].clone().requires_grad_()
    apart = net._replace(parts=(net.parts[0], net.parts[1]._replace(weight=2), net.parts[2]))
    y, _ = ops.flow_program(x, build.program(apart, Additive((2, 3))), [leaf, weights[1], leaf, *weights[3:]])
    once, _ = ops.flow_program(x, build.program(net._replace(parts=(net.parts[0], Dense(0, 3, 2, 3), net.parts[2])), Additive((2, 3))), [leaf, *weights[1:]])  # fmt: skip
    a, b = (torch.autograd.grad(v.square().sum(), leaf)[0] for v in (y, once))
    torch.testing.assert_close(a, b)


# whole flows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_batches(batch, dtype):
    build, program, weights = mixed(dtype)
    check(*rows(build, batch, dtype)[:1], program, weights, rows(build, batch, dtype)[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "columns, hidden", [(2, (64, 64)), (8, (64, 64)), (33, (129, 50)), (64, (300,)), (3, ()), (4, (1030, 40))]
)
def test_whole_flows(columns, hidden, dtype):
    build, program, weights = mixed(dtype, columns, 0, hidden)
    check(rows(build, 70, dtype)[0], program, weights)


def test_deep_flows():
    build, program, weights = mixed(torch.float64, 5, 2, (11,), 40)
    x, context = rows(build, 70, torch.float64)
    check(x, program, weights, context)


def drawn_check(seed, dtype, moves=False):
    choices = random.Random(seed)
    one = lambda *several: choices.choice(several)
    build = Builder(one(1, 2, 3, 5, 8, 17, 33), one(0, 0, 1, 5), seed)
    check_built(build, drawn(one, build, one(1, 2, 3, 5)), one(1, 5, 32, 67), dtype, moves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_drawn_programs(dtype):
    for seed in range(25):
        drawn_check(seed, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_drawn_programs(dtype):
    for seed in range(25, 1500):
        drawn_check(seed, dtype, moves=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.sampled_from([1, 2, 3, 6, 17]), st.integers(1, 5), st.sampled_from([0, 2]))
def test_the_inverse_undoes_the_forward(seed, columns, steps, context):
    choices = random.Random(seed)
    build = Builder(columns, context, seed)
    program = drawn(lambda *several: choices.choice(several), build, steps, invertible=True)
    undo, weights = inverse_of(program, build.weights)
    for dtype in DTYPES:
        x, given = rows(build, 35, dtype)
        given = given if program.context else None
        y, logdet = ops.flow_program(x, program, [w.to(dtype) for w in build.weights], given)
        back, undone = ops.flow_program(y, undo, [w.to(dtype) for w in weights], given)
        # what rounding y and the steps on the way change: the slopes of both directions tell
        wide = None if given is None else given.double()
        there = slopes(x.double(), program, build.weights, wide)
        again = slopes(y.double(), undo, weights, wide)
        slope = (1 + there) * (1 + again)
        error = 4e3 * testing.UNIT[dtype] * (1 + x.abs().amax(1) + y.abs().amax(1)) * slope * slope
        # where an exp leads far out, no digit is left
        near = error < 0.1
        assert near.sum() >= len(x) / 4 or dtype == torch.float32
        assert ((back - x).abs().amax(1) <= error)[near].all()
        assert ((logdet + undone).abs() <= error * (1 + logdet.abs()))[near].all()


def slopes(x, program, weights, context):
    """The largest |dy/dx| of every row."""

    def one(row, own):
        return ops.flow_program(row[None], program, weights, None if own is None else own[None])[0][0]

    with pyflow.backend("reference"):
        jacobian = torch.vmap(torch.func.jacrev(one), (0, None if context is None else 0))(x, context)
    return jacobian.abs().amax((1, 2))


def test_the_log_density_is_that_of_the_layers():
    # against other code than the reference: layers of torch and torch.distributions
    build = Builder(4)
    net = build.net((2, 0), [16, 4], "silu")
    program = build.program(
        Scale((0, 1, 2, 3), -1, build.weight(4)), net, build.affine((3, 1), "exp"), Prior((0, 1, 2, 3))
    )
    x = build.draw(50, 4)
    a, b, c, d, log_scale = build.weights
    h = x * log_scale.exp()
    numbers = torch.nn.functional.silu(h[:, [2, 0]] @ a.T + b) @ c.T + d
    z = h.clone()
    z[:, [3, 1]] = h[:, [3, 1]] * numbers[:, 2:].exp() + numbers[:, :2]
    want = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1) + log_scale.sum() + numbers[:, 2:].sum(1)
    y, density = ops.flow_program(x, program, build.weights)
    torch.testing.assert_close(y, z)
    torch.testing.assert_close(density, want)


# memory layouts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["half", "stepped", "transposed", "offset"])
def test_layouts(layout, dtype):
    build, program, weights = mixed(dtype)
    x, context = rows(build, 70, dtype)
    view = lambda v: testing.laid_out(v, layout) if v.dim() else v.expand(3)[1]
    plain = run(x, program, weights, context)
    for views in [
        (view(x), weights, context), (x, weights, view(context)), (x, [view(w) for w in weights], context),
        (view(x), [view(w) for w in weights], view(context)),
    ]:  # fmt: skip
        for a, b in zip(check(views[0], program, *views[1:]), plain, strict=True):
            same(a, b)


def test_expanded_inputs():
    build, program, weights = mixed()
    x, context = rows(build, 70)
    wide = [w.flatten()[:1].expand(w.shape) if w.dim() else w for w in weights]
    shared = (
        x[:1].expand(70, -1),
        [w[:1].expand(w.shape) if w.dim() else w for w in weights],
        context[:1].expand(70, -1),
    )
    for own, named, more in [(shared[0], weights, context), (x, weights, shared[2]), (x, wide, context), shared]:
        check(own, program, named, more)
    y, logdet = ops.flow_program(shared[0], program, weights, shared[2])
    same(y, y[:1].expand_as(y))
    same(logdet, logdet[:1].expand_as(logdet))


@pytest.mark.parametrize("layout", ["contiguous", "expanded", "transposed", "sliced"])
def test_backward_takes_any_gradient_layout(layout):
    build, program, weights = mixed()
    x, context = rows(build, 70)
    gy = testing.gradient_layouts(build.draw(70, 6).float())[layout]
    gl = torch.full((), 0.3).expand(70) if layout == "expanded" else build.draw(140).float()[::2]
    got = check(x, program, weights, context, (gy, gl))
    for a, b in zip(got, run(x, program, weights, context, (gy.contiguous(), gl.contiguous())), strict=True):
        same(a, b)


def test_backward_of_sums():
    build, program, weights = mixed(torch.float64)
    x, context = rows(build, 65, torch.float64)
    leaves = [v.detach().requires_grad_() for v in (x, context, *weights)]
    for loss in (lambda y, d: y.sum(), lambda y, d: d.sum(), lambda y, d: y.sum() - d.mean()):
        got = gradients([loss(*ops.flow_program(leaves[0], program, leaves[2:], leaves[1]))], leaves, [None])
        end = loss(*ref.flow_program(leaves[0], leaves[1], 1, leaves[2:], program.encode())[:2])
        for a, b in zip(got, gradients([end], leaves, [None]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("which", ["x", "context", "weights", "one weight", "x and context", "all but x"])
def test_only_what_needs_a_gradient_gets_one(which):
    build, program, weights = mixed()
    x, context = rows(build, 40)
    every = run(x, program, weights, context)[2:]
    chosen = {
        "x": [0], "context": [1], "weights": range(2, len(every)), "one weight": [5], "x and context": [0, 1],
        "all but x": range(1, len(every)),
    }[which]  # fmt: skip
    leaves = [v.detach().requires_grad_(i in chosen) for i, v in enumerate((x, context, *weights))]
    out = ops.flow_program(leaves[0], program, leaves[2:], leaves[1])
    found = torch.autograd.grad(out, [leaves[i] for i in chosen], cotangents(*out))
    for i, grad in zip(chosen, found, strict=True):
        same(grad, every[i])
    assert not any(v.requires_grad for v in ops.flow_program(x, program, weights, context))
    with torch.no_grad():
        assert not any(v.requires_grad for v in ops.flow_program(leaves[0], program, leaves[2:], leaves[1]))


def test_gradients_that_are_not_needed_are_empty():
    build, program, weights = mixed()
    x, context = rows(build, 5)
    gy, gl = cotangents(*ops.flow_program(x, program, weights, context))
    shapes = [v.shape for v in (x, context, *weights)]
    for need in [(True, True, True), (True, False, False), (False, True, False), (False, False, True), (False,) * 3]:
        found = torch.ops.pyflow.flow_program_backward(gy, gl, x, context, 1, weights, program.encode(), None, *need)
        needed = [need[0], need[1], *[need[2]] * len(weights)]
        assert [v.shape for v in found] == [s if n else (0,) for s, n in zip(shapes, needed, strict=True)]
    bare, none = Builder(2), Scale((0, 1), 0, -1)
    shift = [torch.ones(2)]
    found = torch.ops.pyflow.flow_program_backward(
        None, None, x[:, :2], None, 1, shift, bare.program(none).encode(), None, True, False, True
    )
    assert [tuple(v.shape) for v in found] == [(5, 2), (0,), (2,)] and not any(v.any() for v in found)


# special values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "context"])
def test_special_values_stay_in_their_row(where, value, dtype):
    build, program, weights = mixed(dtype)
    for batch, row in [(1, 0), (40, 0), (40, 33), (65, 64), (97, 31)]:
        x, context = rows(build, batch, dtype)
        bad = [x.clone(), context.clone()]
        bad[where == "context"][row, 1] = value
        plain, got = run(x, program, weights, context)[:4], run(bad[0], program, weights, bad[1])[:4]
        others = torch.arange(batch) != row
        for a, b in zip(got, plain, strict=True):
            same(a[others], b[others])
        if math.isnan(value):
            assert got[0][row].isnan().any() and got[1][row].isnan()


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "elu"])
def test_a_gradient_of_nan_is_selected_as_torch_does(activation):
    index = ACTIVATIONS.index(activation)
    program = Program(2, 0, (0, 1), (Net((0,), False, (Dense(0, 1, 3, index, 0.5), Dense(2, -1, 1))), Additive((1,))))
    weights = [torch.tensor([[1.0], [-1.0], [0.0]]), torch.tensor([0.0, 0.0, math.nan]), torch.ones(1, 3)]
    x, grad = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, math.nan]])
    found, wanted = (f(x, program, weights, grads=[grad, torch.zeros(1)])[2:] for f in (run, exact))
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_that_nothing_reads_pass_special_values(dtype):
    build = Builder(4)
    program = build.program(build.net((0,), [8, 1]), Additive((1,)), Prior((0, 1)), outputs=(3, 2, 1, 0))
    x, _ = rows(build, 33, dtype)
    x[:, 2], x[:, 3] = math.nan, -math.inf
    y, logdet = ops.flow_program(x, program, [w.to(dtype) for w in build.weights])
    assert y[:, 1].isnan().all() and (y[:, 0] == -math.inf).all()
    assert y[:, 2:].isfinite().all() and logdet.isfinite().all()


def test_nan_in_a_weight_shows():
    build, program, weights = mixed()
    x, context = rows(build, 33)
    for i, weight in enumerate(weights):
        poisoned = [w.clone() for w in weights]
        poisoned[i].view(-1)[-1] = math.nan
        y, logdet = ops.flow_program(x, program, poisoned, context)
        assert y.isnan().any() or logdet.isnan().any(), f"weights[{i}] of shape {tuple(weight.shape)}"


# bits


@bits
@pytest.mark.parametrize("columns, context, hidden", [(6, 3, (33, 17)), (1, 0, ()), (64, 0, (130,)), (8, 0, (64, 64))])
def test_a_row_alone_has_the_bits_of_any_batch(columns, context, hidden):
    build, program, weights = mixed(torch.float32, columns, context, hidden)
    x, more = rows(build, 200)
    whole = ops.flow_program(x, program, weights, more)
    for first, last in [(0, 1), (1, 2), (31, 32), (32, 33), (130, 131), (199, 200), (0, 2), (3, 34), (5, 69), (7, 135)]:
        part = ops.flow_program(x[first:last], program, weights, None if more is None else more[first:last])
        for a, b in zip(part, whole, strict=True):
            testing.assert_same_bits(a, b[first:last], f"rows {first} to {last}")


@bits
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 33, 200, 1000, 3000])
def test_bits_do_not_depend_on_threads(batch, dtype):
    build, program, weights = mixed(dtype)
    x, context = rows(build, batch, dtype)
    with testing.threads(1):
        single = run(x, program, weights, context)
    for count in (2, 3, 2):
        with testing.threads(count):
            several = run(x, program, weights, context)
        for i, (a, b) in enumerate(zip(several, single, strict=True)):
            testing.assert_same_bits(a, b, f"{count} threads, result {i}")


@bits
def test_the_gradient_of_a_row_does_not_depend_on_the_others():
    build, program, weights = mixed()
    x, context = rows(build, 200)
    gy, gl = cotangents(*ops.flow_program(x, program, weights, context))
    whole = run(x, program, weights, context, (gy, gl))
    for rows_ in (slice(0, 1), slice(31, 64), slice(199, 200)):
        part = run(x[rows_], program, weights, context[rows_], (gy[rows_], gl[rows_]))
        for a, b in zip(part[2:4], whole[2:4], strict=True):
            testing.assert_same_bits(a, b[rows_])


def digest() -> str:
    """Hashes of forwards and of gradients in float32; run in a process per instruction set."""
    hashes = hashlib.sha256(), hashlib.sha256()
    cases = []
    for columns, context, hidden in [(6, 3, (33, 17)), (64, 0, (130,)), (8, 0, (64, 64))]:
        for activation in ACTIVATIONS:
            cases += [(*mixed(torch.float32, columns, context, hidden, 4, activation), batch) for batch in (1, 70)]
    for seed in range(40):
        choices = random.Random(seed)
        build = Builder(7, 2, seed)
        program = drawn(lambda *several, own=choices: own.choice(several), build, 4)
        cases.append((build, program, [w.float() for w in build.weights], 70))
    for build, program, weights, batch in cases:
        x, context = rows(build, batch, spread=3.0)
        for i, v in enumerate(run(x, program, weights, context if program.context else None)):
            hashes[i > 1].update(torch.nan_to_num(v).numpy().tobytes())
    return ":".join(h.hexdigest() for h in hashes)


@bits
def test_instruction_sets_give_the_same_bits(every_instruction_set):
    forward, backward = (set(each) for each in zip(*(v.split(":") for v in every_instruction_set), strict=True))
    assert len(forward) == 1
    # this is no promise, but sums over rows have one order too
    assert len(backward) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_output_element_is_written(dtype):
    build, program, weights = mixed(dtype)
    for batch in (1, 31, 65, 200):
        x, context = rows(build, batch, dtype)
        with testing.poisoned():
            assert not any(v.isnan().any() for v in run(x, program, weights, context))
    # an empty batch has gradients too
    x, context = rows(build, 0, dtype)
    with testing.poisoned():
        assert all((v == 0).all() for v in run(x, program, weights, context)[4:])


def test_nothing_is_changed_in_place():
    build, program, weights = mixed()
    x, context = rows(build, 65)
    before = [v.clone() for v in (x, context, *weights)]
    run(x, program, weights, context)
    for a, b in zip(before, (x, context, *weights), strict=True):
        testing.assert_same_bits(a, b)


def test_offsets_beyond_two_to_the_31():
    # rows 2^26 elements apart; only what is touched is ever paged in
    build, program, weights = mixed(torch.float32, 6, 0)
    far = torch.empty(2**31 + 2**27).as_strided((33, 6), (2**26, 3))
    x, _ = rows(build, 33)
    far.copy_(x)
    for a, b in zip(run(far, program, weights), run(x, program, weights), strict=True):
        same(a, b)


# memory


def grown(depth, batch):
    """Bytes that a training step takes at its peak beyond its inputs, by torch's allocator and by the system, and the
    bytes of all that the kernel may keep of its weights.
    """
    build = Builder(16)
    program = build.real_nvp((8,), depth)
    weights = [w.float().requires_grad_() for w in build.weights]
    x, status = rows(build, batch)[0].requires_grad_(), Path("/proc/self/status")
    ops.flow_program(x, program, weights)[1].sum().backward()
    for leaf in (x, *weights):
        leaf.grad = None
    of = lambda word: 1024 * int(status.read_text().partition(f"{word}:")[2].split()[0])
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what there is
    before = of("VmRSS")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=False) as profile:
        ops.flow_program(x, program, weights)[1].sum().backward()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    # sums over 16 groups of rows: of matrices padded to 16 columns, of vectors in 16 lanes; and the gradients
    sums = [w.numel() if w.dim() < 2 else w.shape[0] * -(-w.shape[1] // 16) for w in weights]
    return peak, of("VmHWM") - before, 4 * (16 * 16 * sum(sums) + sum(w.numel() for w in weights))


@bits
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells the peak of memory")
def test_no_activation_of_a_large_batch_is_kept():
    batch = 32768
    (few, few_resident, small), (many, many_resident, large) = grown(4, batch), grown(64, batch)
    room = large - small
    assert room < 60 * 4 * batch  # less than a number per row and layer
    assert many - few <= room
    assert many_resident - few_resident <= room + 4 * 2**20


# gradients and transforms


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradcheck_twice(backend):
    build = Builder(3, 1)
    program = build.program(
        Scale((0, 2), build.weight(2), build.weight(2), True, True), Linear((1, 0), build.matrix(2), build.weight(2), build.weight()),
        build.net((2,), [2, 4], "tanh", context=True), build.affine((0, 1), "softplus", "interleaved"), Prior((0, 1), 1),
        build.net((0, 1), [2, 1], "gelu"), Additive((2,)), outputs=(2, 0),
    )  # fmt: skip
    x, context = rows(build, 2, torch.float64)
    leaves = [v.requires_grad_() for v in (x, context, *build.weights)]
    f = lambda x, context, *weights: ops.flow_program(x, program, weights, context)
    with pyflow.backend(backend):
        assert torch.autograd.gradcheck(f, leaves)
        assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives_of_activations(activation):
    build = Builder(2)
    program = build.program(build.net((0,), [3, 2], activation, arg=0.4), build.affine((1,), "atan", inverse=True))
    leaves = [v.requires_grad_() for v in (rows(build, 2, torch.float64)[0], *build.weights)]
    assert torch.autograd.gradgradcheck(lambda x, *weights: ops.flow_program(x, program, weights), leaves)


def test_reference_backward_is_the_derivative():
    for seed in range(30):
        choices = random.Random(seed)
        build = Builder(5, 2, seed)
        program = drawn(lambda *several, own=choices: own.choice(several), build, 4)
        x, context = rows(build, 6, torch.float64)
        context = context if program.context else None
        given = cotangents(*ref.flow_program(x, context, 1, build.weights, program.encode())[:2])
        needs = True, context is not None, True
        got = ref.flow_program_backward(*given, x, context, 1, build.weights, program.encode(), None, *needs)
        want = exact(x, program, build.weights, context, given)[2:]
        for a, b in zip([g for g in got if g is not None], want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def operator_calls():
    build, program, weights = mixed(torch.float32, 3, 2, (5,), 2)
    x, context = rows(build, 3)
    leaves = [v.clone().requires_grad_() for v in (x, context, *weights)]
    bare = Builder(3)
    plain = bare.program(Scale((0, 2), bare.weight(2), -1), outputs=(2, 0, 2))
    gy, gl = torch.randn(3, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    code, shift = program.encode(), [w.float().requires_grad_() for w in bare.weights]
    stepped = testing.laid_out(x, "stepped").requires_grad_()
    slow = lambda *call: pytest.param(*call, marks=pytest.mark.slow)
    yield "flow_program", (leaves[0], leaves[1], 1, leaves[2:], code, columns_of(code) if COMPILED else 0)
    yield "flow_program_backward", (gy, gl, leaves[0], leaves[1], 1, leaves[2:], code, None, True, True, True)
    yield slow("flow_program", (stepped, None, 1, shift, plain.encode(), 0))
    yield slow("flow_program", (leaves[0], None, 1, [], Program(3, 0, (), (Prior((1,)),)).encode(), 0))
    yield slow("flow_program_backward", (None, gl, x, leaves[1], 1, weights, code, None, False, True, False))
    yield slow("flow_program_backward", (gy, None, stepped, None, 1, shift, plain.encode(), None, True, False, True))


@pytest.mark.parametrize("name, args", list(operator_calls()))
def test_opcheck(name, args):
    torch.library.opcheck(getattr(torch.ops.pyflow, name).default, args)


def test_compiles_without_a_graph_break_to_the_same_bits():
    build, program, weights = mixed(torch.float32, 4, 2, (9,), 2)
    leaves = [v.clone().requires_grad_() for v in (*rows(build, 20), *weights)]

    def both(function, program):
        y, logdet = function(leaves[0] * 1, program, leaves[2:], leaves[1])
        return y, logdet, *torch.autograd.grad(y.square().sum() + logdet.sum(), leaves)

    # torch 2.11 takes the numbers of a second program for symbols else
    compiled = torch.compile(ops.flow_program, fullgraph=True, dynamic=False)
    # a program that is equal as a tuple but for the kinds of its instructions is another program
    others = [program._replace(instructions=(kind((0, 1, 2, 3), 0), *program.instructions[:-1])) for kind in (Prior,)]
    for one in (program, *others):
        for a, b in zip(both(compiled, one), both(ops.flow_program, one), strict=True):
            same(a, b)


def test_equal_tuples_of_other_instructions_are_other_programs():
    x = torch.ones(2, 2)
    net, weights = Net((0,), False, (Dense(0, -1, 1),)), [torch.ones(1, 1)]
    add, prior = (Program(2, 0, (0, 1), (net, last)) for last in (Additive((1,), False), Prior((1,), 0)))
    assert add == prior
    for _ in range(2):
        assert ops.flow_program(x, add, weights)[0][0, 1] == 2
        with pytest.raises(ValueError, match="instruction 1, Prior: a transform must take"):
            ops.flow_program(x, prior, weights)


def test_function_transforms_agree_with_the_reference():
    build, program, weights = mixed(torch.float64, 4, 2, (5,), 2, "tanh")
    x, context = rows(build, 3, torch.float64)

    def f(x, context, weights):
        y, logdet = ops.flow_program(x, program, weights, context)
        return y.square().sum() + logdet.sin().sum()

    stacked = [torch.stack([w, w + 0.1]) for w in weights]
    transforms = {
        "grad": lambda: torch.func.grad(f, (0, 1, 2))(x, context, weights),
        "jacrev": lambda: torch.func.jacrev(lambda x: ops.flow_program(x, program, weights, context))(x),
        "jacfwd": lambda: torch.func.jacfwd(lambda x: ops.flow_program(x, program, weights, context))(x),
        "jvp": lambda: torch.func.jvp(lambda x: f(x, context, weights), (x,), (x.cos(),)),
        "hessian": lambda: torch.func.hessian(lambda x: f(x, context, weights))(x),
        "ensemble": lambda: torch.vmap(lambda w: ops.flow_program(x, program, w, context))(stacked),
        "vmap of grad": lambda: torch.vmap(torch.func.grad(f, (0, 2)), (None, None, 0))(x, context, stacked),
        "per sample": lambda: torch.vmap(torch.func.grad(f, 2), (0, 0, None))(x[:, None], context[:, None], weights),
    }
    for name, transform in transforms.items():
        got = transform()
        with pyflow.backend("reference"):
            torch.testing.assert_close(got, transform(), msg=lambda text, name=name: f"{name}: {text}")


def test_vmap_gives_the_rows_and_records_gradients():
    build, program, weights = mixed(torch.float32, 6, 0)
    x = build.draw(4, 5, 6).float().requires_grad_()
    got = torch.vmap(lambda x: ops.flow_program(x, program, weights))(x)
    want = [torch.stack(v) for v in zip(*(ops.flow_program(each, program, weights) for each in x), strict=True)]
    for a, b in zip(got, want, strict=True):
        same(a, b)
    grads = [torch.autograd.grad(v[0].sum() + v[1].sum(), x)[0] for v in (got, want)]
    same(*grads)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_changes_nothing(backend):
    build, program, weights = mixed()
    x, context = rows(build, 33)
    with pyflow.backend(backend):
        want = run(x, program, weights, context)
        with torch.autocast("cpu", torch.bfloat16):
            got = run(x, program, weights, context)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@bits
def test_modes_see_one_operator_each_way():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            seen.append(str(operator))
            return operator(*args, **(kwargs or {}))

    build, program, weights = mixed()
    x, context = rows(build, 5)
    with Mode():
        run(x, program, weights, context)
    assert [name for name in seen if name.startswith("pyflow.")] == [
        "pyflow.flow_program.default", "pyflow.flow_program_backward.default",
    ]  # fmt: skip


# bad input

X, W = torch.ones(4, 3), [torch.ones(2, 1), torch.ones(2), torch.ones(3, 3), torch.ones(())]
NET = Net((0,), False, (Dense(0, 1, 2),))


def of(*instructions, x=X, weights=W, context=None, **fields):
    return lambda f: f(x, Program(**{"columns": 3, "context": 0, "outputs": (0, 1, 2), "instructions": instructions, **fields}), weights, context)  # fmt: skip


PLAIN = Program(3, 0, (0, 1, 2), ())
GIVEN = PLAIN._replace(context=2)
BAD = [
    (lambda f: f([1.0], PLAIN, W), TypeError, "x must be a tensor, got list"),
    (lambda f: f(X.half(), PLAIN, W), TypeError, "x must be float32 or float64, got float16"),
    (lambda f: f(X.long(), PLAIN, W), TypeError, "x must be float32 or float64, got int64"),
    (lambda f: f(X.to_sparse(), PLAIN, W), TypeError, "x must be a dense tensor, got sparse_coo"),
    (lambda f: f(X[0], PLAIN, W), ValueError, r"x must have two dims, got shape \(3,\)"),
    (lambda f: f(X[None], PLAIN, W), ValueError, r"x must have two dims, got shape \(1, 4, 3\)"),
    (lambda f: f(X, tuple(PLAIN), W), TypeError, "program must be a pyflow.program.Program, got tuple"),
    (lambda f: f(X, PLAIN.encode(), W), TypeError, "program must be a pyflow.program.Program, got str"),
    (lambda f: f(X, PLAIN, torch.ones(2)), TypeError, "weights must be a list, got Tensor"),
    (lambda f: f(X, PLAIN, None), TypeError, "weights must be a list, got NoneType"),
    (of(columns=2.0), ValueError, "program: columns must be an integer of at least 0, got 2.0"),
    (lambda f: f(X, PLAIN._replace(context=-1), W), ValueError, "program: context must be an integer of at least 0, got -1"),
    (lambda f: f(X[:, :2], PLAIN, W), ValueError, "x must have 3 columns, got 2"),
    (lambda f: f(X, PLAIN, W, X), ValueError, "context must be None for a program without, got Tensor"),
    (lambda f: f(X, GIVEN, W), TypeError, "context must be a tensor, got NoneType"),
    (lambda f: f(X, GIVEN, W, X.int()), TypeError, "context must be float32 or float64, got int32"),
    (lambda f: f(X, GIVEN, W, X[0]), ValueError, r"context must have two dims, got shape \(3,\)"),
    (lambda f: f(X, GIVEN, W, X), ValueError, "context must have 2 columns, got 3"),
    (lambda f: f(X, GIVEN, W, X[:, 1:].double()), TypeError, "context must have the dtype of x, float32, got float64"),
    (lambda f: f(X, GIVEN, W, X[:, 1:].to("meta")), ValueError, "context must be on the device of x, cpu, got meta"),
    (lambda f: f(X, PLAIN, [X, 2.0]), TypeError, r"weights\[1\] must be a tensor, got float"),
    (lambda f: f(X, PLAIN, [X, None]), TypeError, r"weights\[1\] must be a tensor, got NoneType"),
    (lambda f: f(X, PLAIN, [X.to_sparse()]), TypeError, r"weights\[0\] must be a dense tensor, got sparse_coo"),
    (lambda f: f(X, PLAIN, [X, X.double()]), TypeError, r"weights\[1\] must have the dtype of x, float32, got float64"),
    (lambda f: f(X, PLAIN, [X.to("meta")]), ValueError, r"weights\[0\] must be on the device of x, cpu, got meta"),
    (of(outputs=[0]), ValueError, r"outputs: columns must be a tuple of integers, got \[0\]"),
    (of(outputs=(0, 3)), ValueError, r"outputs: columns must be 0 to 2, got \(0, 3\)"),
    (of(outputs=(-1,)), ValueError, r"outputs: columns must be 0 to 2, got \(-1,\)"),
    (of(instructions=[]), ValueError, "instructions must be a tuple, got list"),
    (of(instructions=None), ValueError, "instructions must be a tuple, got NoneType"),
    (of("scale"), ValueError, "instruction 0, str: it must be one of pyflow.program's instructions"),
    (of(NET, Dense(0, 1, 2)), ValueError, "instruction 1, Dense: it must be one of pyflow.program's instructions"),
    (of(tuple(NET)), ValueError, "instruction 0, tuple: it must be one of pyflow.program's instructions"),
    (of(Scale([0], -1, -1)), ValueError, r"instruction 0, Scale: columns must be a tuple of integers, got \[0\]"),
    (of(Scale((0.0,), -1, -1)), ValueError, r"instruction 0, Scale: columns must be a tuple of integers, got \(0.0,\)"),
    (of(Scale((3,), -1, -1)), ValueError, r"instruction 0, Scale: columns must be 0 to 2, got \(3,\)"),
    (of(Scale((1, 1), -1, -1)), ValueError, r"instruction 0, Scale: columns must differ, got \(1, 1\)"),
    (of(Scale((0, 1), 4, -1)), ValueError, "instruction 0, Scale: shift must be the place of one of 4 weights, got 4"),
    (of(Scale((0, 1), -2, 1)), ValueError, "instruction 0, Scale: shift must be the place of one of 4 weights, got -2"),
    (of(Scale((0, 1), None, 1)), ValueError, "instruction 0, Scale: shift must be the place of one of 4 weights, got None"),
    (of(Scale((0, 1), 1, 1.0)), ValueError, "instruction 0, Scale: log_scale must be the place of one of 4 weights, got 1.0"),
    (of(Scale((0,), 1, -1)), ValueError, r"instruction 0, Scale: shift must have the shape \(1,\), got \(2,\)"),
    (of(Scale((0,), -1, 2)), ValueError, r"instruction 0, Scale: log_scale must have the shape \(1,\), got \(3, 3\)"),
    (of(Scale((0,), -1, -1, None)), ValueError, "instruction 0, Scale: shift_first must be true or false, got None"),
    (of(Scale((0,), -1, -1, False, "no")), ValueError, "instruction 0, Scale: inverse must be true or false, got 'no'"),
    (of(Linear((0, 1, 1), 2)), ValueError, r"instruction 0, Linear: columns must differ, got \(0, 1, 1\)"),
    (of(Linear((0, 1, 2), -1)), ValueError, "instruction 0, Linear: weight must be the place of one of 4 weights, got -1"),
    (of(Linear((0, 1), 2)), ValueError, r"instruction 0, Linear: weight must have the shape \(2, 2\), got \(3, 3\)"),
    (of(Linear((0, 1, 2), 2, 1)), ValueError, r"instruction 0, Linear: bias must have the shape \(3,\), got \(2,\)"),
    (of(Linear((0, 1, 2), 2, -1, 1)), ValueError, r"instruction 0, Linear: logdet must have the shape \(\), got \(2,\)"),
    (of(NET._replace(columns=(0, 5))), ValueError, r"instruction 0, Net: columns must be 0 to 2, got \(0, 5\)"),
    (of(NET._replace(context=True)), ValueError, "instruction 0, Net: context must be false in a program without context"),
    (of(NET._replace(context="")), ValueError, "instruction 0, Net: context must be true or false, got ''"),
    (of(NET._replace(parts=())), ValueError, r"instruction 0, Net: parts must be a tuple of at least one, got \(\)"),
    (of(NET._replace(parts=None)), ValueError, "instruction 0, Net: parts must be a tuple of at least one, got None"),
    (of(NET._replace(parts=((0, 1, 2, 0, 0.0),))), ValueError, r"instruction 0, Net: parts must be of pyflow.program's parts of a net, got \(0, 1, 2, 0, 0.0\)"),
    (of(NET._replace(parts=(Dense(0, 1, 0),))), ValueError, r"instruction 0, Net: a layer must be Dense of at least one output, got Dense\(.*size=0.*\)"),
    (of(NET._replace(columns=(0, 1)), Additive((1, 2))), ValueError, r"instruction 0, Net: weight must have the shape \(2, 2\), got \(2, 1\)"),
    (of(NET._replace(parts=(Dense(-1, 1, 2),))), ValueError, "instruction 0, Net: weight must be the place of one of 4 weights, got -1"),
    (of(NET._replace(parts=(Dense(0, 3, 2),)), Additive((1, 2))), ValueError, r"instruction 0, Net: bias must have the shape \(2,\), got \(\)"),
    (of(NET._replace(parts=(Dense(0, 1, 2, 9),))), ValueError, "instruction 0, Net: activation must be 0 to 8, got 9"),
    (of(NET._replace(parts=(Dense(0, 1, 2, "relu"),))), ValueError, "instruction 0, Net: activation must be 0 to 8, got 'relu'"),
    (of(NET._replace(parts=(Dense(0, 1, 2, 2, "x"),))), ValueError, "instruction 0, Net: arg must be a number, at least 0 and finite, got 'x'"),
    (of(NET._replace(parts=(Dense(0, 1, 2, 2, math.inf),))), ValueError, "instruction 0, Net: arg must be a number, at least 0 and finite, got inf"),
    (of(Additive((0,))), ValueError, "instruction 0, Additive: the conditioner before it must return 1 numbers, got 0"),
    (of(NET, Additive((0,))), ValueError, "instruction 1, Additive: the conditioner before it must return 1 numbers, got 2"),
    (of(NET, Additive((1, 2)), Additive((1, 2))), ValueError, "instruction 2, Additive: the conditioner before it must return 2 numbers, got 0"),
    (of(NET), ValueError, "instruction 0, Net: a transform must take what the last conditioner returns"),
    (of(NET, Additive((1, 2)), NET, Prior((1,))), ValueError, "instruction 3, Prior: a transform must take what the last conditioner returns"),
    (of(NET, NET, Additive((1, 2))), ValueError, "instruction 1, Net: a transform must take what the conditioner before it returns"),
    (of(NET, Additive((1, 1))), ValueError, r"instruction 1, Additive: columns must differ, got \(1, 1\)"),
    (of(NET, Additive((1, 2), 0.0)), ValueError, "instruction 1, Additive: inverse must be true or false, got 0.0"),
    (of(NET, Affine((1, 2), 0, 0, 0.0)), ValueError, "instruction 1, Affine: the conditioner before it must return 4 numbers, got 2"),
    (of(NET, Affine((1,), 8, 0, 0.0)), ValueError, "instruction 1, Affine: scale_map must be 0 to 7, got 8"),
    (of(NET, Affine((1,), 0, 4, 0.0)), ValueError, "instruction 1, Affine: packing must be 0 to 3, got 4"),
    (of(NET, Affine((1,), 0, 0, -1.0)), ValueError, "instruction 1, Affine: map_arg must be a number, at least 0 and finite, got -1.0"),
    (of(NET, Affine((1,), 0, 0, math.nan)), ValueError, "instruction 1, Affine: map_arg must be a number, at least 0 and finite, got nan"),
    (of(NET, Affine((1,), SCALE_MAPS.index("tanh"), 0, 0.0)), ValueError, "instruction 1, Affine: map_arg must be positive for tanh, got 0.0"),
    (of(NET, Affine((1,), 0, 0, 0.0, X)), ValueError, "instruction 1, Affine: shift_first must be true or false, got Tensor"),
    (of(Prior((3,))), ValueError, r"instruction 0, Prior: columns must be 0 to 2, got \(3,\)"),
    (of(Prior((0,), 2)), ValueError, "instruction 0, Prior: prior must be 0 to 1, got 2"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("call, error, text", BAD)
def test_bad_input_gets_one_sentence(call, error, text, backend):
    with pyflow.backend(backend), pytest.raises(error, match=f"^flow_program: {text}$"):
        call(ops.flow_program)


def test_a_class_of_an_instructions_name_is_none():
    class Prior(tuple):
        columns, prior = (0,), 0

    with pytest.raises(ValueError, match=r"instruction 0, Prior: it must be one of pyflow.program's instructions"):
        of(Prior())(ops.flow_program)


FLOW = Program(3, 0, (0, 1, 2), (NET, Affine((1,), 0, 0, 0.0)))
TEXTS = {
    "empty": "", "words": "no program", "cut": FLOW.encode()[:20], "longer": f"{FLOW.encode()} 1", "huge": "3 0 1 0 1 99999999999999 0",
    "column": FLOW._replace(outputs=(5,)).encode(), "negative column": FLOW._replace(outputs=(-1,)).encode(),
    "columns": FLOW._replace(columns=4).encode(), "context": FLOW._replace(context=2).encode(),
    "place": FLOW._replace(instructions=(NET._replace(parts=(Dense(7, 1, 2),)),)).encode(),
    "negative place": FLOW._replace(instructions=(NET._replace(parts=(Dense(-5, 1, 2),)),)).encode(),
    "shape": FLOW._replace(instructions=(NET._replace(parts=(Dense(2, 1, 2),)),)).encode(),
    "size": FLOW._replace(instructions=(NET._replace(parts=(Dense(0, 1, 2000),)),)).encode(),
    "activation": FLOW._replace(instructions=(NET._replace(parts=(Dense(0, 1, 2, 99),)),)).encode(),
    "numbers": FLOW._replace(instructions=(NET, Affine((1, 2), 0, 0, 0.0))).encode(),
    "no conditioner": FLOW._replace(instructions=(Additive((1, 2)),)).encode(),
    "scale_map": FLOW._replace(instructions=(NET, Affine((1,), 99, 0, 0.0))).encode(),
    "packing": FLOW._replace(instructions=(NET, Affine((1,), 0, 99, 0.0))).encode(),
    "prior": FLOW._replace(instructions=(Prior((0,), 9),)).encode(),
}  # fmt: skip


@bits
@pytest.mark.parametrize(
    "text",
    TEXTS.values(),
    ids=TEXTS.keys(),
)
def test_operators_refuse_what_kernels_do_not_take(text):
    for call in operators(X, W, text):
        with pytest.raises(RuntimeError, match="flow_program"):
            call()


def operators(x, weights, text):
    """Calls past the checks of the public function."""
    yield lambda: torch.ops.pyflow.flow_program(x, None, 1, weights, text, 0)
    yield lambda: torch.ops.pyflow.flow_program_backward(
        None, x[:, 0], x, None, 1, weights, text, None, True, False, True
    )


WIDE = Net((0,) * 500, False, (Dense(0, -1, 1),))
SCALED = Program(500, 0, (0,), (Scale(tuple(range(500)), 0, 0),))


@bits
@pytest.mark.parametrize(
    "x, weights, program",
    [
        (X.half(), [w.half() for w in W], FLOW),
        (X.long(), [w.long() for w in W], FLOW),
        (X, [W[0].double(), *W[1:]], FLOW),
        (X, [torch.ones(500, 1)], PLAIN._replace(instructions=(WIDE, Additive((1,))))),
        (X, [torch.ones(500)], PLAIN._replace(instructions=(WIDE, Additive((1,))))),
        (torch.ones(40, 500), [torch.ones(500, 1)], SCALED),
    ],
    ids=["half", "integers", "two dtypes", "transposed", "flat", "matrix for vector"],
)
def test_operators_refuse_tensors_that_do_not_fit(x, weights, program):
    for call in operators(x, weights, program.encode()):
        with pytest.raises(RuntimeError, match="flow_program"):
            call()
