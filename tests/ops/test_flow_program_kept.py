"""What the forward of a program leaves to its backward: how much, its bits, and when."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import pyflow
from pyflow import _kept, ops, testing
from pyflow.program import (
    ACTIVATIONS,
    Activation,
    Additive,
    Context,
    Elementwise,
    Linear,
    Multiplicative,
    Norm,
    Prior,
    Residual,
)

from .programs import Builder, drawn
from .test_flow_program import DTYPES, bits, cotangents, rows

try:
    import resource
except ImportError:
    resource = None

THREADS = torch.get_num_threads()
WIDE, INPUTS = 50, _kept.INPUTS
run = torch.ops.pyflow.flow_program
run_backward = torch.ops.pyflow.flow_program_backward


def check(build, program, batch, dtype=torch.float32):
    """Results are the same bits, and a second backward finds what the first one did."""
    x, context = rows(build, batch, dtype)
    context = context if program.context else None
    given = x, context, 1, [w.to(dtype) for w in build.weights], program.encode()
    columns = _kept.columns_of(given[-1])
    # the kernel takes no other number
    *out, kept = run(*given, columns)
    *want, none = run(*given, 0)
    assert none.numel() == 0 and kept.shape == _kept.kept_shape(batch, columns)
    for a, b in zip(out, want, strict=True):
        testing.assert_same_bits(a, b)
    grads, before = cotangents(*out), kept.clone()
    for needs in (True, context is not None, True), (True, False, False):
        got = run_backward(*grads, *given, kept, *needs)
        for a, b in zip(got, run_backward(*grads, *given, None, *needs), strict=True):
            testing.assert_same_bits(a, b)
    testing.assert_same_bits(kept, before)
    return columns


@bits
@pytest.mark.parametrize("dtype", DTYPES)
def test_drawn_programs(dtype):
    kept = 0
    for seed in range(60):
        choices = random.Random(seed)
        build = Builder(5, 2, seed)
        program = drawn(lambda *several, own=choices: own.choice(several), build, 4)
        # 16 groups of 160 rows have tiles of 96 and of 64
        kept += check(build, program, 97 if seed % 8 else 2300, dtype) > 0
    assert kept > 30


@bits
@pytest.mark.parametrize("batch", [1, 16, 97])
def test_all_that_is_kept_is_written(batch):
    """Blocks of fewer rows than the multiple that is kept leave no memory as it was."""
    build = Builder(4, 2)
    program, (x, context) = wide(build), rows(build, batch)
    given = x, context, 1, [w.float() for w in build.weights], program.encode()
    columns = _kept.columns_of(given[-1])
    first = run(*given, columns)[2].clone()
    for value in (float("nan"), 7.0):
        # freed memory is what the next call gets
        run(*given, columns)[2].fill_(value)
        testing.assert_same_bits(run(*given, columns)[2], first)


def wide(build, activation="relu"):
    """Every part behind a layer that is kept, and every transform."""
    of = lambda inputs, size: build.dense(inputs, size, activation)
    inside = of(WIDE, WIDE), Context(build.dense(2, WIDE, activation), True), of(WIDE, WIDE)
    behind = [
        (Residual(inside), Residual((of(WIDE, WIDE),))),
        (of(WIDE, WIDE), Activation(ACTIVATIONS.index("tanh")), Norm(-1, -1, 1e-5)),
        (of(WIDE, WIDE), Norm(build.weight(WIDE), -1, 1e-5), Elementwise(build.weight(WIDE), -1)),
        (of(WIDE, WIDE), Elementwise(-1, build.weight(WIDE)), Context(build.dense(2, WIDE), False)),
    ]
    spline = build.spline((0, 3), variant="normflows")
    transforms = [build.affine((1, 2)), Multiplicative((0, 3)), Additive((1, 2)), spline]
    instructions = []
    for parts, transform, columns in zip(behind, transforms, [(0, 3), (1, 2), (0, 3), (1, 2)], strict=True):
        numbers = {Multiplicative: 2, Additive: 2}.get(type(transform), 4)
        numbers = 2 * (2 * transform.bins + transform.slopes) if transform is spline else numbers
        net = build.net(columns, (WIDE, numbers), activation, context=True)
        first, last = net.parts
        instructions += [net._replace(parts=(first, *parts, last)), transform]
    turned = build.spline((0, 1), "circular", variant="zuko", own=True, turned=True)
    linear = Linear((0, 1, 2), build.matrix(3))
    return build.program(*instructions, turned, linear, turned._replace(inverse=True), Prior((0, 2)))


@bits
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sizes_of_every_part(activation):
    build = Builder(4, 2)
    numbers = 2 * (2 * 4 + 3)
    layers = 3 * WIDE + 3 * WIDE + (4 + 2 + 2 + numbers)
    assert check(build, wide(build, activation), 70) == layers + 2 + 2 + 2 + 2 * 2


@bits
@pytest.mark.parametrize("inputs", [INPUTS - 1, INPUTS])
def test_layers_with_many_inputs_are_kept(inputs):
    build = Builder(2)
    program = build.program(build.net((0,), (inputs, 3, 1), "silu"), Additive((1,)))
    assert check(build, program, 33) == (3 if inputs == INPUTS else 0)
    if inputs == INPUTS:
        x, weights = rows(build, 3)[0], [w.float() for w in build.weights]
        for other in (2, 4, -1):
            with pytest.raises(RuntimeError, match="flow_program"):
                run(x, None, 1, weights, program.encode(), other)


def made(batch):
    build = Builder(4, 2)
    program = wide(build)
    x, context = rows(build, batch)
    return program, [w.float().requires_grad_() for w in build.weights], x, context


def saved(*call):
    """What is kept for the backward of a call."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.flow_program(*call)
    return kept


