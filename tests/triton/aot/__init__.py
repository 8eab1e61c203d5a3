"""Ahead-of-time compilation, without a GPU, of the launches that the launchers make.

A launcher is called with CPU tensors while a recorder replaces the launch. Triton then specialises and compiles each
recorded launch for a target. Does not work under TRITON_INTERPRET.

<family>.py in this folder has the launches of triton_kernels/<family>.py: `cases()` maps names, which start with the
target, to launches that are compiled; `large(shape)` returns launches for tensors of more than 2**31 elements, whose
products of integers are searched for overflows; BOUNDED names the kernels without, with the reason; DTYPES maps kernels
to the dtypes of their tensors where these are not all four; REGISTERS and STACK map a case and a kernel to the most
registers, where they are not 168, and bytes of stack, where they are not 0; SLOW names cases that are marked slow.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import triton
import triton.backends.nvidia
from triton._C.libtriton import ir
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import pyflow.triton_kernels
from pyflow.triton_kernels import _launch

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SHAPE = (64, 392)
KERNELS = Path(pyflow.triton_kernels.__path__[0])
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin/cuobjdump"


class Launch(NamedTuple):
    kernel: JITFunction
    args: tuple
    constants: dict

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.fn.__name__}"

    @property
    def tensors(self) -> list[torch.Tensor]:
        return list(_tensors((*self.args, *self.constants.values())))


def _tensors(values: Iterable[object]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


@functools.cache
def families() -> dict[str, ModuleType]:
    """Return the modules of this folder, one per family."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def dense(dtype, count, shape=SHAPE):
    return [torch.empty(shape, dtype=dtype) for _ in range(count)]


def dtypes_of(target: str, others: int) -> tuple[torch.dtype, ...]:
    """Every dtype for sm_90, the first ones for other targets."""
    return (F32, F64, BF16, F16)[: 4 if target == "sm_90" else others]


@contextlib.contextmanager
def scalars_on_the_device() -> Iterator[None]:
    """Treat 0-d CPU tensors as tensors in GPU memory, not as numbers."""
    real, _launch.by_value = _launch.by_value, lambda tensor: False
    try:
        yield
    finally:
        _launch.by_value = real


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record the launches made inside the block instead of running them."""
    launches: list[Launch] = []

    def record(device, kernel, count, num_warps, args, constants, of_space):
        launches.append(Launch(kernel, args, {"num_warps": num_warps, **of_space, **constants}))

    real, _launch._on_device = _launch._on_device, record
    try:
        yield launches
    finally:
        _launch._on_device = real


def specialised(launch: Launch, target: str) -> tuple[ASTSource, BaseBackend, object]:
    """Return the specialised source of the launch, the backend of the target and the compile options."""
    backend = make_backend(TARGETS[target])
    kernel, constants = launch.kernel, {"num_warps": 4, "enable_fp_fusion": False, **launch.constants}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, debug=False, **constants)
    options, signature, constexprs, attrs = kernel._pack_args(backend, constants, bound, specialization, options)
    return ASTSource(kernel, signature, constexprs, attrs), backend, options


def compiled(launch: Launch, target: str) -> CompiledKernel:
    source, _, options = specialised(launch, target)
    return triton.compile(source, target=TARGETS[target], options=options.__dict__)


def ttir(launch: Launch, target: str) -> str:
    """Return the launch as TTIR with all calls inlined: the first stage of `compiled`, in a tenth of its time."""
    source, backend, options = specialised(launch, target)
    context, stages = ir.context(), {}
    ir.load_dialects(context)
    backend.load_dialects(context)
    backend.add_stages(stages, options, source.language)
    functions = backend.get_codegen_implementation(options)
    module = source.make_ir(TARGETS[target], options, functions, backend.get_module_map(), context)
    return str(stages["ttir"](module, {}))


def launched_kernels() -> set[str]:
    """Return "module.name" of every @triton.jit function that only launchers call, not other kernels."""
    called = {
        name.id
        for _, node in jit_functions()
        for name in ast.walk(node)
        if isinstance(name, ast.Name) and name.id != node.name
    }
    return {f"{module}.{node.name}" for module, node in jit_functions() if node.name not in called}


@functools.cache
def jit_functions() -> list[tuple[str, ast.FunctionDef]]:
    """Return the module and the source of every @triton.jit function, of kernels and of what they call."""
    found = []
    for path in sorted(KERNELS.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                found.append((path.stem, node))
    return found


class Resources(NamedTuple):
    registers: int
    stack: int
    local: int


def resources(kernel: CompiledKernel) -> Resources:
    """Return the registers and memory that ptxas assigned."""
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", disassembled(kernel, "-res-usage"))
    assert found
    return Resources(*map(int, found.groups()))


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str
    target: int | None  # of a branch


def sass(kernel: CompiledKernel) -> list[Instruction]:
    """Return the instructions up to the last exit: subroutines of slow paths come after it."""
    found = []
    for line in re.finditer(
        r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P[T\d]+ +)?([\w.]+)(.*?);", disassembled(kernel), re.M
    ):
        target = re.search(r"0x([0-9a-f]+)\s*$", line[3]) if line[2].startswith("BRA") else None
        found.append(Instruction(int(line[1], 16), line[2], line[3], int(target[1], 16) if target else None))
    last = max(k for k, one in enumerate(found) if one.name == "EXIT")
    return found[: last + 1]


def disassembled(kernel: CompiledKernel, option: str = "-sass") -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
