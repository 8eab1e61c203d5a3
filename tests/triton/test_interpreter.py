"""Runs the files of interpreted/ in processes with TRITON_INTERPRET=1, under which nothing can be compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("interpreted")
FAMILIES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("common", "conftest"))


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_under_the_interpreter(family):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / f"{family}.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("PYFLOW_BACKEND", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parent.parent.parent)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
