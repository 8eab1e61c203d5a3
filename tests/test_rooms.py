"""Every family of operators has one file of the same name in every directory below, or an exemption."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from pyflow import _schemas
from pyflow._operators import OPERATORS

from .triton import interpreted_files

ROOT = Path(__file__).parent.parent
ROOMS = [
    "csrc/ops/{}.h", "csrc/args/{}.h", "csrc/cpu/{}.cpp", "csrc/torch/{}.cpp", "csrc/cuda/{}.cu", "triton_kernels/{}.py",
    "pyflow/reference/{}.py", "pyflow/ops/{}.py", "benchmarks/{}.py", "tests/ops/test_{}.py",
    "tests/triton/interpreted/{}.py", "tests/triton/gpu/test_{}.py",
]  # fmt: skip
# (family, file) -> why the family has no such file
EXEMPT = {
    ("hsic", "csrc/cuda/{}.cu"): "its tiles are matrix products, which Triton schedules",
    ("center", "csrc/cuda/{}.cu"): "HSIC, which it serves, has none",
    ("center", "csrc/ops/{}.h"): "one element is a subtraction",
    ("center", "benchmarks/{}.py"): "its case is among those of hsic",
    ("flow_program", "csrc/cuda/{}.cu"): "its tiles are matrix products, which Triton schedules",
}

FAMILY = {name: operator.family for name, operator in OPERATORS.items()}
FAMILIES = sorted(set(FAMILY.values()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("room", ROOMS)
def test_every_family_has_its_file(family, room):
    path = ROOT / room.format(family)
    if "interpreted" in room:
        # a family without a file of its own is tested by its file for GPUs
        path = interpreted_files.FILES.get(family, path)
    reason = EXEMPT.get((family, room))
    assert path.exists() != (reason is not None), f"{path.relative_to(ROOT)}: {reason or 'missing'}"


@pytest.mark.parametrize("op, family", sorted(FAMILY.items()))
def test_every_operator_has_a_kernel_in_every_native_directory(op, family):
    path = ROOT / f"triton_kernels/{family}.py"
    launchers = ast.parse(path.read_text()).body if path.exists() else []
    names = {node.name for node in launchers if isinstance(node, ast.FunctionDef)}
    assert OPERATORS[op].triton == (op in names)
    assert OPERATORS[op].triton or (family, "triton_kernels/{}.py") in EXEMPT
    assert f'm.impl("{op}", TORCH_BOX' in (ROOT / f"csrc/torch/{family}.cpp").read_text()


def test_cuda_sources_see_no_torch_header():
    for path in (ROOT / "csrc/cuda").iterdir():
        assert not re.search(r"#include .*torch", path.read_text()), path.name


def test_hsic_needs_nothing_of_the_operations_but_noise():
    for path in (ROOT / "pyflow/hsic").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2 and node.module is not None:
                assert node.module.partition(".")[0] not in ("nn", "stats"), path.name
                assert node.module == "ops.noise" or node.module.partition(".")[0] != "ops", path.name


def test_the_names_of_integer_arguments_are_those_of_the_compiled_kernels():
    host = pytest.importorskip("pyflow._host", reason="built in a checkout alone")
    for name, texts in host.enums().items():
        # scale maps that no caller names come last
        assert texts[: len(getattr(_schemas, name))] == getattr(_schemas, name)
