"""Writes the table of a program of a flow, forward or forward and back, see _program.py.

Steps of which nobody reads anything are dropped. Values get places, which are used again once nobody reads them: those
that the way back needs stay.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..program import Program
from . import _launch
from ._program import ABSENT, CONTEXT, FIELDS, KINDS, WORDS, X
from ._program_back import Back
from ._program_code import Builder, Step

EFFECTS = frozenset(("store", "total", "dense_weights", "sum_rows"))


class Code(NamedTuple):
    """A program as the machine takes it."""

    words: list[int]
    steps: int
    places: int
    splines: bool  # whether there are any


def compiled(program: Program, sizes: Sequence[int], dtype: torch.dtype, needs: tuple[bool, ...] | None = None) -> Code:
    """Return the steps of a program with weights of these sizes.

    Args:
        needs: None for forward; whether the way back returns gradients of x, of the context and of the weights.
    """
    builder = Builder(program, [0, *itertools.accumulate(sizes)])
    x = tuple(builder.state)
    builder.forward()
    if needs is None:
        builder.finish()
    else:
        grads = Back(builder, needs[2])
        for needed, values, target in zip(needs, (x, builder.context), (X.value, CONTEXT.value), strict=False):
            if needed:
                grads.store(values, target)
    return encoded(used(builder.steps), dtype)


def used(steps: list[Step]) -> list[Step]:
    """Return the steps of which something is read or stored."""
    live: set[int] = set()
    kept = []
    for step in reversed(steps):
        writes = [name for name in step.values if step.written(name)]
        dead = [name for name in writes if live.isdisjoint(step.values[name])]
        if step.kind in EFFECTS or len(dead) < len(writes):
            for name in dead:
                del step.values[name]
            live.update(step.reads())
            kept.append(step)
    return kept[::-1]


def placed(steps: list[Step]) -> tuple[dict[int, int], int]:
    """Return the place of each value, and how many there are; values whose times overlap have places of their own."""
    last = {v: k for k, step in enumerate(steps) for v in (*step.writes(), *step.reads())}
    ending: list[list[int]] = [[] for _ in steps]
    for value, k in last.items():
        ending[k].append(value)
    places: dict[int, int] = {}
    free: list[int] = []
    count = 0
    for k, step in enumerate(steps):
        for value in step.writes():
            if free:
                places[value] = heapq.heappop(free)
            else:
                places[value], count = count, count + 1
        for value in ending[k]:
            heapq.heappush(free, places[value])
    return places, count


def encoded(steps: list[Step], dtype: torch.dtype) -> Code:
    places, count = placed(steps)
    records: list[int] = []
    lists: list[int] = []
    firsts: dict[tuple, int] = {}
    start = len(steps) * WORDS.value

    def first(items: tuple) -> int:
        # before they are compared: 1.0 is equal to 1
        items = tuple([_launch.bits(item, dtype) if isinstance(item, float) else item for item in items])
        if items not in firsts:
            firsts[items] = start + len(lists)
            lists.extend(items)
        return firsts[items]

    for step in steps:
        record = dict.fromkeys(FIELDS[:ABSENT], -1) | dict.fromkeys(FIELDS[ABSENT:], 0) | step.words
        record["kind"] = KINDS.index(step.kind)
        for name, values in step.values.items():
            at = tuple([places[value] for value in values])
            record[name] = at[0] if name == "log" else first(at)
        record |= {name: first(items) for name, items in step.lists.items()}
        record |= {f"f{i}": _launch.bits(value, dtype) for i, value in enumerate(step.floats)}
        records += [*record.values(), *[0] * (WORDS.value - len(FIELDS))]
    return Code(records + lists, len(steps), max(1, count), any(step.kind.startswith("spline") for step in steps))
