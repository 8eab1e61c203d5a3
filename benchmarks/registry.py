"""What is measured: a case is one computation at one shape, with everybody who can do it."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import TypeVar

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
Call = Callable[[], Outputs]
Contender = TypeVar("Contender")

# a family is the file of that name
FAMILIES = (
    "coupling", "energy", "flow_head", "fsq", "gan_qp", "hsic", "hsic_stats", "noise", "sde", "sector", "spectral",
)  # fmt: skip

# how the name of a case with fresh pages ends
FRESH = ", fresh pages"


class Missing(Exception):
    """Why a case or a contender cannot run here."""


@dataclass
class Problem:
    """A case built on a device; all contenders work on the same tensors.

    Attributes:
        calls: contender -> the call that is timed.
        truth: the same result from the reference in float64; by contender where they compute different things.
        bytes: each input read once and each output written once, where that is the limit; a backward reads again
            what it needs.
        flops: floating-point operations, where counting them says something.
        missing: contender -> why it is not among the calls.
        forms: contender -> how to bring its result into the form of the truth.
        tolerance: allowed error relative to |truth| + its root mean square; None: by the dtype of eager's result.
    """

    calls: dict[str, Call]
    truth: Call | dict[str, Call]
    bytes: int | None = None
    flops: int | None = None
    missing: dict[str, str] = field(default_factory=dict)
    forms: dict[str, Callable[[Outputs], Outputs]] = field(default_factory=dict)
    tolerance: float | None = None


@dataclass(frozen=True)
class Case:
    """One row group of the report.

    Attributes:
        name: "family/what".
        build: (shape, device) -> Problem.
        shape: what is measured; tiny: what the tests build.
        gpu: what is measured on a GPU instead; a case that has it is part of --gpu.
        contenders: in the order of the report; "eager", "compile" and "pyflow" mean the same everywhere. The
            harness adds the other instruction sets and backends of "pyflow", and the copies.
        peer: the contender that is another package doing the same.
        compare: pairs of contenders whose ratio the case is about.
        pages: "reused" or "fresh", see `memory.set_pages`.
        quick: part of --quick.
        sweep: number of elements, for a point of the cost-over-size plot.
        memory: whether the case is about memory and not about time.
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
        """What is measured on this device."""
        return self.gpu if self.gpu and device.type == "cuda" else self.shape


def all_cases(pages: str | None = None) -> dict[str, Case]:
    """Every case of every family, by name; with `pages` all have these, and a case that exists with both is one."""
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
    """Cases whose name contains the pattern (with * and ? as in file names); a pattern also finds the slow ones.

    With `gpu` only those that have a shape for a GPU.
    """
    cases = [case for case in all_cases(pages).values() if case.gpu or not gpu]
    if pattern:
        return [case for case in cases if fnmatch(case.name, f"*{pattern}*")]
    return [case for case in cases if case.quick or not quick]


def normals(shape: tuple[int, ...], device: torch.device, count: int, dtype: torch.dtype = torch.float32) -> Outputs:
    """The same normal tensors in every process on a device of this kind."""
    source = generator(device)
    return tuple(torch.randn(shape, generator=source, device=device).to(dtype) for _ in range(count))


def generator(device: torch.device) -> torch.Generator:
    """Where `normals` come from: drawn on the device, since 64 M of them take half a second on a CPU."""
    return torch.Generator(device).manual_seed(0)


def compiled(function: Callable) -> Callable:
    """torch.compile as generous to it as it gets: one graph, this very shape."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def bind(function: Callable[..., Outputs], inputs: Outputs, cotangents: Outputs | None = None) -> Call:
    """The function on these inputs as one call; with cotangents forward, and then backward to every input."""
    leaves = tuple(t.detach().requires_grad_(cotangents is not None) for t in inputs)

    def forward() -> Outputs:
        return function(*leaves)

    def forward_backward() -> Outputs:
        outputs = function(*leaves)
        return *outputs, *torch.autograd.grad(outputs, leaves, cotangents)

    return forward if cotangents is None else forward_backward


def peer(package: str, module: str) -> object:
    """The other package's module, or Missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"the package {package} is not installed") from error
    except Exception as error:  # some look for a compiler when they are imported
        raise Missing(f"the package {package} does not import: {error}") from error


def available(makers: Mapping[str, Callable[[], Contender]]) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders that can be made here, and why the others are missing."""
    made, missing = {}, {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except Missing as why:
            missing[name] = str(why)
    return made, missing


def wide(tensors: Outputs) -> Outputs:
    return tuple(t.double() for t in tensors)
