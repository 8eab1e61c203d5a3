"""Trials of the sector probability under the interpreter."""

from __future__ import annotations

import pytest
import torch

from pyflow import ops
from pyflow.triton_kernels import sector

from .common import same_on_every_backend

THRESHOLDS = torch.linspace(0, 1, 12, dtype=torch.float64).reshape(3, 4)


@pytest.mark.parametrize("points", [1, 2, 4, 7, 33])
def test_counts(points, scalars, monkeypatch):
    monkeypatch.setattr(sector, "PROGRAMS", 2)  # so that each program takes several blocks of trials
    for trials, seed in ((1, 0), (1300, 2**64 - 5)):
        for x in (THRESHOLDS, THRESHOLDS.mT, THRESHOLDS[:0], THRESHOLDS[0, 1]):
            same_on_every_backend(lambda: (ops.sector_counts(x, points, trials, seed=seed, step=2**40 + 3),))
