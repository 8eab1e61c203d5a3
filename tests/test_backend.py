"""Which implementation runs: the choice, its errors, and what PYFLOW_BACKEND and PYFLOW_CPU_ISA do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import pyflow
from pyflow import _backend

needs_kernels = pytest.mark.skipif(_backend.cpu_missing is not None, reason=str(_backend.cpu_missing))


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )  # fmt: skip


def test_a_call_sets_and_a_block_restores():
    assert _backend.current() == "auto"
    with pyflow.backend("reference"):
        assert _backend.current() == "reference"
    assert _backend.current() == "auto"
    pyflow.backend("reference")
    assert _backend.current() == "reference"
    pyflow.backend("auto")


def test_unknown_name():
    with pytest.raises(
        ValueError, match="^backend: name must be one of auto, cpu, triton, cuda, reference, got 'gpu'$"
    ):
        pyflow.backend("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_an_unavailable_backend_says_why(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=f"^backend: {name} cannot run here: "):
        pyflow.backend(name)
    assert _backend.current() == "auto"


@needs_kernels
def test_the_environment_chooses():
    code = "import pyflow; from pyflow import _backend; print(_backend.current())"
    assert run(code, PYFLOW_BACKEND="reference").stdout.strip() == "reference"
    done = run(code, PYFLOW_BACKEND="gpu")
    assert done.returncode != 0 and "name must be one of" in done.stderr


@needs_kernels
def test_an_instruction_set_that_is_not_there():
    code = "import pyflow; print(pyflow._backend.status()['cpu'])"
    done = run(code, PYFLOW_CPU_ISA="sse2")
    assert done.stdout.startswith("PYFLOW_CPU_ISA=sse2 is not available here")
    code = "import torch, pyflow; print(pyflow.ops.additive_coupling(torch.ones(2, 2), torch.ones(2, 2)).sum().item())"
    assert run(code, PYFLOW_CPU_ISA="sse2").stdout.strip() == "8.0"


def test_the_reference_is_registered_for_every_operator():
    for name in _backend.SCHEMAS:
        kernels = torch._C._dispatch_dump(f"pyflow::{name}")
        assert "CompositeExplicitAutograd" in kernels and "Meta" in kernels and "FuncTorchBatched" in kernels, name


def test_a_device_without_kernels_runs_the_reference():
    x = torch.zeros(2, 3, device="meta")
    assert _backend.runs_reference("affine_coupling", x)
    assert pyflow.ops.affine_coupling(x, x, x)[0].device.type == "meta"


def test_triton_without_the_interpreter_refuses_cpu_tensors(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_backend, "_choice", "triton")
    monkeypatch.setattr(_backend, "_native_devices", _backend._find_native_devices())
    x = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="^affine_coupling: backend triton cannot run on a tensor on cpu$"):
        pyflow.ops.affine_coupling(x, x, x)
