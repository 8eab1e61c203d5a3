"""The tape that the forward of a program leaves to its backward: its size, its bits, and when it is kept."""

from __future__ import annotations

import random

import pytest
import torch

import pyflow
from pyflow import _tape, ops, testing
from pyflow.program import ACTIVATIONS, Additive, Autoregressive, Context, Norm, Residual

from .programs import Builder, drawn
from .test_flow_program import DTYPES, bits, cotangents, mixed, rows

try:
    import resource
except ImportError:
    resource = None

run = torch.ops.pyflow.flow_program
run_backward = torch.ops.pyflow.flow_program_backward


def programs(count):
    """Drawn programs without an autoregressive inverse, which keeps no tape."""
    for seed in range(count):
        choices = random.Random(seed)
        build = Builder(5, 2, seed)
        program = drawn(lambda *several, own=choices: own.choice(several), build, 4)
        if not any(isinstance(instruction, Autoregressive) for instruction in program.instructions):
            yield build, program


@bits
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_the_same_bits_with_a_tape(dtype):
    columns = set()
    for i, (build, program) in enumerate(programs(120)):
        # 16 groups of 160 rows have tiles of 96 and of 64
        batch = 97 if i % 8 else 2300
        x, context = rows(build, batch, dtype)
        context = context if program.context else None
        given = x, context, 1, [w.to(dtype) for w in build.weights], program.encode()
        columns.add(kept := _tape.size_of(given[-1]).columns)
        # the kernel takes no other size
        *out, tape = run(*given, kept)
        *want, none = run(*given, 0)
        assert none.numel() == 0 and tape.shape == (_tape.tape_shape(batch, kept) if kept else (0,))
        for a, b in zip(out, want, strict=True):
            testing.assert_same_bits(a, b)
        grads, before = cotangents(*out), tape.clone()
        for needs in (True, context is not None, True), (True, False, False):
            got = run_backward(*grads, *given, tape, *needs)
            for a, b in zip(got, run_backward(*grads, *given, None, *needs), strict=True):
                testing.assert_same_bits(a, b)
        assert torch.equal(tape.nan_to_num(), before.nan_to_num())  # for a second backward
    assert len(columns) > 30


@bits
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gate", [False, True])
def test_the_size_of_every_part(activation, gate):
    build = Builder(3, 2)
    inside = build.dense(4, 4, activation), Context(build.dense(2, 4, activation), gate), Norm(-1, -1, 1e-5)
    net = build.net((0,), (4, 4, 2), activation)
    parts = (*net.parts[:1], Residual(inside), *net.parts[1:])
    program = build.program(net._replace(parts=parts), Additive((1, 2)))
    x, context = rows(build, 3)
    columns, multiply_adds = _tape.size_of(program.encode())
    assert multiply_adds == 4 + 16 + 8 + 16 + 8
    weights = [w.float() for w in build.weights]
    assert run(x, context, 1, weights, program.encode(), columns)[2].shape == (32, columns)
    for other in (columns - 1, columns + 1, -1):
        with pytest.raises(RuntimeError, match="flow_program"):
            run(x, context, 1, weights, program.encode(), other)


def saved(*call):
    """What is kept for the backward of a call."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.flow_program(*call)
    return kept


@bits
def test_the_arguments_and_the_tape_are_kept(monkeypatch):
    build, program, weights = mixed()
    x, context = (v.requires_grad_() for v in rows(build, 65))
    leaves = [w.clone().requires_grad_() for w in weights]
    *kept, tape = saved(x, program, leaves, context)
    places = {t.data_ptr() for t in (x, context, *leaves)}
    assert {t.data_ptr() for t in kept} == places
    assert tape.shape == (96, _tape.size_of(program.encode()).columns)
    monkeypatch.setattr(_tape, "FEW", 0)
    assert {t.data_ptr() for t in saved(x, program, leaves, context) if t.numel()} == places


@bits
def test_when_a_tape_is_kept(monkeypatch):
    build, program, weights = mixed()
    x, context = rows(build, 64)
    leaves, code = [w.clone().requires_grad_() for w in weights], program.encode()
    columns, multiply_adds = _tape.size_of(code)
    kept = lambda x=x, context=context, weights=leaves: _tape.kept_columns(x, context, weights, code)
    assert kept() == kept(x.clone().requires_grad_(), weights=weights) == columns
    assert kept(weights=weights) == 0
    # rows of x that share a row of the context
    assert kept(context=context[:32]) == kept(context=context[:1].expand(64, -1)) == 0
    with torch.no_grad():
        assert kept() == 0
    with pyflow.backend("reference"):
        assert kept() == 0
    seen = []
    torch.func.grad(lambda x: (seen.append(kept(x)), x.sum())[1])(x)
    torch.compile(lambda x: (seen.append(kept(x)), x + 1)[1], backend="eager")(x)
    assert seen == [0, 0]
    numbers = columns * 64
    for few, most, worth, want in [
        (numbers, 0, 0, columns), (numbers - 1, numbers, multiply_adds / columns, columns),
        (numbers - 1, numbers - 1, 0, 0), (numbers - 1, numbers, multiply_adds / columns + 1, 0),
    ]:  # fmt: skip
        for name, value in (("FEW", few), ("MOST", most), ("WORTH", worth)):
            monkeypatch.setattr(_tape, name, value)
        assert kept() == want


@bits
@pytest.mark.skipif(resource is None, reason="the system does not count page faults")
def test_the_memory_of_a_tape_is_used_again():
    build = Builder(16)
    code = build.real_nvp((200, 200), 4).encode()
    x, weights = rows(build, 1024)[0], [w.float() for w in build.weights]
    columns = _tape.size_of(code).columns
    pages = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call = lambda: run_backward(None, x[:, 0], x, None, 1, weights, code, run(x, None, 1, weights, code, columns)[2], True, False, True)  # fmt: skip
    call()
    before = pages()
    for _ in range(10):
        call()
    # the tape alone has 1760 pages of 4 KB
    assert columns == 1760 and pages() - before < 10 * 900


@bits
def test_a_tape_that_does_not_fit():
    build, program, weights = mixed()
    x, context = rows(build, 64)
    code = program.encode()
    columns = _tape.size_of(code).columns
    y, logdet, tape = run(x, context, 1, weights, code, columns)
    for other in (tape[:32], tape[:, 1:], tape.double(), tape.flatten(), tape.mT.contiguous().mT):
        with pytest.raises(RuntimeError, match="flow_program"):
            run_backward(y, logdet, x, context, 1, weights, code, other, True, True, True)


@pytest.mark.parametrize("rows_of_x", [0, 1, 33])
def test_backward_twice_and_few_rows(rows_of_x):
    build, program, weights = mixed()
    x, context = rows(build, rows_of_x)
    leaves = [w.clone().requires_grad_() for w in weights]
    density = ops.flow_program(x, program, leaves, context)[1].sum()
    first, second = (torch.autograd.grad(density, leaves, retain_graph=True, allow_unused=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert (a is None and b is None) or (testing.assert_same_bits(a, b) is None)
