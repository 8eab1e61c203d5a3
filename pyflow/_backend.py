"""Select the implementation of every operator: C++, Triton, CUDA or the plain-torch reference.

A public function calls its operator, and torch's dispatcher picks the kernel by device: C++ on a CPU, a Triton
launcher on a GPU (the CUDA kernel for small tensors, see `MOST_CUDA`, and if Triton is missing). If no compiled kernel
exists, the public function calls the plain-torch reference directly instead of the operator, so that torch.compile can
fuse it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._schemas import define
from ._torch import under_transform_without_rule

NAMES = ("auto", "cpu", "triton", "cuda", "reference")

# The chosen backend: `_thread.choice` inside a `with` block of this thread, else `_process`. Dynamo guards on both.
# A plain threading.local, because dynamo does not support subclasses of it or ContextVar.
_thread = threading.local()
_process = "auto"
_blocks_were_opened = False  # in any thread since import; while False, `current` skips the thread's choice

# calls of `backend` outside a block, oldest first, each with a weak reference to its object: as long as the object
# lives, a `with` statement may still turn the call into a block and undo it
_calls: list[tuple[Callable[[], object], str]] = [(lambda: None, "auto")]
_lock = threading.Lock()

# Largest tensor of a call, in elements, up to which "auto" runs the CUDA operator where Triton runs too: a launch from
# Python takes half the time, its kernel longer, most of all for FSQ and splines. Chosen by benchmarks/backends.py on an
# H200; families without an entry run on Triton.
MOST_CUDA = {
    "coupling": 1 << 18, "energy": 1 << 20, "flow_head": 1 << 20, "fsq": 1 << 17, "gan_qp": 1 << 20, "noise": 1 << 20,
    "sde": 1 << 20, "spline": 1 << 17,
}  # fmt: skip

unusable: dict[str, str] = {}  # the value of PYFLOW_BACKEND, if it cannot run here -> the reason

_interpreter: torch.library.Library | None = None  # keeps the kernels of Triton's interpreter registered


def _load_cpu() -> str | None:
    """Load the C++ kernels; return None, or the reason why they do not load."""
    here = Path(__file__).parent
    if not (here / "_C.so").exists():
        return "this installation has no compiled kernels (built without a C++ compiler, or torch was not found)"
    try:
        _native.load(here / "_C.so")
    except OSError as error:
        return f"the compiled operators do not load: {error}"
    if _native.isa() is None:
        wanted, compiled = os.environ.get("PYFLOW_CPU_ISA"), ",".join(_native.compiled_isas())
        if wanted:
            return f"PYFLOW_CPU_ISA={wanted} is not available here (compiled: {compiled})"
        return f"the CPU has none of the compiled instruction sets ({compiled})"
    return None


def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available() and not interpreting():
        return "no GPU is available (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)"
    return None


def _cuda_missing() -> str | None:
    if not torch.cuda.is_available():
        return "no GPU is available"
    if not (Path(__file__).parent / "_CUDA.so").exists():
        return "this installation was built without nvcc"
    return None


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true")


def _find_devices() -> dict[str, tuple[str, ...]]:
    """Map each backend to the device types that it has compiled kernels for, including Triton's interpreter."""
    gpu = torch.cuda.is_available()
    here = {
        "cpu": ("cpu",) * (cpu_missing is None),
        "triton": ("cuda",) * (gpu and _triton_runs) + ("cpu",) * interpreting(),
        "cuda": ("cuda",) * (_cuda_missing() is None),
    }
    return here | {"auto": here["cpu"] + ("cuda",) * (gpu and (_triton_runs or bool(here["cuda"])))}


cpu_missing = _load_cpu()
_triton_runs = _triton_missing() is None
_devices = _find_devices()
_cuda_library: torch.library.Library | None = None  # keeps the schemas of the CUDA operators alive


def status() -> dict[str, str | None]:
    """Map each backend to the reason why it cannot run here, or to None if it can."""
    return {"cpu": cpu_missing, "triton": _triton_missing(), "cuda": _cuda_missing(), "reference": None}


class BackendUnavailable(RuntimeError):
    """The chosen backend cannot run here; the text says why."""

    # a traceback shows the public name
    __module__ = "pyflow"


class backend:
    """Choose the backend: a call chooses for the process, a `with` block for its thread.

    Args:
        name: "auto" (the fastest that runs on the tensor's device), "cpu", "triton", "cuda" or "reference".
            "triton" on CPU tensors means Triton's interpreter and needs TRITON_INTERPRET=1.

    Raises:
        ValueError: unknown name.
        BackendUnavailable: the backend cannot run here; the text says why.

    Notes:
        A block overrides the process's choice in its own thread until it ends; a call inside a block holds until that
        block ends. PYFLOW_BACKEND sets the process's choice at import. A backward runs on the backend of its forward,
        in any thread. torch.compile recompiles a graph when the choice changes; inside a compiled graph on a GPU the
        process's choice decides between Triton and CUDA.

    Example:
        >>> import pyflow
        >>> with pyflow.backend("reference"):
        ...     y = pyflow.ops.additive_coupling(torch.ones(2, 3), torch.ones(2, 3))
        >>> y[0].tolist()
        [2.0, 2.0, 2.0]
    """

    def __init__(self, name: str) -> None:
        if name not in NAMES:
            raise ValueError(f"backend: name must be one of {', '.join(NAMES)}, got {name!r}")
        missing = status().get(name)
        if missing:
            raise BackendUnavailable(f"backend: {name} cannot run here: {missing}")
        if name == "triton" and interpreting():
            _offer_interpreter()
        self.name = name
        self._around: _Block | None = _blocks()[-1] if _blocks() else None
        if self._around:
            self._replaced = self._around.choice
            self._around.choice = _thread.choice = name
        else:
            _choose_for_process(self)

    def __enter__(self) -> backend:
        # __init__ treated this as a call for the process: undo that
        if self._around:
            self._around.choice, self._around = self._replaced, None
        _forget_for_process(self)
        _open(self, self.name)
        return self

    def __exit__(self, *_: object) -> None:
        _close(self)


