"""Fixtures for all test folders."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pyflow import _backend

RUN = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("digest", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from pyflow import _host
print(_host.isa(), module.digest())
"""


@pytest.fixture
def every_instruction_set(request):
    """Results of the test file's `digest()` for every compiled instruction set that this CPU supports."""
    if _backend.cpu_missing:
        pytest.skip(f"no compiled kernels: {_backend.cpu_missing}")
    from pyflow import _host

    isas = _host.supported_isas().split(",")
    if len(isas) < 2:
        pytest.skip(f"this CPU runs only {isas[0]} of {_host.compiled_isas()}")
    results = set()
    for isa in isas:
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(request.path)],
            env={**os.environ, "PYFLOW_CPU_ISA": isa}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        chosen, result = done.stdout.split()
        assert chosen == isa
        results.add(result)
    return results
