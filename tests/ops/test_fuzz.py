"""Drawn calls of every public operation: the reference's answer or one of our sentences, and nothing else changed."""

from __future__ import annotations

import pytest

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyflow
from pyflow import _backend

from . import fuzz

pytestmark = pytest.mark.skipif(bool(_backend.cpu_missing), reason=str(_backend.cpu_missing))

PLAIN = settings(
    deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False,
)  # fmt: skip


def test_every_operation_is_drawn():
    assert sorted(fuzz.DRAWERS) == sorted(pyflow.ops.__all__)


def run(op: str, examples: int, seeded: bool) -> None:
    answered = []

    @settings(PLAIN, max_examples=examples, derandomize=seeded)
    @given(st.data())
    def drawn(data: st.DataObject) -> None:
        answered.append(fuzz.check(data.draw(fuzz.calls(op))))

    drawn()
    # right ones among them, or nothing was compared
    assert sum(answered) >= len(answered) / 5


@pytest.mark.parametrize("op", pyflow.ops.__all__)
def test_drawn_calls(op):
    run(op, 30, seeded=True)


@pytest.mark.slow
@pytest.mark.parametrize("op", pyflow.ops.__all__)
def test_many_drawn_calls(op):
    run(op, 700, seeded=False)
