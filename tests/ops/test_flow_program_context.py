"""Contexts with fewer rows than x: the bits of a context that is repeated, and its gradients summed."""

from __future__ import annotations

import pytest
import torch

import pyflow
from pyflow import ops, testing
from pyflow.program import Activation, Additive, Affine, Context, Dense, Net, Periodic, Prior, Residual
from pyflow.reference import flow_program as ref

from .programs import Builder
from .test_flow_program import COMPILED, DTYPES, bits, cotangents, gradients, mixed, same

C = 60  # enough columns for products that rows share
# rows of x, of the context, repeats
SHARED = [
    (150, 1, 1), (150, 1, 150), (150, 1, 3), (150, 3, 50), (150, 3, 1), (150, 50, 1), (150, 75, 2), (150, 5, 10),
    (2, 1, 1), (1, 1, 1),
]  # fmt: skip


def parts(build, first, inner):
    """Layers from `first` numbers to two, with contexts in between."""
    gate, more = (Context(build.dense(C, 9, name), name == "sigmoid") for name in ("sigmoid", "relu"))
    block = Residual((Activation(3), build.dense(9, 9), gate))
    return *inner, build.dense(first, 9, "silu"), more, block, build.dense(9, 2)


def blocks():
    """Contexts in blocks, after one of the inputs; and nets whose first part is no layer."""
    build = Builder(4, C)
    weights = [build.weight(2) for _ in range(4)]
    build.constants.add(weights[0])
    waves, turned = Periodic((0, 3), *weights), Residual((build.dense(2 + C, 2 + C, "tanh"),))
    nets = [Net((0, 1), True, parts(build, 2 + C, inner)) for inner in ((), (waves,), (turned,), (Activation(3),))]
    blind = Net((), True, (build.dense(C, 2),))
    steps = [step for net in (*nets, blind) for step in (net, Affine((2,), 0, 0, 0.0))]
    return build, build.program(*steps, Prior((0, 1, 2, 3)))


def undone(context, residual):
    build = Builder(5, C)
    net, transform = build.made(
        (3, 0, 1), (9, 9), Affine((3, 0, 1), 0, 2, 0.0), order=(1, 0, 2), kept=(2,), context=context, residual=residual
    )  # fmt: skip
    return build, build.program(build.undo(net, transform))


PROGRAMS = {
    "inputs": lambda: mixed(context=C)[:2], "blocks": blocks,
    **{f"undone, {name}": lambda name=name: undone(name, name != "inputs") for name in ("inputs", "add", "gate")},
}  # fmt: skip


