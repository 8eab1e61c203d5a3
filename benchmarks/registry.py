"""What is measured: a case is one computation at one shape, with everybody who can do it."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
Call = Callable[[], Outputs]

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
        contenders: in the order of the report; "eager", "compile" and "pyflow" mean the same everywhere. The
            harness adds the other instruction sets and backends of "pyflow", and the copies.
        peer: the contender that is another package doing the same.
        compare: pairs of contenders whose ratio the case is about.
        pages: "reused" or "fresh", see `measure.set_pages`.
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


def select(pattern: str | None = None, quick: bool = False, pages: str | None = None) -> list[Case]:
    """Cases whose name contains the pattern (with * and ? as in file names); a pattern also finds the slow ones."""
    cases = all_cases(pages).values()
    if pattern:
        return [case for case in cases if fnmatch(case.name, f"*{pattern}*")]
    return [case for case in cases if case.quick or not quick]


def normals(shape: tuple[int, ...], device: torch.device, count: int, dtype: torch.dtype = torch.float32) -> Outputs:
    """The same normal tensors in every process."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for _ in range(count))


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


def peer(contender: str, module: str) -> object:
    """The other package's module, or Missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"the package {contender} is not installed") from error


def wide(tensors: Outputs) -> Outputs:
    return tuple(t.double() for t in tensors)
