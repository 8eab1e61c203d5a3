"""Choice of the backend: calls, blocks, threads, errors, PYFLOW_BACKEND and PYFLOW_CPU_ISA."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import pyflow
from pyflow import _backend, _native
from pyflow._operators import OPERATORS
from pyflow._schemas import SCHEMAS

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


def test_blocks_and_calls_inside_blocks():
    reused = pyflow.backend("reference")
    assert _backend.current() == "reference"
    with reused:
        with pyflow.backend("auto"), reused:
            assert _backend.current() == "reference"
        pyflow.backend("auto")
        assert _backend.current() == "auto"
        held = pyflow.backend("reference")
        with held:
            assert _backend.current() == "reference"
        assert _backend.current() == "auto"
    assert _backend.current() == "auto"


def test_a_block_ends_with_an_exception_and_out_of_order():
    with pytest.raises(KeyError), pyflow.backend("reference"):
        raise KeyError
    assert _backend.current() == "auto"
    outer, inner = pyflow.backend("reference").__enter__(), pyflow.backend("auto").__enter__()
    outer.__exit__()
    assert _backend.current() == "auto"
    inner.__exit__()
    assert _backend.current() == "auto"


def in_a_thread(function):
    """Run the function in a new thread and return its result."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_call_sets_the_process_and_a_block_its_thread():
    with pyflow.backend("reference"):
        assert in_a_thread(_backend.current) == "auto"
    pyflow.backend("reference")
    assert in_a_thread(_backend.current) == "reference"
    in_a_thread(lambda: pyflow.backend("auto"))
    assert _backend.current() == "auto"


def test_concurrent_blocks_see_their_own_choice_and_leave_nothing():
    both = threading.Barrier(2, timeout=30)

    def work(name):
        seen = []
        for _ in range(100):
            both.wait()
            with pyflow.backend(name):
                both.wait()
                seen.append(_backend.current())
                both.wait()
        return set(seen)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, ["reference", "auto"])) == [{"reference"}, {"auto"}]
    assert _backend.current() == "auto" and len(_backend._calls) < 4


@needs_kernels
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_backward_runs_on_the_backend_of_its_forward(elsewhere, monkeypatch):
    seen = []
    entry = OPERATORS["fsq_backward"]._entry
    note = lambda *args: (seen.append(_backend.current()), entry(*args))[1]
    z = torch.randn(4, 3, requires_grad=True)
    with pyflow.backend("cpu"):
        codes, _ = pyflow.ops.fsq(z, (8, 5, 5))
    monkeypatch.setattr(OPERATORS["fsq_backward"], "_entry", note)
    with pyflow.backend("reference"):
        backward = lambda: torch.autograd.grad(codes.sum(), z)
        in_a_thread(backward) if elsewhere else backward()
        assert _backend.current() == "reference"
    assert seen == ["cpu"] and in_a_thread(_backend.current) == "auto"


@needs_kernels
def test_a_compiled_graph_is_recompiled_for_another_backend():
    graphs = []

    def keep(graph, inputs):
        graphs.append("pyflow" in graph.code)
        return graph.forward

    @torch.compile(fullgraph=True, backend=keep)
    def shifted(x):
        return pyflow.ops.affine_coupling(x, x, x)[0]

    x = torch.ones(2, 3)
    shifted(x)
    with pyflow.backend("reference"):
        shifted(x)
        in_a_thread(lambda: shifted(x))
    shifted(x)
    pyflow.backend("reference")
    shifted(x)
    pyflow.backend("auto")
    assert graphs == [True, False, False]  # operator, reference chosen by a block, reference chosen by a call


@needs_kernels
def test_a_trace_records_operators_and_can_be_saved(tmp_path):
    class Quantizer(torch.nn.Linear):
        def forward(self, x):
            return pyflow.ops.fsq(super().forward(x), (8, 5, 5))[0]

    model = Quantizer(3, 3)
    traced = torch.jit.trace(model, (torch.zeros(2, 3),))
    assert "pyflow::fsq" in str(traced.graph)
    torch.jit.save(traced, tmp_path / "fsq.pt")
    z, again = (torch.randn(4, 3, generator=torch.manual_seed(0)).requires_grad_() for _ in range(2))
    torch.jit.load(tmp_path / "fsq.pt")(z).sum().backward()
    model(again).sum().backward()
    assert z.grad.count_nonzero() and torch.equal(z.grad, again.grad)


def test_unknown_name():
    with pytest.raises(
        ValueError, match=r"^backend: name must be one of auto, cpu, triton, cuda, reference, got 'gpu'$"
    ):
        pyflow.backend("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_an_unavailable_backend_says_why(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(pyflow.BackendUnavailable, match=f"^backend: {name} cannot run here: "):
        pyflow.backend(name)
    assert _backend.current() == "auto"


@needs_kernels
def test_the_environment_chooses():
    code = "import pyflow; from pyflow import _backend; print(_backend.current())"
    assert run(code, PYFLOW_BACKEND="reference").stdout.strip() == "reference"
    assert run(code, PYFLOW_BACKEND="").stdout.strip() == "auto"


@needs_kernels
@pytest.mark.parametrize("name, why", [("gpu", "name must be one of auto, "), ("cuda", "cuda cannot run here: no GPU")])
def test_an_unavailable_pyflow_backend_fails_the_first_operation(name, why, monkeypatch):
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code = (
        "import torch, pyflow\n"
        "x = torch.ones(2, 2)\n"
        "with pyflow.backend('auto'): pyflow.ops.affine_coupling(x, x, x)\n"
        "pyflow.ops.affine_coupling(x, x, x)\n"
    )
    done = run(code, PYFLOW_BACKEND=name)
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"pyflow.BackendUnavailable: affine_coupling: PYFLOW_BACKEND={name}: {why}")


@needs_kernels
def test_an_unavailable_instruction_set():
    code = "import pyflow; print(pyflow._backend.status()['cpu'])"
    done = run(code, PYFLOW_CPU_ISA="sse2")
    assert done.stdout.startswith("PYFLOW_CPU_ISA=sse2 is not available here")
    code = "import torch, pyflow; print(pyflow.ops.additive_coupling(torch.ones(2, 2), torch.ones(2, 2)).sum().item())"
    assert run(code, PYFLOW_CPU_ISA="sse2").stdout.strip() == "8.0"


@needs_kernels
def test_a_library_that_is_not_ours_is_refused_in_one_sentence():
    other = Path(torch.__file__).parent / "lib/libtorch_cpu.so"
    with pytest.raises(OSError, match=r"libtorch_cpu\.so is of another version of pyflow: build it again$"):
        _native.load(other)


def test_the_reference_is_registered_for_every_operator():
    for name in SCHEMAS:
        kernels = torch._C._dispatch_dump(f"pyflow::{name}")
        assert "CompositeExplicitAutograd" in kernels and "Meta" in kernels and "FuncTorchBatched" in kernels, name


def test_a_device_without_kernels_runs_the_reference():
    x = torch.zeros(2, 3, device="meta")
    assert _backend.runs_reference("affine_coupling", x)
    assert pyflow.ops.affine_coupling(x, x, x)[0].device.type == "meta"


def test_triton_without_the_interpreter_refuses_cpu_tensors(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_backend, "_process", "triton")
    monkeypatch.setattr(_backend, "_devices", _backend._find_devices())
    x = torch.zeros(2, 3)
    text = r"^affine_coupling: backend triton cannot run on a tensor on cpu$"
    with pytest.raises(pyflow.BackendUnavailable, match=text):
        pyflow.ops.affine_coupling(x, x, x)
