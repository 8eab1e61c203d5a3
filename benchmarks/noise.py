"""Cases of counter-based noise: (16, 3, 256, 256) values against torch's generator.

torch draws other numbers, so its contenders are checked by their distribution: mean, standard deviation and the share
of |x| > 2. pyflow is compared with its reference value by value.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import pyflow
from pyflow.reference import noise as ref

from .registry import FRESH, Case, Outputs, Problem, compiled

IMAGES = (16, 3, 256, 256)
LARGE = (64, 4, 512, 512)
TOLERANCE = 1e-6
# mean, standard deviation and share of |x| > 2, each with (number of values) x (variance of its estimate)
MOMENTS = {
    "normal": ((0.0, 1.0), (1.0, 0.5), (0.0455002639, 0.0434)),
    "uniform": ((0.5, 1 / 12), (12**-0.5, 1 / 60), (0.0, 1.0)),
}


def deviations(values: Tensor, kind: str) -> Outputs:
    """Return 1 + the deviation of each moment, scaled so that eight standard errors equal TOLERANCE."""
    wide = values.double()
    found = torch.stack((wide.mean(), wide.std(), (wide.abs() > 2).double().mean()))
    moments = torch.tensor(MOMENTS[kind], dtype=torch.float64, device=values.device)
    error = 8 * (moments[:, 1] / values.numel()).sqrt()
    return (1 + TOLERANCE * (found - moments[:, 0]) / error,)


def _problem(shape: tuple[int, ...], device: torch.device, *, kind: str) -> Problem:
    of_torch = torch.randn if kind == "normal" else torch.rand
    draw = getattr(pyflow.ops, kind)
    seeds, step = pyflow.ops.sample_seeds(torch.tensor(0, device=device), shape[0]), torch.tensor(1)

    def eager() -> Outputs:
        return (of_torch(shape, device=device),)

    def truth(seed: Tensor) -> Callable[[], Outputs]:
        values = ref.noise(shape, seed, step, kind=kind, purpose="noise", dtype=torch.float32).double()
        return lambda: (values,)

    calls = {
        "eager": eager, "compile": compiled(eager),
        "pyflow": lambda: (draw(shape, seed=0, step=1, device=device),),
        "pyflow per sample": lambda: (draw(shape, seed=seeds, step=1),),
    }  # fmt: skip
    # contenders that the harness adds (other instruction sets) compute the same as pyflow
    truths = defaultdict(lambda: truth(torch.tensor(0, device=device)), {"pyflow per sample": truth(seeds)})
    for name in ("eager", "compile"):
        truths[name] = lambda: (torch.ones(3, dtype=torch.float64, device=device),)
    forms = dict.fromkeys(("eager", "compile"), lambda result: deviations(result[0], kind))
    # every value is written, nothing is read
    return Problem(calls, truths, 4 * torch.Size(shape).numel(), forms=forms, tolerance=TOLERANCE)


def _case(name: str, kind: str, shape: tuple[int, ...] = IMAGES, **more: Any) -> Case:
    return Case(
        f"noise/{name}", partial(_problem, kind=kind), shape, (4, 3, 64, 64),
        contenders=("eager", "compile", "pyflow per sample", "pyflow"),
        compare=(("pyflow per sample", "pyflow"),), **more,
    )  # fmt: skip


CASES = [
    _case("normal", "normal", quick=True, gpu=LARGE),
    _case("normal" + FRESH, "normal", pages="fresh"),
    _case("normal, small", "normal", (4, 3, 32, 32), quick=True),
    _case("uniform", "uniform"),
]
