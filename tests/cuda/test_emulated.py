"""CUDA kernels on a CPU: csrc/cuda compiled as C++, with the threads of a block as fibers (emulated/)."""

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ..building import ROOT, build, shared
from ..triton import interpreted_files

FAMILIES = sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu") if path.stem != "shared")
# the random order finds missing barriers of both kinds: before a read, and before the memory is written again
ORDERS = ["1", *(pytest.param(order, marks=pytest.mark.slow) for order in ("forward", "backward", "2"))]
NOT_ON_A_CPU = {"the interpreter has no CUDA", "the interpreter has no CUDA graphs"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder, site = shared(tmp_path_factory, "emulated"), Path(torch.__file__).parent
    build(
        folder,
        ["pyflow_EMULATED", "emulated_faults"],
        f"-DTORCH_INCLUDE={site / 'include'}",
        f"-DTORCH_LIB={site / 'lib'}",
    )
    return SimpleNamespace(library=folder / "_EMULATED.so", faults=folder / "emulated_faults")


def passes(path, library, order):
    pytest.importorskip("triton")
    done = interpreted_files.run(path, PYFLOW_TEST_EMULATED=str(library), PYFLOW_EMULATED_ORDER=order)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    # files of gpu/ skip what a CPU does not have
    skipped = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)", done.stdout, re.MULTILINE)
    assert " passed" in done.stdout and set(skipped) <= NOT_ON_A_CPU, done.stdout
    assert bool(skipped) == (" skipped" in done.stdout), done.stdout


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_have_the_bits_of_a_cpu(built, family, order):
    passes(interpreted_files.FILES[family], built.library, order)


@pytest.mark.parametrize("order", ORDERS)
def test_sums_have_the_bits_of_triton(built, order):
    passes(Path(__file__).with_name("sums.py"), built.library, order)


def faults(program, order):
    """Map each kernel of faults.cpp to what the emulator says of it, without lines, and to its first result."""
    environment = {**os.environ, "PYFLOW_EMULATED_ORDER": order}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, check=True)
    lines = re.sub(r" at faults.cpp:\d+", "", done.stdout).splitlines()
    return {name: tuple(rest.rsplit(", ", 1)) for name, _, rest in (line.partition(": ") for line in lines)}


@pytest.mark.parametrize("order, block, result", [("forward", 0, 2042), ("backward", 2, 2040)])
def test_faults_are_found_and_described(built, order, block, result):
    found = faults(built.faults, order)
    assert found["good"] == found["good after faults"] == ("no fault", str(result))
    deadlock = f"block {block}: deadlock: "
    for kernel, text in {
        "barrier that some never reach": deadlock + "40 threads wait in __syncthreads, 24 have returned",
        "collective of half a warp": deadlock + "32 threads wait in __ballot_sync, 32 have returned",
        "barrier and collective": deadlock
        + "32 threads wait in __ballot_sync, 32 threads wait in __syncthreads, 0 have returned",
    }.items():
        assert found[kernel][0] == text
    for kernel, text in {
        "two barriers": r"__syncthreads, but others wait in __syncthreads",
        "two collectives": r"__(shfl_xor|ballot)_sync, but others wait in __(shfl_xor|ballot)_sync",
        "small mask": r"__ballot_sync: the mask must name all 32 lanes",
    }.items():
        assert re.fullmatch(rf"block {block}, thread \d+: {text}", found[kernel][0])


def test_a_race_gives_another_result_in_another_order(built):
    unwritten = str(2**32 - 1)
    for order, later, earlier in (("forward", unwritten, "0"), ("backward", "63", unwritten)):
        found = faults(built.faults, order)
        assert found["race with later threads"] == ("no fault", later)
        assert found["race with earlier threads"] == ("no fault", earlier)
        # NaN
        assert found["unwritten shared memory"] == ("no fault", "1")