def run(x, program, weights, context, repeats):
    """y, logdet, and the gradients of x, weights and the context."""
    leaves = [v.detach().requires_grad_() for v in (x, *weights, context)]
    out = ops.flow_program(leaves[0], program, leaves[1:-1], leaves[-1], repeats)
    with torch.no_grad():
        alone = ops.flow_program(x, program, weights, context, repeats)
    for a, b in zip(alone, out, strict=True):
        same(a, b, "without gradients")
    return [*(v.detach() for v in out), *gradients(out, leaves, cotangents(*out))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_shared_context_is_a_repeated_one(name, dtype):
    build, program = PROGRAMS[name]()
    weights = [w.to(dtype) for w in build.weights]
    for batch, count, repeats in SHARED:
        x, context = build.draw(batch, build.columns).to(dtype), build.draw(count, C).to(dtype)
        whole = context.repeat_interleave(repeats, 0).repeat(batch // (count * repeats), 1)
        *got, of_context = run(x, program, weights, context, repeats)
        *want, of_rows = run(x, program, weights, whole, 1)
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            same(a, b, f"{(batch, count, repeats)}, result {i}")
        of_rows = of_rows.double().view(-1, count, repeats, C)
        # a kernel sums in float64
        terms = 1 if COMPILED and dtype == torch.float32 else batch
        bound = terms * testing.UNIT[dtype] * (1 + of_rows.abs().sum((0, 2)))
        testing.assert_within(of_context, of_rows.sum((0, 2)), bound)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_are_those_of_the_reference(backend):
    build, program = blocks()
    with pyflow.backend(backend):
        for batch, count, repeats in [(12, 1, 1), (12, 2, 3), (12, 4, 3), (0, 3, 1), (0, 0, 2)]:
            x, context = build.draw(batch, 4), build.draw(count, C)
            *got, of_context = run(x, program, build.weights, context, repeats)
            leaves = [v.detach().requires_grad_() for v in (x, *build.weights, context)]
            whole = ref.of_rows(leaves[-1], batch, repeats) if batch else x.new_zeros(0, C)
            out = ref.flow_program(leaves[0], whole, 1, leaves[1:-1], program.encode())[:2]
            want = [*(v.detach() for v in out), *gradients(out, leaves, cotangents(*out))]
            for a, b in zip((*got, of_context), want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@bits
def test_an_expanded_row_is_one_row():
    build, program = blocks()
    weights, x, row = [w.float() for w in build.weights], build.draw(150, 4).float(), build.draw(1, C).float()
    for context in (row.expand(150, -1), row):
        leaf = context.detach().requires_grad_()
        out = ops.flow_program(x, program, weights, leaf)
        for a, b in zip(out, ops.flow_program(x, program, weights, row.repeat(150, 1)), strict=True):
            testing.assert_same_bits(a, b)
        assert torch.autograd.grad(out[1].sum(), leaf)[0].shape == leaf.shape


@bits
def test_views_and_threads():
    build, program = blocks()
    weights, x, context = [w.float() for w in build.weights], build.draw(600, 4).float(), build.draw(6, C).float()
    plain = run(x, program, weights, context, 100)
    for kind in ("transposed", "stepped"):
        for a, b in zip(run(x, program, weights, testing.laid_out(context, kind), 100), plain, strict=True):
            testing.assert_same_bits(a, b, kind)
    for count in (1, 3):
        with testing.threads(count):
            for a, b in zip(run(x, program, weights, context, 100), plain, strict=True):
                testing.assert_same_bits(a, b, f"{count} threads")


def test_gradients_of_gradients_and_transforms():
    build, program, weights = mixed(torch.float64, 4, 2, (5,), 2, "tanh")
    x, context = build.draw(4, 4), build.draw(2, 2)
    leaves = [v.clone().requires_grad_() for v in (x, context, *weights)]
    for repeats in (1, 2):
        call = lambda x, context, *own, repeats=repeats: ops.flow_program(x, program, own, context, repeats)
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
        got = torch.vmap(lambda c, call=call: call(x, c, *weights))(torch.stack([context, context.flip(0)]))
        want = [call(x, c, *weights) for c in (context, context.flip(0))]
        for a, b in zip(got, zip(*want, strict=True), strict=True):
            torch.testing.assert_close(a, torch.stack(b))
        logdet = lambda c, call=call: call(x, c, *weights)[1]
        jacobian = torch.autograd.functional.jacobian(logdet, context)
        torch.testing.assert_close(torch.func.jacrev(logdet)(context), jacobian)


def test_opcheck():
    build, program, weights = mixed(torch.float32, 3, 2, (5,), 2)
    x, context = build.draw(6, 3).float().requires_grad_(), build.draw(2, 2).float().requires_grad_()
    args = x, context, 3, [w.clone().requires_grad_() for w in weights], program.encode(), 0
    torch.library.opcheck(torch.ops.pyflow.flow_program.default, args)


@pytest.mark.slow
def test_compiles_for_any_number_of_rows():
    build, program, weights = mixed(torch.float32, 4, C, (9,), 2)

    def draws(x, context):
        each = ops.flow_program(x, program, weights, context, x.shape[0] // context.shape[0])
        return *each, *ops.flow_program(x, program, weights, context)

    compiled = torch.compile(draws, fullgraph=True, dynamic=True)
    for batch, count in [(40, 4), (60, 3), (64, 8)]:
        x, context = build.draw(batch, 4).float(), build.draw(count, C).float()
        for a, b in zip(compiled(x, context), draws(x, context), strict=True):
            same(a, b)


X, GIVEN = torch.zeros(4, 3), Net((0,), True, (Dense(0, -1, 2),))
BAD = [
    (3, 1, ValueError, "rows of context times repeats must divide the rows of x, 4, got 3 times 1"),
    (2, 4, ValueError, "rows of context times repeats must divide the rows of x, 4, got 2 times 4"),
    (0, 1, ValueError, "rows of context times repeats must divide the rows of x, 4, got 0 times 1"),
    (2, 0, ValueError, "repeats must be at least 1, got 0"),
    (2, 2.0, TypeError, "repeats must be an integer, got float"),
]


@pytest.mark.parametrize("count, repeats, error, text", BAD)
def test_bad_input_gets_one_sentence(count, repeats, error, text):
    program = Builder(3, 2).program(GIVEN, Additive((1, 2)))
    with pytest.raises(error, match=f"^flow_program: {text}$"):
        ops.flow_program(X, program, [torch.zeros(2, 3)], torch.zeros(count, 2), repeats)


@bits
@pytest.mark.parametrize("count, repeats", [(3, 1), (2, 4), (0, 1), (2, 0), (1, 2**62), (4, -1)])
def test_operators_refuse_what_kernels_do_not_take(count, repeats):
    code = Builder(3, 2).program(GIVEN, Additive((1, 2))).encode()
    with pytest.raises(RuntimeError, match="flow_program"):
        torch.ops.pyflow.flow_program(X, torch.zeros(count, 2), repeats, [torch.zeros(2, 3)], code, 0)
