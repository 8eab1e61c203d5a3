"""The CUDA library built for all supported GPUs links, and its kernels use no stack and spill no registers."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ..building import ROOT, build, need, run, shared

SOURCES = sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu"))
TARGETS = {"80", "90", "100"}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """_CUDA.so and the assembler's output for each source."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    folder, site = shared(tmp_path_factory, "cuda"), Path(torch.__file__).parent
    options = {
        "PYFLOW_CUDA": "ON", "TORCH_INCLUDE": site / "include", "TORCH_LIB": site / "lib",
        "CMAKE_CUDA_FLAGS": "-Xptxas -v -Xcompiler -Wall,-Wextra,-Werror",
    }  # fmt: skip
    log = build(folder, ["pyflow_CUDA"], *(f"-D{name}={value}" for name, value in options.items()))
    parts = re.split(r"\[\d+/\d+\] (?:Building \w+ object \S*?/csrc/(\w+/\w+)\.\w+\.o|Linking .*)\n", log)
    return SimpleNamespace(path=folder / "_CUDA.so", reports=dict(zip(parts[1::2], parts[2::2], strict=True)))


@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills(library, source):
    log = library.reports[f"cuda/{source}"]
    assert "warning" not in log, log[-4000:]
    kernels = re.findall(r"Compiling entry function '(\S+)' for 'sm_(\d+)'", log)
    assert {target for _, target in kernels} == TARGETS
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(frames) >= len(kernels)
    facts = [line for line in log.splitlines() if "stack frame" in line or "entry" in line]
    assert set(frames) == {("0", "0", "0")}, "\n".join(facts)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    assert max(registers) <= 128, registers  # two blocks of 256 threads per multiprocessor


def test_no_pyflow_symbol_is_undefined(library):
    need("nm")
    undefined = run("nm", "-DC", "--undefined-only", library.path).stdout
    assert "aoti_torch_get_current_cuda_stream" in undefined
    assert not [line for line in undefined.splitlines() if "pyflow::" in line]
