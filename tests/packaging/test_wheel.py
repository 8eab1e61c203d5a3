"""The wheel of a release: what it is called, what is in it, and that pyflow runs from it alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import pyflow

from ..building import PATH, ROOT, building_checkout, need, run, shared
from .conftest import install

BUILD = ROOT / ".ci/wheel.py"


def build(folder, **environment):
    """Run what `make wheel` runs."""
    environment = {**os.environ, "PATH": PATH, **environment}
    return subprocess.run(
        [sys.executable, str(BUILD), str(folder)], env=environment, capture_output=True, text=True, cwd=ROOT
    )


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel, from the objects of this checkout; once for all processes of a test run."""
    need("auditwheel", "patchelf", "c++", "cmake", "ninja")
    folder = shared(tmp_path_factory, "release")
    with building_checkout():
        if not list(folder.glob("*.whl")):
            done = build(folder)
            if "a release needs manylinux_2_34 or older" in done.stderr:
                pytest.skip(done.stderr.strip())
            assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="session")
def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def test_one_wheel_for_every_python(wheel, contents):
    version = re.escape(pyflow.__version__)
    name = rf"pyflow_kernels-{version}-py3-none-(manylinux_2_(\d+)_(?:x86_64|aarch64))\.whl"
    found = re.fullmatch(name, wheel.name)
    assert found and int(found[2]) <= 34, wheel.name
    info = contents[f"pyflow_kernels-{pyflow.__version__}.dist-info/WHEEL"].decode().splitlines()
    assert f"Tag: py3-none-{found[1]}" in info and "Root-Is-Purelib: false" in info


def test_it_has_the_sources_the_operators_and_nothing_else(contents):
    sources = {
        f"{package}/{path.relative_to(ROOT / folder)}"
        for package, folder in (
            ("pyflow", "pyflow"),
            ("pyflow/triton_kernels", "triton_kernels"),
            ("pyflow/benchmarks", "benchmarks"),
        )
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name for name in contents if name.startswith("pyflow/")} == sources | {"pyflow/_C.so", "pyflow/py.typed"}
    about = f"pyflow_kernels-{pyflow.__version__}.dist-info/"
    assert {name for name in contents if not name.startswith("pyflow/")} == {
        about + name
        for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")
    }


def test_the_operators_need_torch_and_the_c_library_alone(contents, tmp_path):
    need("objdump", "nm")
    library = tmp_path / "_C.so"
    library.write_bytes(contents["pyflow/_C.so"])
    needed = re.findall(r"NEEDED +(\S+)", run("objdump", "-p", library).stdout)
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-aarch64.so.1"}
    assert "libtorch_cpu.so" in needed and not {*needed} - system - {"libtorch_cpu.so"}
    undefined = run("nm", "-DC", "--undefined-only", library).stdout
    assert not [line for line in undefined.splitlines() if "pyflow" in line or " Py" in line or "c10::" in line]
    exported = set(re.findall(r" T (\S+)", run("nm", "-D", "--defined-only", library).stdout))
    assert exported == set(pyflow._native._TYPES)


def test_it_runs_from_an_empty_folder(wheel, tmp_path):
    python = install(wheel, tmp_path / "venv")
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("PYFLOW_")}
    said = run(python, Path(__file__).with_name("smoke.py"), torch.__version__, cwd=empty, env=environment).stdout
    assert said.startswith(f"pyflow {pyflow.__version__} with torch {torch.__version__}")


def test_without_a_compiler_it_says_so_and_leaves_nothing(tmp_path):
    need("auditwheel", "patchelf")
    before = tmp_path / "pyflow_kernels-0-py3-none-any.whl"
    before.write_bytes(b"")
    done = build(tmp_path, CXX="/nonexistent/c++")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.fullmatch(
        r"pyflow: the native modules cannot be built: the C\+\+ compiler does not run: .* \(set CXX to one that does\)",
        done.stderr.strip(),
    )
    assert [*tmp_path.iterdir()] == [before]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    need("auditwheel", "patchelf")
    (tmp_path / "dist").write_text("")
    done = build(tmp_path / "dist")
    assert done.returncode == 1
    assert done.stderr.strip() == f"pyflow: the wheel cannot be written to {str(tmp_path / 'dist')!r}: File exists"
