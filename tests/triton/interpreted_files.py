"""The test file that runs the kernels of each family on CPU tensors, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pyflow._operators import OPERATORS

FOLDER = Path(__file__).parent
OWN = {path.stem: path for path in (FOLDER / "interpreted").glob("*.py") if path.stem not in ("common", "conftest")}
# a family without a file in interpreted/ has one in gpu/ that serves both, if it has kernels for GPUs
SHARED = {
    family: FOLDER / f"gpu/test_{family}.py"
    for family in sorted({o.family for o in OPERATORS.values() if o.triton} - OWN.keys())
}
FILES = dict(sorted({**OWN, **SHARED}.items()))


def run(path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a test file under Triton's interpreter; the result has its output."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    given = {**os.environ, "TRITON_INTERPRET": "1", "PYFLOW_TEST_GPU": "interpreter", **environment}
    given.pop("PYFLOW_BACKEND", None)
    return subprocess.run(command, env=given, capture_output=True, text=True, cwd=FOLDER.parent.parent)
