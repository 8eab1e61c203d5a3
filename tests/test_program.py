"""Programs of flows as text: what is encoded is decoded, columns in runs, floats exactly."""

from __future__ import annotations

import math
import sys
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyflow.program import (
    Additive,
    Affine,
    Autoregressive,
    Dense,
    Instruction,
    Linear,
    Multiplicative,
    Net,
    Prior,
    Program,
    Scale,
    Spline,
    Uniform,
    Wrap,
    runs_of,
)

NET = Net((5, 0, 5), True, (Dense(0, 1, 8, 1), Dense(2, -1, 4, 2, 0.01)))
EVERY = (
    Scale((3, 2, 1), 4, -1, True, False), Linear((0, 2), 5), Linear((0, 2), 5, 6, 7), NET, Additive((1, 4), True), NET,
    Affine((1, 4), 3, 2, 0.1, False, True), Spline((0, 1), 8, 9, (0, 1), 2, (3.0, 0.1), 0.5, 0.01, 0.2, 3, True),
    Wrap((1, 4), (3.0,), (0.5, -0.5), True), Spline((0,), 8, 7, (0,), 1, (3.0,), params=4, turned=True),
    Prior((0, 2, 4), 1), Prior(()), Uniform((4, 2), (-1.0,), (0.1, 3.0), True), Scale((), -1, -1), NET, Multiplicative((1, 4), True),
    Autoregressive(NET, Affine((1, 4), 3, 2, 0.1), (2, 1), ((0, 1, 2, 0, 1, 2, 0, 1),)),
    Autoregressive(NET, Spline((1, 4), 8, 9, (0, 1), 2, (3.0, 0.1)), (1, 1), ()),
)  # fmt: skip
FLOATS = [0.0, 0.1, 1 / 3, -1.5, 1e-45, 5e-324, sys.float_info.max, sys.float_info.min, math.pi, 1e16 + 2, 2.0**-1074]


def test_every_instruction_comes_back():
    program = Program(6, 2, (5, 4, 0, 0), EVERY)
    assert {type(one) for one in EVERY} == set(get_args(Instruction))
    back = Program.decode(program.encode())
    assert back == program and back.encode() == program.encode()
    assert [type(one) for one in back.instructions] == [type(one) for one in EVERY]
    assert [type(dense) for dense in back.instructions[3].parts] == [Dense, Dense]


def test_the_text_of_a_program():
    # what csrc/torch reads: changing it changes both sides
    program = Program(6, 2, (5, 4, 3), EVERY[:1] + EVERY[3:4] + (Affine((1, 3, 5), 3, 2, 0.5, True),))
    assert program.encode() == (
        "6 2 1 5 -1 3 3 scale 1 3 -1 3 4 -1 1 0 net 2 5 -5 2 5 1 1 1 2 dense 0 1 8 1 0.0 -1 dense 2 -1 4 2 0.01 -1 "
        "affine 1 1 2 3 3 2 0.5 1 0"
    )
    undo = Autoregressive(NET, Affine((1, 4), 3, 2, 0.5), (1, 2), ((0, 1, 2, 2, 2, 0, 0, 0),))
    assert Program(6, 2, (), (undo,)).encode() == (
        "6 2 0 1 autoregressive 2 5 -5 2 5 1 1 1 2 dense 0 1 8 1 0.0 -1 dense 2 -1 4 2 0.01 -1 affine 1 1 3 2 3 2 0.5 0 0 "
        "1 1 1 2 1 3 0 1 3 2 0 2 0 0 3"
    )
    assert Program(0, 0, (), ()).encode() == "0 0 0 0"


@pytest.mark.parametrize(
    "columns, runs",
    [
        ((), []),
        ((7,), [(7, 1, 1)]),
        ((0, 1, 2, 3), [(0, 1, 4)]),
        ((6, 4, 2, 0), [(6, -2, 4)]),
        ((3, 3, 3), [(3, 0, 3)]),
        ((0, 2, 4, 5, 6), [(0, 2, 3), (5, 1, 2)]),
        ((5, 0), [(5, -5, 2)]),
        ((1, 0, 2, 9, 8, 7), [(1, -1, 2), (2, 7, 2), (8, -1, 2)]),
    ],
)
def test_columns_are_runs(columns, runs):
    assert runs_of(columns) == runs == runs_of(list(columns))
    assert Program.decode(Program(10, 0, columns, (Prior(columns),)).encode()) == Program(
        10, 0, columns, (Prior(columns),)
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**31), max_size=30))
def test_any_columns_come_back(columns):
    program = Program(2**31 + 1, 0, tuple(columns), (Prior(tuple(columns)),))
    assert Program.decode(program.encode()) == program
    assert [first + step * i for first, step, count in runs_of(columns) for i in range(count)] == columns


@settings(max_examples=200, deadline=None)
@given(st.floats(allow_nan=False))
def test_any_float_comes_back(value):
    program = Program(2, 0, (), (Net((0,), False, (Dense(0, -1, 2, 2, value),)), Affine((1,), 3, 0, value)))
    back = Program.decode(program.encode())
    assert back == program
    assert back.instructions[1].map_arg.hex() == (value + 0.0).hex()


@pytest.mark.parametrize("value", FLOATS)
def test_floats_are_exact(value):
    text = Program(2, 0, (), (Affine((1,), 3, 0, value),)).encode()
    assert float(text.split()[-3]) == Program.decode(text).instructions[0].map_arg == value


def test_equal_programs_have_one_text():
    one = Program(3, 0, (0, 1), (Affine((True, 2), 3, 0, 0, 1, 0),))
    other = Program(3, 0, (0, 1), (Affine((1, 2), 3, 0, -0.0, True, False),))
    assert one == other and one.encode() == other.encode()
    # a flag may be any number that is true
    assert Scale((0,), -1, -1, 2) and Program(1, 0, (), (Scale((0,), -1, -1, 2),)).encode().split()[-2:] == ["1", "0"]


def test_the_kind_of_an_instruction_is_in_the_text():
    add, prior = (Program(2, 0, (), (one,)) for one in (Additive((1,), False), Prior((1,), 0)))
    # as tuples they are equal
    assert add == prior and add.encode() != prior.encode()
    assert type(Program.decode(prior.encode()).instructions[0]) is Prior


@pytest.mark.parametrize(
    "text", ["", "3 0", "3 0 0 1 nothing 0", "3 0 0 1 prior 1 0", "3 0 0 1 prior 0 x", "3 0 0 0 1"]
)
def test_text_that_is_no_program_is_refused(text):
    with pytest.raises(ValueError, match="no program"):
        Program.decode(text)
