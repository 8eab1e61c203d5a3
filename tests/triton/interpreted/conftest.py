"""Triton's interpreter on CPU tensors, in a process of its own (test_interpreter.py): a file per family."""

from __future__ import annotations

import pytest

import pyflow
from pyflow import _backend
from pyflow.triton_kernels import _random

from ..interpreter import round_as_a_gpu


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    assert _backend.interpreting()
    round_as_a_gpu(monkeypatch)
    with pyflow.backend("triton"):
        yield


@pytest.fixture(params=["numbers", "on the device"])
def scalars(request, monkeypatch):
    """0-d tensors on the CPU are the caller's numbers; on a GPU they lie in its memory."""
    if request.param == "on the device":
        monkeypatch.setattr(_random, "by_value", lambda tensor: False)
