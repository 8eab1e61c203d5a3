"""Builds the native modules if torch and a C++ compiler are found; elsewhere pyflow is pure Python.

PYFLOW_NATIVE=1 makes a missing part an error, 0 leaves the native modules out.
PYFLOW_CUDA=1 builds the CUDA operators too, 0 leaves them out; by default they are built where nvcc is
found and of the CUDA version torch was built for. CUDAARCHS names the architectures (90;100, native).
PYFLOW_BUILD is release, debug (no optimisation), asan or ubsan (gcc's sanitizers; asan's must be loaded before Python).
A native build that fails ends in one sentence that says what to do.

`python setup.py native` builds the modules in place without setuptools' commands, so an old setuptools will do. A wheel
has the operators alone, which run on every Python; what is built in place also has pyflow._host, for the tests.
"""

import importlib.util
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

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
KIND = os.environ.get("PYFLOW_BUILD") or "release"
KINDS = ("release", "debug", "asan", "ubsan")
BUILD = ROOT / "build" / ("native" if KIND == "release" else KIND)
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
OLDEST_TORCH, NEWEST_TORCH = "2.11", "2.13"  # tested versions; newer ones are tried
COMPILERS = "gcc 11, clang 12 or newer"

# finds torch without importing it: an import costs seconds, and pip asks for the metadata several times
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
    """Return torch's folder and version."""
    # pip hides the user's packages from a build through PYTHONPATH, which -I ignores; as -I hides
    # ~/.local too, -E from an empty folder comes last
    with tempfile.TemporaryDirectory() as empty:
        for flags in ([], ["-I"], ["-E"]):
            found = run(sys.executable, *flags, "-c", FIND_TORCH, cwd=empty).stdout
            if found:
                break
    if not found:
        raise NotNative(
            "torch is not installed (pip install torch), or hidden from the build (then: pip install "
            "--no-build-isolation, with setuptools, cmake, ninja and pybind11 installed)"
        )
    origin, version = json.loads(found)
    if numbers(version) < numbers(OLDEST_TORCH):
        raise NotNative(f"torch {version} is older than {OLDEST_TORCH} (pip install 'torch>={OLDEST_TORCH}')")
    return Path(origin).parent, version


def numbers(version):
    """Return major and minor."""
    return [int(n) for n in re.findall(r"\d+", version)[:2]]


def find_compiler():
    compiler = os.environ.get("CXX") or next(
        filter(None, (shutil.which(c, path=PATH) for c in ("c++", "g++", "clang++"))), None
    )
    if compiler is None:
        raise NotNative("no C++ compiler is on PATH (Debian and Ubuntu: apt-get install g++; or set CXX)")
    march = ["-march=x86-64-v4"] if platform.machine() in ("x86_64", "AMD64") else []
    try:
        probe = run(compiler, *march, "-std=c++17", "-fsyntax-only", "-x", "c++", "-", input="int main() {}")
    except OSError as error:
        raise NotNative(f"the C++ compiler does not run: {error} (set CXX to one that does)") from error
    if probe.returncode:
        said = probe.stderr.strip().partition("\n")[0]
        raise NotNative(f"{compiler} is too old, set CXX to {COMPILERS}; it said: {said}")
    return compiler


def find_tool(name):
    found = shutil.which(name, path=PATH)
    if found is None:
        raise NotNative(f"{name} is not installed (pip install {name})")
    return found


def wants_cuda(torch):
    """Return whether to build the CUDA operators, and the reason to print if not."""
    wanted = os.environ.get("PYFLOW_CUDA")
    if wanted == "0":
        return False, None
    built_for = re.search(r"^cuda\b.*= '([\d.]+)'", (torch / "version.py").read_text(), re.MULTILINE)
    nvcc, why = shutil.which("nvcc"), None
    if nvcc is None:
        why = "nvcc is not on PATH"
    elif built_for:
        release = re.search(r"release ([\d.]+)", run(nvcc, "--version").stdout)
        major = built_for[1].partition(".")[0]
        if release is None or release[1].partition(".")[0] != major:
            why = (
                f"nvcc is of CUDA {release[1] if release else 'no known version'}, torch was built for {built_for[1]} "
                f"(put an nvcc of CUDA {major} first on PATH, or set PYFLOW_CUDA=0)"
            )
    if wanted == "1":
        if why:
            raise NotNative(f"PYFLOW_CUDA=1, but {why}")
        return True, None
    return bool(built_for) and why is None, why if built_for and nvcc else None


def host_options():
    """Return CMake's options for pyflow._host; none without pybind11 or Python.h, as only tests need that module."""
    include = Path(sysconfig.get_path("include"))
    if importlib.util.find_spec("pybind11") is None or not (include / "Python.h").exists():
        return {}
    import pybind11

    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return {"PYTHON_INCLUDE": include, "PYBIND11_INCLUDE": pybind11.get_include(), "HOST_SUFFIX": suffix}


