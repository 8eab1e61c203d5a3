"""Select the implementation of every operator: C++, Triton, CUDA or the plain-torch reference.

A public function calls its operator, and torch's dispatcher picks the kernel by device: C++ on a CPU, a Triton
launcher on a GPU (the CUDA kernel if Triton is missing). If no compiled kernel exists, the public function calls the
plain-torch reference directly instead of the operator, so that torch.compile can fuse it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
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
from torch.autograd import forward_ad

from . import _direct
from ._schemas import SCHEMAS, define, library

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

unusable: dict[str, str] = {}  # the value of PYFLOW_BACKEND, if it cannot run here -> the reason

_families: dict[str, str] = {}  # operator -> family: the file name in ops/, reference/ and triton_kernels/
_operators: dict[str, torch._ops.OpOverload] = {}
_functions: dict[str, type[torch.autograd.Function]] = {}  # operator -> its autograd function
# operator -> (its kernel for CUDA tensors, the types of its arguments), for `_run`; empty without a GPU
_gpu_kernels: dict[str, tuple[Callable, _direct.Kinds]] = {}
_interpreter: torch.library.Library | None = None  # CPU kernels that can run the Triton interpreter; see below


def _load_cpu() -> str | None:
    """Load the C++ kernels; return None, or the reason why they do not load."""
    here = Path(__file__).parent
    if not (here / "_C.so").exists():
        return "this installation has no compiled kernels (built without a C++ compiler, or torch was not found)"
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
    """Register the Triton kernels for CPU tensors, used by threads that choose "triton" (the interpreter)."""
    global _interpreter
    if _interpreter is None:
        _interpreter = torch.library.Library("pyflow", "IMPL")
        for op in _families:
            _interpreter.impl(op, _interpretable(op), "CPU", with_keyset=True, allow_override=True)


def _interpretable(op: str) -> Callable:
    """Return a CPU kernel that runs the Triton kernel in threads that chose it, else the compiled CPU kernel."""
    compiled = torch.library.get_kernel(_operators[op], "CPU")

    def launch(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        if current() == "triton":
            return _triton_kernel(op)(*args)
        return compiled.call_boxed(keys, *args)

    return launch


def runs_reference(op: str, x: Tensor, cuda: bool = True) -> bool:
    """Whether the public function calls the plain-torch reference instead of the operator.

    It does if the reference is chosen, if the device has no kernel, and under a transform that operators have no
    rule for. `cuda=False`: csrc/cuda has no kernel for this operator, so that a GPU needs Triton.
    """
    choice = current()
    if choice == "reference" or _under_transform():
        return True
    kind = x.device.type
    if kind in _devices.get(choice, ()):
        return kind == "cuda" and not cuda and (choice == "cuda" or not _triton_runs)
    if choice != "auto":
        why = unusable.get(choice) or f"backend {choice} cannot run on a tensor on {x.device}"
        raise BackendUnavailable(f"{op}: {why}")
    return True


def call(name: str, *args: Any) -> Any:
    """Run an operator: apply its autograd function directly, or skip the autograd key if no gradient is needed.

    The dispatcher would reach the same function after two more Python calls, which cost 20 us with a warm cache and
    200 us after a large tensor has evicted it.
    """
    op = _operators[name]
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return op(*args)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        # torch.jit.trace can save operators but not Python autograd functions
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]  # missing in torch.jit.__all__
        return op(*args) if tracing else _functions[name].apply(*args)
    return _run(name, args)


def _run(name: str, args: tuple) -> Any:
    """Run the kernel of an operator below autograd; on a GPU without the dispatcher, where `_direct` allows it."""
    with torch._C._AutoDispatchBelowAutograd():
        if name in _gpu_kernels:
            kernel, kinds = _gpu_kernels[name]
            if _direct.changes_nothing(args, kinds):
                return kernel(*args)
        return _operators[name](*args)


def _on_its_backend(setup_context: Callable, backward: Callable) -> tuple[Callable, Callable]:
    """Return both functions, changed so that the backward runs on the backend of its forward in any thread."""

    def remember(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.backend = current()
        setup_context(ctx, inputs, output)

    def run(ctx: Any, *grads: Any) -> Any:
        if current() == ctx.backend:
            return backward(ctx, *grads)
        with on(ctx.backend):
            return backward(ctx, *grads)

    return remember, run


def _function(op: str, setup_context: Callable, backward: Callable) -> type[torch.autograd.Function]:
    def forward(ctx: Any, *args: Any) -> Any:
        output = _run(op, args)
        setup_context(ctx, args, output)
        return output

    return type(op, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})


def _under_transform() -> bool:
    """Whether forward-mode AD or a torch.func transform other than vmap is active; operators have a vmap rule only."""
    if forward_ad._current_level >= 0:
        return True
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    vmap = torch._C._functorch.TransformType.Vmap
    return any(level.key() != vmap for level in torch._C._functorch.get_interpreter_stack())


# Dynamo evaluates the function while tracing: the active transforms do not change within a graph. This is
# torch.compiler.assume_constant_result without importing dynamo.
vars(_under_transform)["_dynamo_marked_constant"] = True


def _cuda_kernel(op: str) -> Callable:
    """Return the kernel for CUDA tensors: the Triton launcher, or the CUDA operator if chosen or without Triton."""

    def launch(*args: Any) -> Any:
        choice = current()
        if choice == "cuda" or (choice == "auto" and not _triton_runs):
            return getattr(_cuda_ops(), op)(*args)
        return _triton_kernel(op)(*args)

    return launch


@functools.cache
def _triton_kernel(op: str) -> Callable:
    return getattr(importlib.import_module(f"pyflow.triton_kernels.{_families[op]}"), op)


def _cuda_ops() -> Any:
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
    """Register one operator: kernels, fake kernel, vmap rule and autograd formula.

    All callables take the arguments of the schema in order. Without `backward` the operator is not differentiable.
    """
    name = f"pyflow::{op}"
    _families[op] = family
    library.impl(op, reference, "CompositeExplicitAutograd")
    on_gpu = _cuda_kernel(op)
    library.impl(op, on_gpu, "CUDA")
    torch.library.register_fake(name, fake, lib=library)
    torch.library.register_vmap(name, vmap, lib=library)
    _operators[op] = getattr(torch.ops.pyflow, op).default
    kinds = _direct.kinds_of(_operators[op])
    if torch.cuda.is_available() and kinds is not None:
        _gpu_kernels[op] = on_gpu, kinds
    if backward is not None:
        assert setup_context is not None
        setup_context, backward = _on_its_backend(setup_context, backward)
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=library)
        _functions[op] = _function(op, setup_context, backward)


def finish() -> None:
    """Check that every schema has an implementation, then apply PYFLOW_BACKEND. Called once all families are loaded."""
    unregistered = SCHEMAS.keys() - _families.keys()
    if unregistered:
        raise RuntimeError(f"operators without an implementation: {sorted(unregistered)}")
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
