"""The CUDA kernels on CPU tensors (tests/cuda/emulated) in place of the Triton launchers."""

from __future__ import annotations

import functools
import os

import pytest
import torch

from pyflow._operators import Operator
from pyflow._schemas import define

LIBRARY = os.environ.get("PYFLOW_TEST_EMULATED")


@functools.cache
def operators():
    schemas = define("pyflow_cuda")  # the operators exist as long as this object
    torch.ops.load_library(LIBRARY)
    torch.use_deterministic_algorithms(True)  # new tensors start as NaN, so that unwritten results are seen
    return schemas, torch.ops.pyflow_cuda


def use(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Run the CUDA kernels for the backend "triton" until the test ends; return the set of operators called so far."""
    _, cuda = operators()
    called = set()

    def kernel(operator):
        called.add(operator.name)
        return getattr(cuda, operator.name)

    monkeypatch.setattr(Operator, "triton_kernel", property(kernel))
    return called
