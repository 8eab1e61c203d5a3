"""A missing peer package leaves only its own columns empty."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from pyflow.benchmarks import registry

CASES = registry.all_cases()
# the points of the sweep differ only in size
DISTINCT = [name for name, case in CASES.items() if not case.sweep]
# contender -> the packages it needs
PEERS = {
    "normflows": "normflows", "normflows compiled": "normflows", "nflows": "nflows", "zuko": "zuko", "vector-quantize-pytorch": "vector-quantize-pytorch",
    "vector-quantize-pytorch compiled": "vector-quantize-pytorch", "diffusers": "diffusers", "hyppo": "hyppo",
    "KeOps": "pykeops",
}  # fmt: skip
MODULES = {"hyppo", "normflows", "nflows", "zuko", "diffusers", "pykeops", "scipy", "torchdiffeq", "lightning"}
MODULES |= {"vector_quantize_pytorch", "matplotlib", "rich", "tqdm"}


@pytest.fixture
def no_peers(monkeypatch):
    loaded = [name for name in sys.modules if name.partition(".")[0] in MODULES]
    for module in {*MODULES, *loaded}:
        monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.parametrize("name", DISTINCT)
def test_a_missing_package_removes_only_its_own_contenders(name, no_peers):
    case = CASES[name]
    problem = case.build(case.tiny, torch.device("cpu"))
    # there pyflow runs flows of the peer
    needs = PEERS | ({"pyflow": PEERS[case.peer]} if name.startswith("peer_flows/") else {})
    assert set(problem.missing) == set(needs) & set(case.contenders)
    assert set(problem.calls) == set(case.contenders) - set(needs)
    for contender, why in problem.missing.items():
        assert why == f"the package {needs[contender]} is not installed"
    assert set(problem.forms) <= set(problem.calls)


def test_every_peer_is_a_contender_of_some_case():
    assert {name for case in CASES.values() for name in case.contenders} >= set(PEERS)


def test_a_package_that_fails_to_import_is_missing(monkeypatch, tmp_path):
    (tmp_path / "needs_a_compiler.py").write_text("raise RuntimeError('no nvcc')")
    monkeypatch.syspath_prepend(tmp_path)
    made, missing = registry.available({"one": lambda: 1, "other": lambda: registry.peer("x", "needs_a_compiler")})
    assert made == {"one": 1}
    assert missing == {"other": "the package x does not import: no nvcc"}


def test_other_errors_are_raised():
    with pytest.raises(ZeroDivisionError):
        registry.available({"one": lambda: 1 / 0})


BARE = """
import pathlib, sys

# the packages of a machine with torch
HAS = {"torch", "torchgen", "functorch", "triton", "numpy", "pyflow"}
HAS |= {"filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "sympy", "typing_extensions", "setuptools"}
HAS |= {"pytest_benchmark", "pytest", "pluggy", "iniconfig", "packaging", "cpuinfo", "pygments"}

class Bare:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        there = top in HAS or top in sys.stdlib_module_names or top.startswith("_")
        return self.finder.find_spec(name, path, target) if there else None

sys.meta_path = [Bare(finder) for finder in sys.meta_path]
import torch
from pyflow.benchmarks import measure, registry, run

case = registry.all_cases()["fsq/256 tokens forward"]
settings = measure.Settings(threads=1, budget=0.01, compile=False)
sys.exit(run.measure([case], settings, float("inf"), pathlib.Path(sys.argv[1])))
"""


def test_torch_and_pytest_benchmark_are_enough(tmp_path):
    done = subprocess.run([sys.executable, "-c", BARE, str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\[1/1\] fsq/256 tokens forward: eager .*, pyflow .* the package vector-quantize", done.stdout)
    assert "| fsq/256 tokens forward (256, 4) |" in (tmp_path / "bench.md").read_text()
    assert "no plots: the package matplotlib is not installed" in done.stdout
