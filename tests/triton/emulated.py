"""The CUDA kernels on CPU tensors (tests/cuda/emulated) in place of the Triton launchers."""

from __future__ import annotations

import functools
import os

import pytest
import torch

from pyflow import _backend
from pyflow._schemas import define

LIBRARY = os.environ.get("PYFLOW_TEST_EMULATED")


@functools.cache
def operators():
    schemas = define("pyflow_cuda")  # the operators exist as long as this object
    torch.ops.load_library(LIBRARY)
    return schemas, torch.ops.pyflow_cuda


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the CUDA kernels for the backend "triton" until the test ends."""
    _, cuda = operators()
    monkeypatch.setattr(_backend, "_triton_kernel", lambda op: getattr(cuda, op))
