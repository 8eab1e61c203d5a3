"""The built modules use only the stable ABI and have no side effects on the process."""

import re
import sys
from pathlib import Path

import pytest

import pyflow

from ..building import need, run

PACKAGE = Path(pyflow.__file__).parent
if not (PACKAGE / "_C.so").exists():
    pytest.skip("this installation has no native modules", allow_module_level=True)
OPERATORS = [path for path in (PACKAGE / "_C.so", PACKAGE / "_CUDA.so") if path.exists()]
HOST = [*PACKAGE.glob("_host.*.so")]


def dynamic(path, tag):
    need("objdump")
    return re.findall(rf"^\s+{tag}\s+(\S+)", run("objdump", "-p", path).stdout, re.MULTILINE)


@pytest.mark.parametrize("path", OPERATORS, ids=lambda p: p.name)
def test_operators_use_only_the_stable_abi(path):
    need("nm")
    undefined = re.findall(r"^\s+[Uw] (\S+)", run("nm", "-D", path).stdout, re.MULTILINE)
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in undefined)
    assert not [name for name in undefined if re.match(r"_Z[A-Z]*(N[KVRO]*)?(3c10|2at|5torch)", name)]
    assert not [name for name in undefined if name.startswith(("Py", "_Py"))]


@pytest.mark.parametrize("path", [*OPERATORS, *HOST], ids=lambda p: p.name)
def test_no_pyflow_symbol_is_undefined(path):
    need("nm")
    assert not [line for line in run("nm", "-DC", "--undefined-only", path).stdout.splitlines() if "pyflow::" in line]


@pytest.mark.parametrize("path", [*OPERATORS, *HOST], ids=lambda p: p.name)
def test_no_openmp_library_and_no_rpath(path):
    needed = dynamic(path, "NEEDED")
    assert not [name for name in needed if re.match(r"lib(g|i|)omp|libc10|libtorch_python|libpython", name)], needed
    assert not dynamic(path, "R(?:UN)?PATH")


@pytest.mark.parametrize("path", HOST, ids=lambda p: p.name)
def test_host_does_not_link_torch(path):
    assert not [name for name in dynamic(path, "NEEDED") if "torch" in name or "c10" in name]


def test_import_keeps_denormals():
    code = """
import torch, pyflow
x = torch.full((64,), 1e-40)
pyflow.ops.affine_coupling(torch.randn(64, 64), torch.randn(64, 64), torch.randn(64, 64))
assert 1e-310 * float("1") != 0
assert (x * 1.0 != 0).all() and (x / 2 + x / 2 == x).all()
assert (pyflow.ops.additive_coupling(x, torch.zeros(64)) == x).all()
"""
    run(sys.executable, "-c", code)
