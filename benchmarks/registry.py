"""Cases of the benchmark: one computation at one shape, with all contenders that implement it."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
Call = Callable[[], Outputs]
Contender = TypeVar("Contender")

# the files with a list of CASES; found without importing them all, since some import matplotlib
FILES = sorted(Path(__file__).parent.glob("*.py"))
FAMILIES = tuple(path.stem for path in FILES if "\nCASES = [" in path.read_text(encoding="utf-8"))

# suffix of the names of cases with fresh pages
FRESH = ", fresh pages"
# on a GPU: the contender "compile" in this mode of torch.compile, which replays CUDA graphs
REDUCED = "reduce-overhead"


class Missing(Exception):
    """A case or a contender cannot run here; the text says why."""


@dataclass
class Problem:
    """A case built on a device; all contenders get the same tensors.

    Attributes:
        calls: contender -> the call that is timed.
        truth: the reference's result in float64; a dict by contender if they compute different things.
        bytes: memory traffic if each input is read once and each output written once (a backward reads its inputs
            again); None if the case is not limited by memory bandwidth.
        flops: floating-point operations, for cases limited by arithmetic.
        missing: contender -> why it is not in `calls`.
        forms: contender -> function that converts its result to the form of the truth.
        tolerance: allowed error relative to |truth| + its root mean square; None: by the dtype of eager's result.
    """

    calls: dict[str, Call]
    truth: Call | Mapping[str, Call]
    bytes: int | None = None
    flops: int | None = None
    missing: dict[str, str] = field(default_factory=dict)
    forms: Mapping[str, Callable[[Outputs], Outputs]] = field(default_factory=dict)
    tolerance: float | None = None


@dataclass(frozen=True)
class Case:
    """One group of rows of the report.

    Attributes:
        name: "family/what".
        build: (shape, device) -> Problem.
        shape: the measured shape; tiny: the shape for tests.
        gpu: the shape measured on a GPU; only cases with it are part of --gpu.
        contenders: in the order of the report; "eager", "compile" and "pyflow" mean the same in all cases. The
            harness adds the other instruction sets and backends of "pyflow", `REDUCED` on a GPU, and the copies.
        peer: the contender that is another package.
        compare: pairs of contenders whose ratio is reported.
        pages: "reused" or "fresh", see `memory.set_pages`.
        quick: part of --quick.
        sweep: number of elements, for a point in the plot of cost over size.
        memory: whether the case compares memory instead of time.
    """

    name: str
    build: Callable[[tuple[int, ...], torch.device], Problem]
    shape: tuple[int, ...]
    tiny: tuple[int, ...]
    contenders: tuple[str, ...] = ("eager", "compile", "pyflow")
    peer: str | None = None
    compare: tuple[tuple[str, str], ...] = ()
    pages: str = "reused"
    quick: bool = False
    sweep: int | None = None
    memory: bool = False
    gpu: tuple[int, ...] | None = None

    def shape_on(self, device: torch.device) -> tuple[int, ...]:
        """Return the measured shape on this device."""
        return self.gpu if self.gpu and device.type == "cuda" else self.shape


def all_cases(pages: str | None = None) -> dict[str, Case]:
    """Return all cases by name; `pages` sets the pages of all, and cases that differ only in them become one."""
    cases = [case for family in FAMILIES for case in importlib.import_module(f".{family}", __package__).CASES]
    if pages:
        cases = [case for case in cases if not case.name.endswith(FRESH)]
    if pages == "fresh":
        cases = [dataclasses.replace(case, name=case.name + FRESH, pages=pages) for case in cases]
    by_name = {case.name: case for case in cases}
    if len(by_name) != len(cases):
        raise ValueError("two cases have the same name")
    return by_name


def select(pattern: str | None = None, quick: bool = False, pages: str | None = None, gpu: bool = False) -> list[Case]:
    """Return the cases whose name contains the pattern (with * and ?), or without one all cases or the quick ones.

    With `gpu` only cases that have a shape for a GPU.
    """
    cases = [case for case in all_cases(pages).values() if case.gpu or not gpu]
    if pattern:
        return [case for case in cases if fnmatch(case.name, f"*{pattern}*")]
    return [case for case in cases if case.quick or not quick]


def normals(shape: tuple[int, ...], device: torch.device, count: int, dtype: torch.dtype = torch.float32) -> Outputs:
    """Return `count` normal tensors, the same in every process on this kind of device."""
    source = generator(device)
    return tuple(torch.randn(shape, generator=source, device=device).to(dtype) for _ in range(count))


def generator(device: torch.device) -> torch.Generator:
    """Return the generator of `normals`, on the device: drawing 64 M values takes half a second on a CPU."""
    return torch.Generator(device).manual_seed(0)


_mode: str | None = None


@contextmanager
def compile_mode(mode: str) -> Iterator[None]:
    """Choose the mode of `compiled` for cases that are built in this context."""
    global _mode
    previous, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = previous


def compiled(function: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """Compile with torch.compile's most favourable options: one graph, static shapes."""
    return torch.compile(function, fullgraph=True, dynamic=False, mode=_mode)


def bind(function: Callable[..., Outputs], inputs: Outputs, cotangents: Outputs | None = None) -> Call:
    """Bind a function to its inputs; with cotangents the call runs forward, then backward to every input."""
    leaves = tuple(t.detach().requires_grad_(cotangents is not None) for t in inputs)

    def forward() -> Outputs:
        return function(*leaves)

    def forward_backward() -> Outputs:
        outputs = function(*leaves)
        return *outputs, *torch.autograd.grad(outputs, leaves, cotangents)

    return forward if cotangents is None else forward_backward


def peer(package: str, module: str) -> Any:
    """Import another package's module; raises Missing if that fails."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"the package {package} is not installed") from error
    except Exception as error:  # for example, no compiler found at import
        raise Missing(f"the package {package} does not import: {error}") from error


def available(makers: Mapping[str, Callable[[], Contender]]) -> tuple[dict[str, Contender], dict[str, str]]:
    """Return (the contenders that can be made here, name -> why each of the others is missing)."""
    made: dict[str, Contender] = {}
    missing: dict[str, str] = {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except Missing as why:
            missing[name] = str(why)
    return made, missing


def wide(tensors: Outputs) -> Outputs:
    return tuple(t.double() for t in tensors)
