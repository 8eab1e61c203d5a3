"""Cases of the sector probability: trials against the usual code (draw, sort, take gaps), and the formula.

The usual code draws other numbers: its estimate must be within eight standard errors of the probability. pyflow's
counts must equal its reference's.
"""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

import pyflow
from pyflow.reference import sector as ref
from pyflow.stats import sector_probability, sector_probability_mc

from .registry import Call, Case, Outputs, Problem

TOLERANCE = 1e-6
SEED = 0


def _middle(n: int) -> float:
    """Return an angle at which about half of the trials succeed."""
    low, high = 0.0, 2 * math.pi
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (low, angle) if sector_probability(n, angle) > 0.5 else (angle, high)
    return low


def trials(shape: tuple[int, ...], device: torch.device) -> Problem:
    count, n = shape
    theta = torch.tensor(_middle(n), dtype=torch.float64, device=device)
    limit = 2 * math.pi - theta.item()
    generator = np.random.default_rng(SEED)

    def eager() -> Outputs:
        angles = (2 * math.pi * torch.rand(count, n, device=device)).sort(1).values
        around = 2 * math.pi + angles[:, :1] - angles[:, -1:]
        return ((torch.cat((angles.diff(dim=1), around), 1).amax(1) >= limit).sum(),)

    def numpy() -> Outputs:
        angles = np.sort(2 * math.pi * generator.random((count, n)), axis=1)
        around = 2 * math.pi + angles[:, :1] - angles[:, -1:]
        largest = np.concatenate((np.diff(angles, axis=1), around), axis=1).max(axis=1)
        return (torch.tensor(int((largest >= limit).sum()), device=device),)

    def ours() -> Outputs:
        hits = sector_probability_mc(n, theta, count, SEED).count
        assert isinstance(hits, Tensor)
        return (hits,)

    def deviation(result: Outputs) -> Outputs:
        p = float(sector_probability(n, theta.item()))
        error = 8 * math.sqrt(p * (1 - p) / count)
        return (1 + TOLERANCE * (result[0].double() / count - p) / error,)

    with pyflow.backend("reference"):
        counted = ours()[0].double()
    truths: dict[str, Call] = defaultdict(lambda: lambda: (counted,))
    for name in ("eager", "numpy"):
        truths[name] = lambda: (torch.ones((), dtype=torch.float64, device=device),)
    calls = {"eager": eager, "numpy": numpy, "pyflow": ours}
    return Problem(calls, truths, 16, forms=dict.fromkeys(("eager", "numpy"), deviation), tolerance=TOLERANCE)


def memory(shape: tuple[int, ...], device: torch.device) -> Problem:
    problem = trials(shape, device)
    problem.bytes = None
    return problem


def formula(shape: tuple[int, ...], device: torch.device) -> Problem:
    """Angles from those where all gaps are small to those where the sum has one term."""
    angles, n = shape
    theta = torch.from_numpy(2 * math.pi * (1 - np.linspace(1.5, 2.5 * math.log(n), angles) / n))
    values = [ref.sector_probability(n, t, complement=True) for t in theta.tolist()]

    def op() -> Outputs:
        p = sector_probability(n, theta, complement=True)
        assert isinstance(p, Tensor)
        return (p,)

    def eager() -> Outputs:
        with pyflow.backend("reference"):
            return op()

    calls = {"eager": eager, "pyflow": op}
    truth = torch.tensor(values, dtype=torch.float64)
    return Problem(calls, lambda: (truth,), 16 * angles)


CONTENDERS = ("eager", "numpy", "pyflow")

CASES = [
    Case("sector/trials, 32 points", trials, (200_000, 32), (2000, 32), CONTENDERS, peer="numpy", quick=True),
    Case("sector/trials, 4 points", trials, (1_000_000, 4), (2000, 4), CONTENDERS, peer="numpy"),
    Case("sector/trials, memory", memory, (200_000, 32), (2000, 32), CONTENDERS, peer="numpy", memory=True),
    Case("sector/formula, 10,000 points", formula, (32, 10_000), (8, 300), ("eager", "pyflow"), quick=True),
]
