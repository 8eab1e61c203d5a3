"""Which implementation runs, and why the others do not.

A call of a public function goes to the operator, whose kernel torch's dispatcher picks by device: C++ on a
CPU, a Triton launcher on a GPU (the CUDA kernel without Triton). Where no compiled kernel exists, the public
function runs the plain-torch reference itself, so that torch.compile can still fuse it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._schemas import SCHEMAS, define, library

NAMES = ("auto", "cpu", "triton", "cuda", "reference")

# the choice, which dynamo guards on: that of the innermost block of this thread (`choice`, missing outside), else the
# process's. A plain threading.local: dynamo reads no subclass of it by thread, and no ContextVar at all.
_thread = threading.local()
_process = "auto"
_blocks_were_opened = False  # by any thread, ever: until then a call need not ask for its thread's choice

# the calls that made the process's choice, oldest first; one whose object is alive may still become a block
_calls: list[tuple[Callable[[], object], str]] = [(lambda: None, "auto")]
_lock = threading.Lock()

unusable: dict[str, str] = {}  # a PYFLOW_BACKEND that cannot be had -> why

_families: dict[str, str] = {}  # operator -> family, whose name is the file in every room
_operators: dict[str, torch._ops.OpOverload] = {}
_functions: dict[str, type] = {}  # operator -> its torch.autograd.Function
_interpreter: torch.library.Library | None = None  # CPU kernels that give way to the interpreter where it is chosen


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


def _find_devices() -> dict[str, tuple[str, ...]]:
    """The kinds of device a choice has compiled kernels for; Triton's interpreter counts as one."""
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
_cuda_library: torch.library.Library | None = None  # the CUDA operators' schemas, kept alive


def status() -> dict[str, str | None]:
    """Every backend and why it cannot run here (None: it can)."""
    return {"cpu": cpu_missing, "triton": _triton_missing(), "cuda": _cuda_missing(), "reference": None}


class BackendUnavailable(RuntimeError):
    """The chosen backend cannot run here; the text says why."""

    # a traceback shows the public name
    __module__ = "pyflow"


class backend:
    """Choose the implementation: for the process by a call, for a thread by a `with` block.

    Args:
        name: "auto" (the fastest that runs on the tensor's device), "cpu", "triton", "cuda" or "reference".
            "triton" on CPU tensors means Triton's interpreter and needs TRITON_INTERPRET=1.

    Raises:
        ValueError: unknown name.
        BackendUnavailable: the backend cannot run here; the text says why.

    Notes:
        A block holds in its own thread until it ends, before the process's choice; a call inside a block holds until
        that block ends. PYFLOW_BACKEND is the process's choice at import. A backward runs on the backend of its
        forward, wherever it runs; in a graph of torch.compile on a GPU, which is compiled anew for another choice,
        the process's choice decides between Triton and CUDA.

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
        # not a call, then: take back what __init__ did as one
        if self._around:
            self._around.choice, self._around = self._replaced, None
        _forget_for_process(self)
        _open(self, self.name)
        return self

    def __exit__(self, *_: object) -> None:
        _close(self)


def current() -> str:
    """The name of the backend chosen here: for this thread by a block, else for the process."""
    return (getattr(_thread, "choice", None) if _blocks_were_opened else None) or _process


@dataclass
class _Block:
    owner: object
    choice: str


def _blocks() -> list[_Block]:
    """The open blocks of this thread."""
    if not hasattr(_thread, "blocks"):
        _thread.blocks = []
    return _thread.blocks


def _open(owner: object, choice: str) -> None:
    global _blocks_were_opened
    _blocks_were_opened = True
    _blocks().append(_Block(owner, choice))
    _thread.choice = choice


def _close(owner: object) -> None:
    """Blocks of coroutines need not end in order."""
    blocks = _blocks()
    del blocks[max(i for i, block in enumerate(blocks) if block.owner is owner)]
    if blocks:
        _thread.choice = blocks[-1].choice
    else:
        del _thread.choice


@contextlib.contextmanager
def on(choice: str) -> Iterator[None]:
    """A block with the choice of another time, which was possible then."""
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
        # a call that nobody holds will never be a block: what came before it is over
        final = max((i for i, (holder, _) in enumerate(_calls) if holder() is None), default=0)
        _calls[:] = [*_calls[final:], (weakref.ref(call), call.name)]
        _process = call.name


def _forget_for_process(call: backend) -> None:
    global _process
    with _lock:
        _calls[:] = [entry for entry in _calls if entry[0]() is not call]
        _process = _calls[-1][1]


def _offer_interpreter() -> None:
    """Register the Triton kernels for CPU tensors too, for threads that choose them."""
    global _interpreter
    if _interpreter is None:
        _interpreter = torch.library.Library("pyflow", "IMPL")
        for op in _families:
            _interpreter.impl(op, _interpretable(op), "CPU", with_keyset=True, allow_override=True)


def _interpretable(op: str) -> Callable:
    """A CPU kernel that runs the Triton kernel in a thread that chose it, else what was there before."""
    compiled = torch.library.get_kernel(_operators[op], "CPU")

    def launch(keys: torch._C.DispatchKeySet, *args: object) -> object:
        if current() == "triton":
            return _triton_kernel(op)(*args)
        return compiled.call_boxed(keys, *args)

    return launch


def runs_reference(op: str, x: Tensor, cuda: bool = True) -> bool:
    """Whether the public function runs plain torch: chosen, no kernel here, or a transform without a rule.

    Without `cuda` only Triton has kernels for a GPU, csrc/cuda none.
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


