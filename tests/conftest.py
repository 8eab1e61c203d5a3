"""Fixtures for all test folders."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyflow import _backend, _native

FOLDER = Path(__file__).parent
# tests that take minutes come first, so that no worker waits for another one at the end
LONG = ("tests/triton/test_interpreter.py", "tests/packaging/", "tests/cuda/")
RUN = """
import importlib, sys, types
# a package for this folder, so that test files can import their neighbours
sys.modules["tests"] = types.ModuleType("tests")
sys.modules["tests"].__path__ = [sys.argv[1]]
module = importlib.import_module(sys.argv[2])
from pyflow import _native
print(_native.isa(), module.digest())
"""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.fixture
def every_instruction_set(request):
    """Results of the test file's `digest()` for every compiled instruction set that this CPU supports."""
    if _backend.cpu_missing:
        pytest.skip(f"no compiled kernels: {_backend.cpu_missing}")
    isas = _native.supported_isas()
    if len(isas) < 2:
        pytest.skip(f"this CPU runs only {isas[0]} of {_native.compiled_isas()}")
    name = ".".join(("tests", *request.path.relative_to(FOLDER).with_suffix("").parts))
    results = set()
    for isa in isas:
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(FOLDER), name],
            env={**os.environ, "PYFLOW_CPU_ISA": isa}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        chosen, result = done.stdout.split()
        assert chosen == isa
        results.add(result)
    return results
