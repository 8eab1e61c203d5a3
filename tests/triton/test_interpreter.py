"""Runs under_interpreter.py in a process with TRITON_INTERPRET=1, which excludes compilation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("under_interpreter.py")
# by name, so that a failure is found again quickly
PARTS = {
    "coupling": "not flow_head and not dtypes and not fsq and not noise and not sde",
    "dtypes and flow head": "flow_head or dtypes",
    "fsq": "fsq",
    "noise and sde": "noise or sde",
}


@pytest.mark.parametrize("part", PARTS)
def test_kernels_under_the_interpreter(part):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", PARTS[part], str(FILE)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("PYFLOW_BACKEND", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FILE.parent.parent.parent)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
