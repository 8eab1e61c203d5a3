"""Triton's interpreter on CPU tensors, one file per family; test_interpreter.py runs each in its own process.

tests/cuda/test_emulated.py runs the same files with the CUDA kernels in place of the launchers.
"""

from __future__ import annotations

import pytest

import pyflow
from pyflow import _backend
from pyflow.triton_kernels import _launch

from .. import emulated
from ..interpreter import round_as_a_gpu


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    assert _backend.interpreting()
    if emulated.LIBRARY:
        emulated.use(monkeypatch)
    else:
        round_as_a_gpu(monkeypatch)
    with pyflow.backend("triton"):
        yield


@pytest.fixture(params=["numbers", "on the device"])
def scalars(request, monkeypatch):
    """Pass 0-d tensors by value, as for CPU tensors, or by pointer, as for GPU tensors."""
    if request.param == "on the device":
        monkeypatch.setattr(_launch, "by_value", lambda tensor: False)
        monkeypatch.setenv("PYFLOW_EMULATED_NUMBERS_IN_MEMORY", "1")
