"""Sums of the CUDA kernels have the bits of Triton's. test_emulated.py runs this file with TRITON_INTERPRET=1.

Cases are those below, and SUMS in the file of a family in tests/triton/gpu.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from pyflow import ops, testing
from pyflow._operators import OPERATORS
from pyflow.reference import energy

from ..triton import emulated
from ..triton.interpreted.common import draw, run
from ..triton.interpreter import round_as_a_gpu

ROOT = Path(__file__).parent.parent.parent
SHAPE = (3, 2500)  # several segments a row
ROWS = SHAPE[:1]
SEED = 3
# Triton's functions that sum
SUMS = {"sum", "fold", "fold_rows", "row_sums", "sum_segments"}
# families whose sums are not compared here
EXEMPT = {
    "spectral": "its tiles differ",
    "fsq": "the sums are indices: interpreted/ compares them with those of a CPU",
    "sector": "the sums are counts: interpreted/ compares them with those of a CPU",
}


def affine(x, shift, scale):
    return ops.affine_coupling(x, shift, scale, scale_map="tanh")


def spline(x, params):
    return ops.rq_spline(x, params, bins=2)


def gan_qp(real, fake):
    samples = [draw(SHAPE, seed=i) for i in (2, 3)]
    return ops.gan_qp_loss(real, fake, *samples, reduction="none")


def accepted(x):
    """x where a proposal is accepted: samples that differ in the energy alone, by one ulp, so that the sum decides."""
    count = len(x)
    z, z_new, grad, grad_new = (draw((1, SHAPE[1]), seed=i).expand(count, -1) for i in range(4))
    seeds, step, alpha = torch.full((count,), SEED), torch.tensor(0), torch.tensor(0.1)
    ratio = energy.log_ratio(*(v[:1].double() for v in (z, z_new, grad, grad_new)), alpha.double())
    least = (ratio - energy.log_uniforms(1, seeds[:1], step)).float()
    # neighbours of a float32 differ by 1 in its bits
    energies = (least.view(torch.int32) + torch.arange(count) - count // 2).int().view(torch.float32)
    takes = ops.mala_accept(z, z_new, torch.zeros(count), energies, grad, grad_new, alpha, seed=seeds, step=step)[3]
    assert 0 < takes.sum() < count
    return takes * x


class Case(NamedTuple):
    operators: tuple[str, ...]  # whose sums it compares
    function: Callable[..., Any]
    shapes: list[tuple[int, ...]]  # of its arguments


CASES = [
    Case(("affine_coupling",), affine, [SHAPE, SHAPE, SHAPE]),
    Case(("affine_coupling_packed",), ops.affine_coupling_packed, [SHAPE, (SHAPE[0], 2 * SHAPE[1])]),
    Case(("rq_spline",), spline, [SHAPE, (*SHAPE, 5)]),
    Case(("flow_log_prob", "flow_log_prob_backward"), ops.flow_log_prob, [SHAPE, SHAPE[1:]]),
    Case(
        ("sde_step_backward",),
        lambda x, s, a, b, c: ops.sde_step(x, s, a, b, c.abs(), seed=SEED, return_mean=True),
        [SHAPE, SHAPE, ROWS, ROWS, ROWS],
    ),
    Case(
        ("denoising_loss", "denoising_loss_backward"),
        lambda x, std: ops.denoising_loss(x, std.abs() + 1, seed=SEED),
        [SHAPE, ROWS],
    ),
    Case(
        ("langevin_squares",),
        lambda x, s: ops.langevin_step(x, s, snr=0.2, norm="sample", seed=SEED),
        [SHAPE, SHAPE],
    ),
    Case(("gan_qp_loss",), gan_qp, [ROWS, ROWS]),
    Case(("mala_accept",), accepted, [(64,)]),
    Case(("grad_norm_penalty",), ops.grad_norm_penalty, [SHAPE]),
]
# files of gpu/ can be imported under the interpreter, but not where doctests are looked for
INTERPRETED = os.environ.get("PYFLOW_TEST_GPU") == "interpreter"
GPU = sorted((ROOT / "tests/triton/gpu").glob("test_*.py")) if INTERPRETED else []
CASES += [
    Case(*case)
    for path in GPU
    if re.search(r"^SUMS = ", path.read_text(), re.MULTILINE)
    for case in importlib.import_module(f"..triton.gpu.{path.stem}", __package__).SUMS
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.operators[0])
def test_bits(case, monkeypatch):
    leaves = [draw(shape, seed=i) for i, shape in enumerate(case.shapes)]
    with monkeypatch.context() as patch:
        round_as_a_gpu(patch)
        triton = run("triton", case.function, leaves)
    with monkeypatch.context() as patch:
        called = emulated.use(patch)
        cuda = run("triton", case.function, leaves)
    assert called >= {*case.operators}
    for i, (a, b) in enumerate(zip(cuda, triton, strict=True)):
        assert a.count_nonzero()
        testing.assert_same_bits(a, b, f"output {i}")


def functions(module: str, seen: frozenset[str] = frozenset()) -> dict[str, ast.FunctionDef]:
    """Functions of a file of triton_kernels, and those of the files from which it imports some."""
    tree = ast.parse((ROOT / f"triton_kernels/{module}.py").read_text())
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module and node.module not in seen:
            found |= functions(node.module, seen | {module})
    return found | {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def summing(family: str) -> set[str]:
    """Operators of a family whose launchers or kernels call one of SUMS."""
    known = functions(family)

    def sums(name: str, seen: set[str]) -> bool:
        seen.add(name)
        nodes = list(ast.walk(known[name]))
        # `sum` alone is Python's
        names = {n.id for n in nodes if isinstance(n, ast.Name) and n.id != "sum"} | {
            n.attr for n in nodes if isinstance(n, ast.Attribute)
        }
        return bool(names & SUMS) or any(sums(other, seen) for other in names & known.keys() - seen)

    return {name for name, operator in OPERATORS.items() if operator.family == family and sums(name, set())}


def test_every_operator_with_sums_has_a_case():
    families = {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")} & {o.family for o in OPERATORS.values()}
    due = {family: summing(family) for family in families}
    # what the CUDA kernels sum, they are given a place for
    given = {family for family in families if "RowSums" in (ROOT / f"csrc/args/{family}.h").read_text()}
    assert given <= {family for family in families if due[family]}
    assert all(due[family] for family in EXEMPT)
    of_cases = {name for case in CASES for name in case.operators}
    assert of_cases == set().union(*(due[family] for family in families - EXEMPT.keys()))
