"""Kernels on a GPU, one file per family of ops, and the modules built on them; skipped without a GPU.

PYFLOW_TEST_GPU=interpreter pytest -n 1 tests/triton/gpu runs them on a CPU: small sizes, Triton's interpreter. A family
without a file in interpreted/ is tested so.
"""

from __future__ import annotations

import os
import signal
import sys

import pytest
import torch

import pyflow
from pyflow import _backend

from .. import emulated

# has no tests, and importing it without a GPU skips the importing module
collect_ignore = ["common.py"]
# cuBLAS needs it to run with deterministic algorithms
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# `make gpu` stops the tests by SIGINT to get their summary, but background jobs of a shell ignore SIGINT
if "PYTEST_XDIST_WORKER" not in os.environ:
    signal.signal(signal.SIGINT, signal.default_int_handler)

INTERPRETED = os.environ.get("PYFLOW_TEST_GPU") == "interpreter"
if INTERPRETED and not _backend.interpreting():
    # Triton reads it on import, and pyflow has imported Triton in this process: set it for the workers
    os.environ["TRITON_INTERPRET"] = "1"
    if "PYTEST_XDIST_WORKER" in os.environ or not any(word.startswith(("-n", "--numprocesses")) for word in sys.argv):
        raise pytest.UsageError("PYFLOW_TEST_GPU=interpreter needs a worker (-n 1), or TRITON_INTERPRET=1 as well")


@pytest.fixture(scope="session", autouse=True)
def shared_machine():
    """Give each worker one thread and no compile processes, since workers share the cores."""
    torch._inductor.config.compile_threads = 1
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def exact_arithmetic(monkeypatch):
    """No TF32 and deterministic convolutions on a GPU; exact fma and bfloat16 in the interpreter."""
    if INTERPRETED and emulated.LIBRARY:
        emulated.use(monkeypatch)
    elif INTERPRETED:
        from ..interpreter import round_as_a_gpu

        round_as_a_gpu(monkeypatch)
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@pytest.fixture(params=["triton"] if INTERPRETED else ["triton", "cuda"])
def gpu(request):
    """Each GPU backend in turn, selected by name."""
    why = _backend.status()[request.param]
    if why:
        pytest.skip(f"{request.param}: {why}")
    with pyflow.backend(request.param):
        yield request.param


@pytest.fixture
def both_backends():
    for name in ("triton", "cuda"):
        if _backend.status()[name]:
            pytest.skip(f"{name}: {_backend.status()[name]}")


@pytest.fixture
def kernels():
    """The default backend; under the interpreter Triton must be selected, because tensors are on the CPU."""
    with pyflow.backend("triton" if INTERPRETED else "auto"):
        yield
