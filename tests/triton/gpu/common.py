"""The device, inputs on it, and comparisons with results on the CPU."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import pyflow
from pyflow import _backend, testing

INTERPRETED = os.environ.get("PYFLOW_TEST_GPU") == "interpreter"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# number of elements that take the interpreter about a second
MOST_INTERPRETED = 16_000
GIB = 2**30

needs_cuda = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no CUDA")


def sized(shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the shapes, under the interpreter only the small ones."""
    return [shape for shape in shapes if not INTERPRETED or math.prod(shape) <= MOST_INTERPRETED]


def few(values: Sequence, step: int = 3) -> Sequence:
    """Return the values, under the interpreter only every `step`-th."""
    return values[::step] if INTERPRETED else values


def draw(shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 1.0) -> Tensor:
    """Return normal values on the CPU, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(tuple(shape), generator=generator, dtype=torch.float64)).to(dtype)


def every_magnitude(dtype: torch.dtype = torch.float32) -> Tensor:
    """Return numbers of every exponent and both signs, zeros, infinities and NaN; all values of a 16-bit dtype."""
    if dtype.itemsize == 2:
        bits = torch.arange(-(2**15), 2**15, 16 if INTERPRETED else 1)
        return bits.to(torch.int16).view(dtype)
    count = 2**12 if INTERPRETED else 2**20
    values = (torch.arange(count) * (2**32 // count + 3) - 2**31).to(torch.int32).view(torch.float32).clone()
    values[:5] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])
    return values.to(dtype)


def moved(value: object, device: str = DEVICE) -> object:
    """Move tensors to the device, also inside lists and tuples; return other values unchanged."""
    if isinstance(value, (list, tuple)):
        return type(value)(moved(v, device) for v in value)
    return value.to(device) if isinstance(value, Tensor) else value


def run(backend: str, device: str, function: Callable, leaves: Sequence, *given: object) -> list[Tensor]:
    """Return the outputs, then the gradients of all leaves that are tensors, on the CPU with their strides kept."""
    leaves = [v.detach().requires_grad_() if isinstance(v, Tensor) else v for v in moved(list(leaves), device)]
    with pyflow.backend(backend):
        outputs = function(*leaves, *moved(given, device))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        ends = [o for o in outputs if o.requires_grad]
        weights = [draw(o.shape, o.dtype, 9).to(device) for o in ends]
        inputs = [v for v in leaves if isinstance(v, Tensor)]
        grads = torch.autograd.grad(ends, inputs, weights, materialize_grads=True)
    return [v.detach().cpu() for v in (*outputs, *grads)]


def compare(
    gpu: str, function: Callable, leaves: Sequence, *given: object,
    sums: Sequence[int] = (), error: float = 2e-5, libm: bool = True,
) -> list[Tensor]:  # fmt: skip
    """Compare with the bits of the C++ kernels; results at `sums` within `error`, with `libm` float64 within rounding."""
    got, want = run(gpu, DEVICE, function, leaves, *given), run("auto", "cpu", function, leaves, *given)
    wide = leaves[0].dtype == torch.float64
    # the interpreter's float64 fma rounds twice
    rounded = (wide and (libm or INTERPRETED)) or _backend.cpu_missing is not None
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        # the reference does not promise strides
        assert a.dtype == b.dtype and (a.stride() == b.stride() or _backend.cpu_missing is not None), f"output {i}"
        if i in sums or rounded:
            bound = (2e-12 if wide else error) + testing.UNIT[a.dtype]
            testing.assert_within(a, b.double(), bound * (1 + b.double().abs()), f"output {i}")
        else:
            testing.assert_same_bits(a, b, f"output {i}")
    return got


def assert_near(got: Tensor, want: Tensor, error: float, name: str = "") -> None:
    """Check a difference of at most `error` times the largest value; devices order sums inside layers differently."""
    want = want.detach().cpu().double()
    testing.assert_within(got.cpu(), want, error * (want.abs().max() if want.numel() else 0.0), name)


def trained(backend: str, device: str, module: nn.Module, inputs: Sequence[Tensor], method: str) -> list[Tensor]:
    """Return outputs of a copy of the module, then gradients of inputs and parameters, on the CPU."""
    module = copy.deepcopy(module).to(device)
    inputs = [v.detach().requires_grad_(v.is_floating_point()) for v in moved(list(inputs), device)]
    with pyflow.backend(backend):
        outputs = getattr(module, method)(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        ends = [o for o in outputs if o.requires_grad]
        leaves = [v for v in (*inputs, *module.parameters()) if v.requires_grad]
        weights = [draw(o.shape, o.dtype, 9).to(device) for o in ends]
        grads = torch.autograd.grad(ends, leaves, weights, materialize_grads=True)
    return [v.detach().cpu() for v in (*outputs, *grads)]


def compare_module(
    module: nn.Module, inputs: Sequence[Tensor], error: float = 1e-4, method: str = "forward"
) -> list[Tensor]:
    """Compare outputs and gradients with those of the same weights on the CPU; integers must be equal."""
    got = trained(_backend.current(), DEVICE, module, inputs, method)
    want = trained("auto", "cpu", module, inputs, method)
    # a small gradient can be the difference of larger ones, so the bound has a least scale
    least = 1e-3 * max(b.abs().max() for b in want if b.is_floating_point())
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == b.dtype, f"output {i}"
        if a.is_floating_point():
            testing.assert_within(a, b, error * max(least, b.abs().max()), f"output {i}")
        else:
            assert torch.equal(a, b), f"output {i}"
    return got


def check_graph(step: Callable[[], tuple[Tensor, ...]], *changes: Callable[[], object]) -> None:
    """Check that the step never synchronises and that its CUDA graph has the same bits, also after each change."""
    wanted = step()
    if INTERPRETED:
        for change in changes:
            change()
            step()
        pytest.skip("the interpreter has no CUDA graphs")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for i, (a, b) in enumerate(zip(captured, wanted, strict=True)):
        testing.assert_same_bits(a, b, f"output {i}")
    for number, change in enumerate(changes):
        change()
        graph.replay()
        for i, (a, b) in enumerate(zip(captured, step(), strict=True)):
            testing.assert_same_bits(a, b, f"output {i} after change {number}")


def check_compiled(function: Callable, leaves: Sequence[Tensor], error: float = 0.0) -> None:
    """Check that the function compiles to one graph with the bits of eager, or within `error` of the largest value."""
    results = []
    for f in (function, torch.compile(function, fullgraph=True)):
        inputs = [v.detach().requires_grad_() for v in moved(list(leaves))]
        outputs = f(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        ends = [o for o in outputs if o.requires_grad]
        grads = torch.autograd.grad(ends, inputs, [draw(o.shape, o.dtype, 9).to(DEVICE) for o in ends])
        results.append([*outputs, *grads])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        if error:
            assert_near(b, a, error, f"output {i}")
        else:
            testing.assert_same_bits(b, a, f"output {i}")


def needs_memory(gib: float) -> None:
    """Skip the test if less GPU memory is free."""
    free = torch.cuda.mem_get_info()[0] / GIB
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, {free:.0f} are")
