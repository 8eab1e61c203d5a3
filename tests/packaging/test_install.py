"""sdist and wheel without native modules, and builds that cannot be; .ci/oldest builds from the sdist and tests that."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pyflow

from ..building import PATH, ROOT, need, run
from .conftest import build_wheel

USE = """
import sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import pyflow
ours = [w for w in caught if "pyflow" in str(w.message)]
import torch
import pyflow.triton_kernels, pyflow.benchmarks
y, logdet = pyflow.ops.affine_coupling(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, 3))
assert (y == 2).all() and (logdet == 0).all()
"""


def test_the_sdist_has_all_files_of_a_build(sdist):
    for path in (
        "CMakeLists.txt", "LICENSE", "setup.py", "pyproject.toml", "CHANGELOG.md", "Makefile", "csrc/cpu/dispatch.cpp",
        "csrc/cpu/tile.h", "csrc/torch/coupling.cpp", "csrc/host/module.cpp", "csrc/math/exp.h", "csrc/ops/coupling.h",
        "pyflow/py.typed", "pyflow/__init__.py", "pyflow/reference/coupling.py", "pyflow/hsic/kernels.py", "triton_kernels/__init__.py",
        "benchmarks/__init__.py", "tests/cpu/kernel_bits/main.cpp",
    ):  # fmt: skip
        assert (sdist / path).is_file(), path
    assert not list(sdist.rglob("*.so"))


def test_every_package_is_in_the_sdist(sdist):
    # setuptools silently skips a folder without __init__.py
    modules = [
        p.relative_to(ROOT) for top in ("pyflow", "triton_kernels", "benchmarks") for p in (ROOT / top).rglob("*.py")
    ]
    assert len(modules) > 10
    assert not [m for m in modules if not (sdist / m).is_file()]


def test_without_a_compiler_the_wheel_is_pure(tree, tmp_path):
    wheel, output = build_wheel(tree, tmp_path, PATH="/nonexistent", CXX="", PYFLOW_NATIVE="")
    assert wheel.name == f"pyflow_kernels-{pyflow.__version__}-py3-none-any.whl"
    assert (
        output.count(
            "pyflow is built without its native kernels and will run on plain torch: no C++ compiler is on PATH"
        )
        == 1
    )
    assert not [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".so")]


def refused(tree, **environment):
    """Return the one-sentence error of setup.py."""
    environment = {**os.environ, "PYFLOW_NATIVE": "1", **environment}
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=tree, env=environment, capture_output=True, text=True
    )
    said = done.stderr.strip()
    assert done.returncode != 0 and "Traceback" not in said, said
    assert said.count("\n") == 0, said
    return said


def script(path, *lines):
    path.write_text("\n".join(("#!/bin/sh", *lines)) + "\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def fake_torch(tmp_path):
    """Return a function (version, CUDA version) -> PYTHONPATH with a torch that has nothing but its versions."""

    def make(version, cuda="None"):
        site = tmp_path / "site"
        (site / "torch").mkdir(parents=True)
        (site / "torch/__init__.py").write_text(f"__version__ = {version!r}\n")
        (site / "torch/version.py").write_text(f"cuda: Optional[str] = {cuda!r}\n")
        (site / f"torch-{version}.dist-info").mkdir()
        (site / f"torch-{version}.dist-info/METADATA").write_text(f"Name: torch\nVersion: {version}\n")
        return str(site)

    return make


def test_no_compiler_is_one_sentence(tree):
    assert refused(tree, PATH="", CXX="") == (
        "pyflow: the native modules cannot be built: no C++ compiler is on PATH (Debian and Ubuntu: apt-get install "
        "g++; or set CXX)"
    )


def test_an_old_compiler_is_one_sentence(tree, tmp_path):
    old = script(tmp_path / "g++-4.8", "echo 'error: bad value (x86-64-v4) for -march= switch' >&2", "exit 1")
    said = refused(tree, CXX=str(old))
    assert said.startswith(f"pyflow: the native modules cannot be built: {old} is too old, set CXX to gcc 11, clang 12")


def test_an_old_torch_is_one_sentence(tree, fake_torch):
    said = refused(tree, PYTHONPATH=fake_torch("2.8.0"))
    assert said == (
        "pyflow: the native modules cannot be built: torch 2.8.0 is older than 2.11 (pip install 'torch>=2.11')"
    )


def test_an_old_torch_is_refused_at_import(fake_torch):
    code = "import pyflow"
    site = fake_torch("2.8.0")
    with pytest.raises(AssertionError, match=r"ImportError: pyflow needs torch 2.11 or newer, this is 2.8.0: pip inst"):
        run(sys.executable, "-c", code, env={**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}, cwd=site)


def test_nvcc_of_another_cuda_is_one_sentence(tree, tmp_path, fake_torch):
    script(tmp_path / "nvcc", "echo 'Cuda compilation tools, release 12.4, V12.4.99'")
    environment = {"PATH": f"{tmp_path}{os.pathsep}{PATH}", "PYTHONPATH": fake_torch("2.11.0", "13.0")}
    said = "nvcc is of CUDA 12.4, torch was built for 13.0 (put an nvcc of CUDA 13 first on PATH, or set PYFLOW_CUDA=0)"
    assert refused(tree, PYFLOW_CUDA="1", **environment) == (
        f"pyflow: the native modules cannot be built: PYFLOW_CUDA=1, but {said}"
    )
    # without PYFLOW_CUDA=1 the rest is built
    done = run(sys.executable, "setup.py", "--version", cwd=tree, env={**os.environ, **environment, "PYFLOW_CUDA": ""})
    assert f"pyflow: the CUDA operators are left out, Triton's are not: {said}" in done.stderr


def test_no_nvcc_is_one_sentence(tree, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("c++", "cmake", "ninja"):
        need(tool)
        (tools / tool).symlink_to(shutil.which(tool, path=PATH))
    assert refused(tree, PATH=str(tools), PYFLOW_CUDA="1").endswith("PYFLOW_CUDA=1, but nvcc is not on PATH")


def test_a_compiler_that_fails_ends_with_its_first_error_and_what_to_do(tree, tmp_path):
    need("c++", "cmake", "ninja")
    real = shutil.which("c++", path=PATH)
    broken = script(
        tmp_path / "c++",
        f'case "$*" in *csrc*) echo "stable.h:7:1: error: FIRST is not declared"; exit 1;; *) exec {real} "$@";; esac',
    )
    environment = {**os.environ, "CXX": str(broken), "PYFLOW_CUDA": "0"}
    done = subprocess.run(
        [sys.executable, "setup.py", "native"], cwd=tree, env=environment, capture_output=True, text=True
    )
    shutil.rmtree(tree / "build")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.fullmatch(
        r"stable\.h:7:1: error: FIRST is not declared\n(.*\n){0,2}pyflow: the native modules do not build with \S+ "
        r"against torch \S+ \(tested: torch 2\.11 to 2\.13; gcc 11, clang 12 or newer\): PYFLOW_NATIVE=0 leaves them "
        r"out, and plain torch runs instead",
        done.stderr.strip(),
    ), done.stderr


def test_without_its_binaries_pyflow_imports_warns_once_and_works(tmp_path):
    shutil.copytree(
        Path(pyflow.__file__).parent, tmp_path / "pyflow", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    code = USE + (
        "assert len(ours) == 1 and 'runs its plain-torch reference' in str(ours[0].message), caught\n"
        "assert pyflow._backend.runs_reference('affine_coupling', y)\n"
        f"assert pyflow.__file__.startswith({str(tmp_path)!r})\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("PYFLOW_CPU_ISA", "PYFLOW_BACKEND")}
    run(sys.executable, "-c", code, cwd=tmp_path, env={**environment, "PYTHONPATH": str(tmp_path)})


def test_nothing_imports_the_top_level_folders():
    # such an import makes a second copy of the modules and shadows Triton's package triton_kernels
    for path in (
        p for top in ("pyflow", "triton_kernels", "benchmarks", "tests", "tools") for p in (ROOT / top).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            assert not [n for n in names if n.partition(".")[0] in ("triton_kernels", "benchmarks")], path


def test_cli(tmp_path):
    def pyflow_command(*words):
        return run(sys.executable, "-m", "pyflow", *words, cwd=ROOT, env={**os.environ, "PATH": PATH}).stdout

    assert pyflow_command("--version").split() == ["pyflow", pyflow.__version__]
    info = pyflow_command("info")
    for line in (
        "pyflow:",
        "Python:",
        "torch:",
        "triton:",
        "numpy:",
        "system:",
        "CPU:",
        "threads:",
        "cpu backend:",
        "chosen:",
    ):
        assert f"\n{line}" in f"\n{info}", line
    assert "usage: pyflow demo" in pyflow_command("demo")
    with pytest.raises(AssertionError, match="invalid choice: 'nonsense'"):
        pyflow_command("demo", "nonsense")