def configuration():
    """Return the CMake command of the native build and the advice to print if it fails; raises NotNative."""
    if os.environ.get("PYFLOW_NATIVE") == "0":
        raise NotNative("PYFLOW_NATIVE=0")
    if KIND not in KINDS:
        sys.exit(f"pyflow: PYFLOW_BUILD must be one of {', '.join(KINDS)}, got {KIND!r}")
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise NotNative(f"native kernels are for Linux on x86-64 and aarch64, not {platform.platform()}")
    (torch, version), compiler = find_torch(), find_compiler()
    cuda, cuda_missing = wants_cuda(torch)
    if cuda_missing:
        print(f"pyflow: the CUDA operators are left out, Triton's are not: {cuda_missing}", file=sys.stderr)
    options = {
        "CMAKE_CXX_COMPILER": compiler,
        "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
        "TORCH_INCLUDE": torch / "include",
        "TORCH_LIB": torch / "lib",
        "PYFLOW_CUDA": "ON" if cuda else "OFF",
        "PYFLOW_BUILD": KIND,
        **host_options(),
    }
    if os.environ.get("CUDAARCHS"):
        options["CMAKE_CUDA_ARCHITECTURES"] = os.environ["CUDAARCHS"]
    command = [find_tool("cmake"), "-S", ROOT, "-B", BUILD, "-G", "Ninja"]
    advice = (
        f"pyflow: the native modules do not build with {compiler}{' and nvcc' if cuda else ''} against torch {version} "
        f"(tested: torch {OLDEST_TORCH} to {NEWEST_TORCH}; {COMPILERS}): PYFLOW_NATIVE=0 leaves them out"
        f"{', PYFLOW_CUDA=0 those for CUDA' if cuda else ''}, and plain torch runs instead"
    )
    return [str(c) for c in command] + [f"-D{name}={value}" for name, value in options.items()], advice


def step(*command):
    """Run a command of the native build and show its output; on failure exit with its first error and the advice."""
    said = []
    with subprocess.Popen(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as running:
        for line in running.stdout:
            print(line, end="", flush=True)
            said.append(line)
    if running.returncode:
        first = next((i for i, line in enumerate(said) if re.search(r"\berror\b[ :]", line, re.IGNORECASE)), 0)
        sys.exit(f"\n{''.join(said[first : first + 3])}{ADVICE}")


def build_native(folder, host):
    """Build the modules into a folder: the operators, and with `host` pyflow._host."""
    # start over if the folder was configured for another Python, torch or compiler
    stamp = BUILD / "configure.json"
    if not stamp.exists() or json.loads(stamp.read_text()) != CONFIGURE:
        shutil.rmtree(BUILD, ignore_errors=True)
        BUILD.mkdir(parents=True)
    step(*CONFIGURE)
    stamp.write_text(json.dumps(CONFIGURE))
    targets = [] if host else ["--target", *(f"pyflow{module.stem}" for module in operators())]
    step(CONFIGURE[0], "--build", BUILD, *targets)
    folder.mkdir(parents=True, exist_ok=True)
    for module in BUILD.glob("_*.so") if host else operators():
        # os.replace is atomic: a process that has mapped the old file keeps it
        target = folder / module.name
        shutil.copy2(module, f"{target}.new")
        os.replace(f"{target}.new", target)


def operators():
    """Return the libraries of operators that this build makes."""
    return [BUILD / "_C.so", *([BUILD / "_CUDA.so"] if "-DPYFLOW_CUDA=ON" in CONFIGURE else [])]


try:
    (CONFIGURE, ADVICE), MISSING = configuration(), None
except NotNative as reason:
    CONFIGURE, MISSING = None, str(reason)
    if "1" in (os.environ.get("PYFLOW_NATIVE"), os.environ.get("PYFLOW_CUDA")):
        sys.exit(f"pyflow: the native modules cannot be built: {reason}")

if sys.argv[1:] == ["native"]:
    if MISSING:
        sys.exit(f"pyflow: the native modules cannot be built: {MISSING}")
    build_native(ROOT / "pyflow", host=True)
    sys.exit()
if int(setuptools.__version__.partition(".")[0]) < 77:
    sys.exit(f"pyflow: setuptools {setuptools.__version__} is older than 77 (pip install 'setuptools>=77')")

from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402  an old setuptools has none


class Wheel(bdist_wheel):
    def get_tag(self):
        # torch's stable ABI and no symbol of Python
        return "py3", "none", super().get_tag()[-1]


class BuildNative(build_ext):
    def run(self):
        # a wheel has none of the modules that fit one version of Python
        build_native(self.folder(), host=self.inplace)

    def folder(self):
        return (ROOT if self.inplace else Path(self.build_lib)) / "pyflow"

    def get_outputs(self):
        return [] if self.inplace else [str(self.folder() / module.name) for module in operators()]

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
    # installed at the top level, these two would shadow other packages (Triton has a triton_kernels)
    package_dir={"pyflow.triton_kernels": "triton_kernels", "pyflow.benchmarks": "benchmarks"},
    packages=sorted({*find_packages(include=["pyflow", "pyflow.*"]), "pyflow.triton_kernels", "pyflow.benchmarks"}),
    package_data={"pyflow": ["py.typed"]},
    include_package_data=False,
    ext_modules=[] if MISSING else [Extension("pyflow._C", sources=[])],
    cmdclass={"bdist_wheel": Wheel, "build_ext": BuildNative, "build_py": BuildPython},
)
