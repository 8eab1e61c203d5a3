"""Cases of demo_op: (16384, 784) values."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import pyflow
from pyflow.reference import demo_op as ref

from .registry import Case, Outputs, Problem, bind, compiled, normals, wide


def _problem(shape: tuple[int, ...], device: torch.device, *, backward: bool) -> Problem:
    inputs = normals(shape, device, 1)
    cotangents = (*normals(shape, device, 1), *normals(shape[:1], device, 1)) if backward else None

    def eager(x: Tensor) -> Outputs:
        return ref.demo_op(x, 2.0, 1)

    def op(x: Tensor) -> Outputs:
        return pyflow.ops.demo_op(x, scale=2.0)

    functions = {"eager": eager, "compile": compiled(eager), "pyflow": op}
    calls = {name: bind(function, inputs, cotangents) for name, function in functions.items()}
    truth = bind(eager, wide(inputs), cotangents and wide(cotangents))
    # forward reads x and writes y; backward reads the gradient of y and x, and writes the gradient of x
    return Problem(calls, truth, (5 if backward else 2) * inputs[0].nbytes)


CASES = [
    Case("demo_op/forward", partial(_problem, backward=False), (16384, 784), (5, 14), quick=True),
    Case("demo_op/forward+backward", partial(_problem, backward=True), (16384, 784), (5, 14), gpu=(65536, 1024)),
]
