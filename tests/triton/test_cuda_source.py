"""Every csrc/cuda/*.cu compiled for the supported GPUs: no spills, no stack."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
TARGETS = ("80", "90", "100")


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_compiles_without_spills(source, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    include = Path(torch.__file__).parent / "include"
    command = [
        nvcc, "-c", str(source), "-o", str(tmp_path / "out.o"), "-std=c++17", "-O3", "-fmad=false", "--threads", "2",
        "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror", "-isystem", str(include),
        "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000",
        *(f"-gencode=arch=compute_{t},code=sm_{t}" for t in TARGETS),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-4000:]
    assert "warning" not in log, log[-4000:]
    kernels = re.findall(r"Compiling entry function '(\S+)' for 'sm_(\d+)'", log)
    assert {target for _, target in kernels} == set(TARGETS)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(frames) >= len(kernels)
    facts = [line for line in log.splitlines() if "stack frame" in line or "entry" in line]
    assert set(frames) == {("0", "0", "0")}, "\n".join(facts)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    assert max(registers) <= 128, registers  # two blocks of 256 threads per multiprocessor
