import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ..building import CHECKOUT, PATH, ROOT, build, building_checkout, need, run, shared


def kernels_in(folder):
    """Return what a build of kernel_bits left in a folder: the program, and the object and the report of each kernel."""
    objects, reports = {}, {}
    for source in (ROOT / "csrc/cpu").glob("*.cpp"):
        for path in folder.glob(f"CMakeFiles/kernels_*.dir/csrc/cpu/{source.name}.o"):
            key, report = (path.parents[2].stem.removeprefix("kernels_"), source.stem), Path(f"{path}.vec")
            objects[key], reports[key] = path, report.read_text() if report.exists() else ""
    return SimpleNamespace(program=folder / "kernel_bits", folder=folder, objects=objects, reports=reports)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """The kernels built by this machine's compiler, and what its vectoriser said."""
    need("c++", "nm", "objdump")
    if (CHECKOUT / "build.ninja").exists():
        with building_checkout():
            run("cmake", "--build", CHECKOUT, "--target", "kernel_bits", env={**os.environ, "PATH": PATH})
        return kernels_in(CHECKOUT)
    folder, include = shared(tmp_path_factory, "kernels"), pytest.importorskip("pybind11").get_include()
    build(folder, ["kernel_bits"], f"-DPYBIND11_INCLUDE={include}")
    return kernels_in(folder)


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A copy of the sources without build outputs."""
    copy = tmp_path_factory.mktemp("tree") / "pyflow"
    leave = shutil.ignore_patterns(".*", "build", "dist", "results", "*.so", "*.egg-info", "__pycache__", "outputs")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=leave)
    return copy


@pytest.fixture(scope="session")
def sdist(tree, tmp_path_factory):
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    code = f"import setuptools.build_meta as b; print(b.build_sdist({str(folder)!r}))"
    name = run(sys.executable, "-c", code, cwd=tree).stdout.split()[-1]
    shutil.unpack_archive(folder / name, folder, filter="data")
    return folder / name.removesuffix(".tar.gz")


def build_wheel(source, folder, **environment):
    """Build a wheel with pip; returns its path and the build's output."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "-w",
        folder,
        source,
    ]
    done = run(*command, env={**os.environ, **environment})
    (wheel,) = Path(folder).glob("*.whl")
    return wheel, done.stdout + done.stderr


def install(wheel, folder):
    """Return the python of a new virtual environment with the wheel and the current environment's packages."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    # PYTHONPATH may hold a checkout, which pip would take for this version
    options = ("--no-deps", "--no-index", "--no-cache-dir", "--ignore-installed")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    # .pth files inside these folders are not read, so an editable pyflow is not found
    (site / "borrowed.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")) + "\n")
    return python
