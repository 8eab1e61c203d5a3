"""Which implementation runs, and why the others do not.

A call of a public function goes to the operator, whose kernel torch's dispatcher picks by device: C++ on a
CPU, a Triton launcher on a GPU (the CUDA kernel without Triton). Where no compiled kernel exists, the public
function runs the plain-torch reference itself, so that torch.compile can still fuse it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._schemas import SCHEMAS, define, library

NAMES = ("auto", "cpu", "triton", "cuda", "reference")

# what the reader of `runs_reference` needs on every call: plain module globals, which dynamo can guard on
_choice = "auto"
_native_devices: frozenset[str] = frozenset()
_triton_runs = False

_families: dict[str, str] = {}  # operator -> family, whose name is the file in every room
_operators: dict[str, torch._ops.OpOverload] = {}
_functions: dict[str, type] = {}  # operator -> its torch.autograd.Function
_interpreter: torch.library.Library | None = None  # holds the CPU kernels while the interpreter stands in


def _load_cpu() -> str | None:
    """Load the operators' C++ kernels; None, or why that is not possible."""
    here = Path(__file__).parent
    if not (here / "_C.so").exists():
        return "this installation has no compiled kernels (built without a C++ compiler, or without torch in sight)"
    try:
        host = importlib.import_module("pyflow._host")
    except ImportError as error:
        return f"the compiled module does not import: {error}"
    if host.isa() is None:
        wanted = os.environ.get("PYFLOW_CPU_ISA")
        if wanted:
            return f"PYFLOW_CPU_ISA={wanted} is not available here (compiled: {host.compiled_isas()})"
        return f"the CPU has none of the compiled instruction sets ({host.compiled_isas()})"
    try:
        torch.ops.load_library(str(here / "_C.so"))
    except OSError as error:
        return f"the compiled operators do not load: {error}"
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


cpu_missing = _load_cpu()
_cuda_library: torch.library.Library | None = None  # the CUDA operators' schemas, kept alive


def status() -> dict[str, str | None]:
    """Every backend and why it cannot run here (None: it can)."""
    return {"cpu": cpu_missing, "triton": _triton_missing(), "cuda": _cuda_missing(), "reference": None}


def _find_native_devices() -> frozenset[str]:
    devices = set()
    if interpreting() if _choice == "triton" else cpu_missing is None:
        devices.add("cpu")
    if torch.cuda.is_available() and (_triton_missing() is None or _cuda_missing() is None):
        devices.add("cuda")
    return frozenset(devices)


class backend:
    """Choose the implementation: a call sets it, a `with` block restores the previous one.

    Args:
        name: "auto" (the fastest that runs on the tensor's device), "cpu", "triton", "cuda" or "reference".
            "triton" on CPU tensors means Triton's interpreter and needs TRITON_INTERPRET=1.

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend cannot run here; the text says why.

    Notes:
        The choice holds for the whole process. PYFLOW_BACKEND sets it at import.

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
            raise RuntimeError(f"backend: {name} cannot run here: {missing}")
        self._previous = _choice
        _select(name)

    def __enter__(self) -> backend:
        return self

    def __exit__(self, *_: object) -> None:
        _select(self._previous)


def current() -> str:
    """The chosen backend's name."""
    return _choice


def _select(name: str) -> None:
    global _choice, _native_devices, _triton_runs, _interpreter
    _choice = name
    _native_devices = _find_native_devices()
    _triton_runs = _triton_missing() is None
    if _interpreter is not None:
        _interpreter._destroy()
        _interpreter = None
    if name == "triton" and interpreting():
        _interpreter = torch.library.Library("pyflow", "IMPL")
        for op, family in _families.items():
            kernel = getattr(importlib.import_module(f"pyflow.triton_kernels.{family}"), op)
            _interpreter.impl(op, kernel, "CPU")


def runs_reference(op: str, x: Tensor, cuda: bool = True) -> bool:
    """Whether the public function runs plain torch: chosen, no kernel here, or a transform without a rule.

    Without `cuda` only Triton has kernels for a GPU, csrc/cuda none.
    """
    if _choice == "reference":
        return True
    if _under_transform():
        return True
    kind = x.device.type
    if kind in _native_devices and _choice in ("auto", "triton", kind):
        return kind == "cuda" and not cuda and (_choice == "cuda" or not _triton_runs)
    if _choice != "auto":
        raise RuntimeError(f"{op}: backend {_choice} cannot run on a tensor on {x.device}")
    return True


def call(name: str, *args: object) -> object:
    """Run an operator by the shortest way: its autograd function itself, or below the autograd key.

    The dispatcher would find the same function after two more hops through Python, which cost 20 us on a
    warm cache and 200 us on one that a large tensor has just gone through.
    """
    op = _operators[name]
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return op(*args)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return _functions[name].apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _function(op: torch._ops.OpOverload, setup_context: Callable, backward: Callable) -> type:
    def forward(ctx: object, *args: object) -> object:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*args)
        setup_context(ctx, args, output)
        return output

    return type(
        op._opname, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )


def _under_transform() -> bool:
    """Inside forward-mode AD or a torch.func transform other than vmap, for which operators have a rule."""
    if forward_ad._current_level >= 0:
        return True
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    vmap = torch._C._functorch.TransformType.Vmap
    return any(level.key() != vmap for level in torch._C._functorch.get_interpreter_stack())


# what torch.compiler.assume_constant_result does, without importing dynamo: the transforms that are
# active while a function is traced are part of what is traced
_under_transform._dynamo_marked_constant = True


def _cuda_kernel(op: str) -> Callable:
    """The kernel for CUDA tensors: Triton with fusion off, or the CUDA operator where that was chosen."""

    def launch(*args: object) -> object:
        if _choice == "cuda" or (_choice == "auto" and _triton_missing()):
            return getattr(_cuda_ops(), op)(*args)
        return getattr(importlib.import_module(f"pyflow.triton_kernels.{_families[op]}"), op)(*args)

    return launch


def _cuda_ops() -> object:
    global _cuda_library
    if _cuda_library is None:
        _cuda_library = define("pyflow_cuda")
        torch.ops.load_library(str(Path(__file__).parent / "_CUDA.so"))
    return torch.ops.pyflow_cuda


def register(
    op: str,
    family: str,
    *,
    reference: Callable,
    fake: Callable,
    vmap: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> None:
    """Tell torch everything about one operator. All callables take the schema's arguments in order.

    Without `backward` nothing the operator takes is differentiable.
    """
    name = f"pyflow::{op}"
    _families[op] = family
    library.impl(op, reference, "CompositeExplicitAutograd")
    library.impl(op, _cuda_kernel(op), "CUDA")
    torch.library.register_fake(name, fake, lib=library)
    torch.library.register_vmap(name, vmap, lib=library)
    _operators[op] = getattr(torch.ops.pyflow, op).default
    if backward is not None:
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=library)
        _functions[op] = _function(_operators[op], setup_context, backward)


def finish() -> None:
    """After every family has registered: check the table, then apply PYFLOW_BACKEND."""
    unregistered = SCHEMAS.keys() - _families.keys()
    if unregistered:
        raise RuntimeError(f"operators without an implementation: {sorted(unregistered)}")
    _select("auto")
    wanted = os.environ.get("PYFLOW_BACKEND", "auto")
    if wanted != "auto":
        backend(wanted)
    if cpu_missing and not os.environ.get("PYFLOW_CPU_ISA"):
        warnings.warn(f"pyflow runs its plain-torch reference on CPU tensors: {cpu_missing}", stacklevel=3)
