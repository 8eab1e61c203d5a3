"""Builds the native modules where torch and a C++ compiler are in sight; elsewhere pyflow is pure Python.

PYFLOW_NATIVE=1 makes a missing part an error, 0 leaves the native modules out.
PYFLOW_CUDA=1 builds the CUDA operators too, 0 leaves them out; by default they are built where nvcc is
found and of the CUDA version torch was built for. CUDAARCHS names the architectures (90;100, native).
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
BUILD = ROOT / "build" / "native"
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
OLDEST_TORCH = (2, 11)

# torch is looked up, never imported: that costs seconds, and pip asks for the metadata several times
FIND_TORCH = """
import importlib.metadata, importlib.util, json
spec = importlib.util.find_spec("torch")
if spec and spec.origin:
    print(json.dumps([spec.origin, importlib.metadata.version("torch")]))
"""


class NotNative(Exception):
    """Why this build has no native modules."""


def run(*command, **options):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)


def find_torch():
    # pip hides the user's packages from a build through PYTHONPATH, which -I ignores; as -I hides
    # ~/.local too, -E from an empty folder comes last
    with tempfile.TemporaryDirectory() as empty:
        for flags in ([], ["-I"], ["-E"]):
            found = run(sys.executable, *flags, "-c", FIND_TORCH, cwd=empty).stdout
            if found:
                break
    if not found:
        raise NotNative(
            "torch is not installed, or hidden from the build (then: pip install --no-build-isolation, with "
            "setuptools, cmake, ninja and pybind11 installed)"
        )
    origin, version = json.loads(found)
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
        raise NotNative(f"torch {version} is older than {'.'.join(map(str, OLDEST_TORCH))}")
    return Path(origin).parent


def find_compiler():
    compiler = os.environ.get("CXX") or next(
        filter(None, (shutil.which(c, path=PATH) for c in ("c++", "g++", "clang++"))), None
    )
    if compiler is None:
        raise NotNative("no C++ compiler is on PATH")
    march = ["-march=x86-64-v4"] if platform.machine() in ("x86_64", "AMD64") else []
    try:
        probe = run(compiler, *march, "-std=c++17", "-fsyntax-only", "-x", "c++", "-", input="int main() {}")
    except OSError as error:
        raise NotNative(f"the C++ compiler does not run: {error}") from error
    if probe.returncode:
        raise NotNative(f"{compiler} is too old (gcc 11 or clang 12 is needed): {probe.stderr.strip()}")
    return compiler


def find_tool(name):
    found = shutil.which(name, path=PATH)
    if found is None:
        raise NotNative(f"{name} is not installed")
    return found


def wants_cuda(torch):
    wanted = os.environ.get("PYFLOW_CUDA")
    if wanted is not None:
        return wanted == "1"
    nvcc = shutil.which("nvcc")
    built_for = re.search(r"^cuda\b.*= '(\d+)", (torch / "version.py").read_text(), re.MULTILINE)
    return bool(nvcc and built_for) and f"release {built_for[1]}." in run(nvcc, "--version").stdout


def configuration():
    """The command that configures the native build; raises NotNative."""
    if os.environ.get("PYFLOW_NATIVE") == "0":
        raise NotNative("PYFLOW_NATIVE=0")
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise NotNative(f"native kernels are for Linux on x86-64 and aarch64, not {platform.platform()}")
    torch, compiler = find_torch(), find_compiler()
    try:
        import pybind11
    except ImportError as error:
        raise NotNative("pybind11 is not installed") from error
    python_include = Path(sysconfig.get_path("include"))
    if not (python_include / "Python.h").exists():
        raise NotNative("Python.h is missing (Debian and Ubuntu: apt-get install python3-dev)")
    options = {
        "CMAKE_CXX_COMPILER": compiler,
        "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
        "TORCH_INCLUDE": torch / "include",
        "TORCH_LIB": torch / "lib",
        "PYTHON_INCLUDE": python_include,
        "PYBIND11_INCLUDE": pybind11.get_include(),
        "HOST_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
        "PYFLOW_CUDA": "ON" if wants_cuda(torch) else "OFF",
    }
    if os.environ.get("CUDAARCHS"):
        options["CMAKE_CUDA_ARCHITECTURES"] = os.environ["CUDAARCHS"]
    command = [find_tool("cmake"), "-S", ROOT, "-B", BUILD, "-G", "Ninja"]
    return [str(c) for c in command] + [f"-D{name}={value}" for name, value in options.items()]


try:
    CONFIGURE, MISSING = configuration(), None
except NotNative as reason:
    CONFIGURE, MISSING = None, str(reason)
    if os.environ.get("PYFLOW_NATIVE") == "1":
        sys.exit(f"pyflow: the native modules cannot be built: {reason}")


class BuildNative(build_ext):
    def run(self):
        # a folder configured otherwise (another Python, torch or compiler) is of no use
        stamp = BUILD / "configure.json"
        if not stamp.exists() or json.loads(stamp.read_text()) != CONFIGURE:
            shutil.rmtree(BUILD, ignore_errors=True)
            BUILD.mkdir(parents=True)
        subprocess.run(CONFIGURE, check=True)
        stamp.write_text(json.dumps(CONFIGURE))
        subprocess.run([CONFIGURE[0], "--build", BUILD], check=True)
        for module in BUILD.glob("_*.so"):
            # replaced in one step: a process that has the old file mapped keeps it
            target = self.folder() / module.name
            self.mkpath(str(target.parent))
            shutil.copy2(module, f"{target}.new")
            os.replace(f"{target}.new", target)

    def folder(self):
        return (ROOT if self.inplace else Path(self.build_lib)) / "pyflow"

    def get_outputs(self):
        return [] if self.inplace else [str(self.folder() / module.name) for module in BUILD.glob("_*.so")]

    def get_output_mapping(self):
        return {}


class BuildPython(build_py):
    def run(self):
        if MISSING:
            warnings.warn(
                f"pyflow is built without its native kernels and will run on plain torch: {MISSING}", stacklevel=1
            )
        super().run()


setup(
    # these two stand at the root for the reader; installed at the top level they would shadow other packages
    package_dir={"pyflow.triton_kernels": "triton_kernels", "pyflow.benchmarks": "benchmarks"},
    packages=sorted({*find_packages(include=["pyflow", "pyflow.*"]), "pyflow.triton_kernels", "pyflow.benchmarks"}),
    package_data={"pyflow": ["py.typed"]},
    include_package_data=False,
    ext_modules=[] if MISSING else [Extension("pyflow._C", sources=[])],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