def current() -> str:
    """Return the name of the backend chosen for this thread by a block, else for the process."""
    return (getattr(_thread, "choice", None) if _blocks_were_opened else None) or _process


@dataclass
class _Block:
    owner: object
    choice: str


def _blocks() -> list[_Block]:
    """Return the open blocks of this thread, outermost first."""
    if not hasattr(_thread, "blocks"):
        _thread.blocks = []
    return _thread.blocks


def _open(owner: object, choice: str) -> None:
    global _blocks_were_opened
    _blocks_were_opened = True
    _blocks().append(_Block(owner, choice))
    _thread.choice = choice


def _close(owner: object) -> None:
    """Remove the owner's block, which need not be the innermost one: coroutines may interleave blocks."""
    blocks = _blocks()
    del blocks[max(i for i, block in enumerate(blocks) if block.owner is owner)]
    if blocks:
        _thread.choice = blocks[-1].choice
    else:
        del _thread.choice


@contextlib.contextmanager
def on(choice: str) -> Iterator[None]:
    """Run a block on a backend that has already been checked, for example the backend of a forward."""
    if current() == choice:
        yield
        return
    owner = object()
    _open(owner, choice)
    try:
        yield
    finally:
        _close(owner)


def _choose_for_process(call: backend) -> None:
    global _process
    with _lock:
        # a call whose object is gone can no longer become a block, so the calls before it can be dropped
        final = max((i for i, (holder, _) in enumerate(_calls) if holder() is None), default=0)
        _calls[:] = [*_calls[final:], (weakref.ref(call), call.name)]
        _process = call.name


def _forget_for_process(call: backend) -> None:
    global _process
    with _lock:
        _calls[:] = [entry for entry in _calls if entry[0]() is not call]
        _process = _calls[-1][1]


def _offer_interpreter() -> None:
    global _interpreter
    if _interpreter is None:
        from ._operators import offer_interpreter

        _interpreter = offer_interpreter()


def runs_reference(op: str, x: Tensor, cuda: bool = True, triton: bool = True) -> bool:
    """Whether the public function calls the plain-torch reference instead of the operator.

    It does if the reference is chosen, if the device has no kernel, and under a transform that operators have no
    rule for. `cuda=False`: csrc/cuda has no kernel for this operator, so that a GPU needs Triton; `triton=False`: nor
    has triton_kernels.
    """
    choice = current()
    if choice == "reference" or under_transform_without_rule():
        return True
    kind = x.device.type
    if kind in _devices.get(choice, ()):
        if not triton and (kind == "cuda" or choice == "triton"):
            return True
        return kind == "cuda" and not cuda and (choice == "cuda" or not _triton_runs)
    if choice != "auto":
        why = unusable.get(choice) or f"backend {choice} cannot run on a tensor on {x.device}"
        raise BackendUnavailable(f"{op}: {why}")
    return True


def prefers_cuda(family: str, size: Callable[[], int]) -> bool:
    """Whether a call on a GPU runs the CUDA operator instead of the Triton launcher.

    `size()` is the largest tensor's number of elements. The choice does not ask whether a CUDA graph is being captured:
    the kernels of the calls before, which load what a capture cannot, must be those that it captures.
    """
    choice = current()
    if choice != "auto":
        return choice == "cuda"
    if not _triton_runs:
        return True
    most = MOST_CUDA.get(family)
    return most is not None and size() <= most and _cuda_loads()


@functools.cache
def _cuda_loads() -> bool:
    """Load the CUDA operators where "auto" may choose them; if they are there but do not load, say so once."""
    if _cuda_missing() is not None:
        return False
    try:
        cuda_operators()
    except OSError as error:
        warnings.warn(f"pyflow runs Triton's kernels on small tensors too: {error}", stacklevel=1)
        return False
    return True


def cuda_operators() -> Any:
    """Return the namespace of the CUDA operators; the first call loads them, later ones find them loaded."""
    global _cuda_library
    if _cuda_library is None:
        _cuda_library = define("pyflow_cuda")
    torch.ops.load_library(str(Path(__file__).parent / "_CUDA.so"))
    return torch.ops.pyflow_cuda


def finish() -> None:
    """Apply PYFLOW_BACKEND, once all families are loaded."""
    _choose_by_environment()
    if cpu_missing and not os.environ.get("PYFLOW_CPU_ISA"):
        warnings.warn(f"pyflow runs its plain-torch reference on CPU tensors: {cpu_missing}", stacklevel=3)


def _choose_by_environment() -> None:
    """Choose PYFLOW_BACKEND for the process. If it cannot run here, the first operation raises, not the import."""
    global _process
    wanted = os.environ.get("PYFLOW_BACKEND") or "auto"
    try:
        backend(wanted)
    except (ValueError, RuntimeError) as error:
        _process = wanted
        _calls[:] = [(lambda: None, wanted)]
        unusable[wanted] = f"PYFLOW_BACKEND={wanted}: {str(error).removeprefix('backend: ')}"
