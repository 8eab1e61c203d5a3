"""Drawn calls of every public operation: the reference's answer or one of our sentences, and nothing else changed."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyflow
from pyflow import _backend

from .answers import check
from .calls import DRAWERS, by_signature, calls

pytestmark = pytest.mark.skipif(bool(_backend.cpu_missing), reason=str(_backend.cpu_missing))

for path in sorted(Path(__file__).with_name("fuzz").glob("*.py")):
    importlib.import_module(f".fuzz.{path.stem}", __package__)
DRAWERS |= {op: drawn for op in {*pyflow.ops.__all__} - set(DRAWERS) if (drawn := by_signature(op))}

PLAIN = settings(
    deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False,
)  # fmt: skip


def test_every_operation_is_drawn():
    assert sorted(DRAWERS) == sorted(pyflow.ops.__all__)


def run(op: str, examples: int, seeded: bool) -> None:
    answered = []

    @settings(PLAIN, max_examples=examples, derandomize=seeded)
    @given(st.data())
    def drawn(data: st.DataObject) -> None:
        answered.append(check(data.draw(calls(op))))

    drawn()
    # right ones among them, or nothing was compared
    assert sum(answered) >= len(answered) / 5


@pytest.mark.parametrize("op", pyflow.ops.__all__)
def test_drawn_calls(op):
    run(op, 30, seeded=True)


@pytest.mark.parametrize("op", ["grad_norm_penalty", "additive_coupling"])
def test_calls_drawn_from_a_signature(op, monkeypatch):
    monkeypatch.setitem(DRAWERS, op, by_signature(op))
    run(op, 30, seeded=True)


def test_arguments_of_other_kinds_need_a_drawer():
    assert by_signature("fsq") is None and by_signature("hsic") is None


@pytest.mark.slow
@pytest.mark.parametrize("op", pyflow.ops.__all__)
def test_many_drawn_calls(op):
    run(op, 700, seeded=False)