@bits
def test_what_autograd_saves(monkeypatch):
    program, weights, x, context = made(65)
    x.requires_grad_()
    *arguments, kept = saved(x, program, weights, context)
    places = {t.data_ptr() for t in (x, context, *weights)}
    assert {t.data_ptr() for t in arguments} == places
    assert kept.shape == (96, _kept.columns_of(program.encode()))
    monkeypatch.setattr(_kept, "MOST", 0)
    assert {t.data_ptr() for t in saved(x, program, weights, context) if t.numel()} == places


@bits
def test_when_something_is_kept(monkeypatch):
    program, weights, x, context = made(64)
    code = program.encode()
    columns, constants = _kept.columns_of(code), [w.detach() for w in weights]
    to_keep = lambda x=x, context=context, weights=weights: _kept.columns_to_keep(x, context, weights, code)
    assert to_keep() == to_keep(x.clone().requires_grad_(), weights=constants) == columns > 0
    assert to_keep(weights=constants) == 0
    # rows of x that share a row of the context
    assert to_keep(context=context[:32]) == to_keep(context=context[:1].expand(64, -1)) == 0
    with torch.no_grad():
        assert to_keep() == 0
    with pyflow.backend("reference"):
        assert to_keep() == 0
    seen = []
    torch.func.grad(lambda x: (seen.append(to_keep(x)), x.sum())[1])(x)
    torch.compile(lambda x: (seen.append(to_keep(x)), x + 1)[1], backend="eager")(x)
    assert seen == [0, 0]
    for most, want in ((64 * columns, columns), (64 * columns - 1, 0)):
        monkeypatch.setattr(_kept, "MOST", most)
        assert to_keep() == want


@bits
@pytest.mark.skipif(resource is None, reason="the system does not count page faults")
def test_memory_is_used_again():
    build = Builder(16)
    code = build.real_nvp((400, 400), 4).encode()
    x, weights = rows(build, 1024)[0], [w.float() for w in build.weights]
    columns = _kept.columns_of(code)

    def call():
        kept = run(x, None, 1, weights, code, columns)[2]
        run_backward(None, x[:, 0], x, None, 1, weights, code, kept, True, False, True)

    pages = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    before = pages()
    for _ in range(10):
        call()
    # what is kept alone has 1680 pages of 4 KB
    assert columns == 1680 and pages() - before < 10 * 800


@bits
def test_what_does_not_fit():
    program, weights, x, context = made(64)
    given = x, context, 1, [w.detach() for w in weights], program.encode()
    y, logdet, kept = run(*given, _kept.columns_of(given[-1]))
    for other in (kept[:32], kept[:, 1:], kept.double(), kept.flatten(), kept.mT.contiguous().mT):
        with pytest.raises(RuntimeError, match="flow_program"):
            run_backward(y, logdet, *given, other, True, True, True)


@pytest.mark.parametrize("batch", [0, 1, 33])
def test_backward_twice(batch):
    program, weights, x, context = made(batch)
    density = ops.flow_program(x, program, weights, context)[1].sum()
    first, second = (torch.autograd.grad(density, weights, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        testing.assert_same_bits(a, b)


@bits
def test_threads_do_not_share_memory():
    program, weights, x, context = made(65)

    def train(rows_of_x):
        density = ops.flow_program(x[:rows_of_x], program, weights, context[:rows_of_x])[1].sum()
        return torch.autograd.grad(density, weights)

    sizes = [1, 31, 64, 65] * 12
    want = {size: train(size) for size in set(sizes)}
    with ThreadPoolExecutor(4) as pool:
        for size, got in zip(sizes, pool.map(train, sizes), strict=True):
            for a, b in zip(got, want[size], strict=True):
                testing.assert_same_bits(a, b)


@bits
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_child_process_takes_memory():
    program, weights, x, context = made(65)
    torch.set_num_threads(1)
    try:
        ops.flow_program(x, program, weights, context)[1].sum().backward()
        child = os.fork()
        if child == 0:
            failed = 1
            try:
                failed = int(not ops.flow_program(x, program, weights, context)[1].isfinite().all())
            finally:
                # not the tests that come after this one
                os._exit(failed)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(THREADS)