def call(name: str, *args: object) -> object:
    """Run an operator by the shortest way: its autograd function itself, or below the autograd key.

    The dispatcher would find the same function after two more hops through Python, which cost 20 us on a
    warm cache and 200 us on one that a large tensor has just gone through.
    """
    op = _operators[name]
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return op(*args)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        # a trace records operators, and would record a Python function as one it cannot save
        return op(*args) if torch.jit.is_tracing() else _functions[name].apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _on_its_backend(setup_context: Callable, backward: Callable) -> tuple[Callable, Callable]:
    """The two, with backward on the backend of its forward whichever thread it runs in, and when."""

    def remember(ctx: object, inputs: tuple, output: object) -> None:
        ctx.backend = current()
        setup_context(ctx, inputs, output)

    def run(ctx: object, *grads: object) -> object:
        if current() == ctx.backend:
            return backward(ctx, *grads)
        with on(ctx.backend):
            return backward(ctx, *grads)

    return remember, run


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
        choice = current()
        if choice == "cuda" or (choice == "auto" and not _triton_runs):
            return getattr(_cuda_ops(), op)(*args)
        return _triton_kernel(op)(*args)

    return launch


def _triton_kernel(op: str) -> Callable:
    return getattr(importlib.import_module(f"pyflow.triton_kernels.{_families[op]}"), op)


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
        setup_context, backward = _on_its_backend(setup_context, backward)
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=library)
        _functions[op] = _function(_operators[op], setup_context, backward)


def finish() -> None:
    """After every family has registered: check the table, then apply PYFLOW_BACKEND."""
    unregistered = SCHEMAS.keys() - _families.keys()
    if unregistered:
        raise RuntimeError(f"operators without an implementation: {sorted(unregistered)}")
    _choose_by_environment()
    if cpu_missing and not os.environ.get("PYFLOW_CPU_ISA"):
        warnings.warn(f"pyflow runs its plain-torch reference on CPU tensors: {cpu_missing}", stacklevel=3)


def _choose_by_environment() -> None:
    """The process's first choice: PYFLOW_BACKEND. One that cannot be had fails the first operation, not the import."""
    global _process
    wanted = os.environ.get("PYFLOW_BACKEND") or "auto"
    try:
        backend(wanted)
    except (ValueError, RuntimeError) as error:
        _process = wanted
        _calls[:] = [(lambda: None, wanted)]
        unusable[wanted] = f"PYFLOW_BACKEND={wanted}: {str(error).removeprefix('backend: ')}"
