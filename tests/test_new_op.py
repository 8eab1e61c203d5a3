"""`make new-op`: the family that it lays works, bad names change nothing, and CONTRIBUTING's lists are those of the tree."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .building import PATH, ROOT, need, run
from .test_rooms import ROOMS

SCRIPT = ROOT / ".ci/new_op.py"
if not (ROOT / "docs/new_op").exists():
    pytest.skip("this folder holds the tests alone", allow_module_level=True)

spec = importlib.util.spec_from_file_location("new_op", SCRIPT)
new_op = importlib.util.module_from_spec(spec)
spec.loader.exec_module(new_op)


def copied(folder):
    """A copy of the sources, without what is built."""
    leave = ("build", "dist", "results", "*.so", "*.egg-info", "__pycache__", ".git", ".venv", ".*_cache")
    return Path(shutil.copytree(ROOT, folder / "tree", symlinks=True, ignore=shutil.ignore_patterns(*leave)))


@pytest.fixture
def tree(tmp_path):
    return copied(tmp_path)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """A copy for tests that check that nothing in it changes."""
    return copied(tmp_path_factory.mktemp("untouched"))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


def lay(tree, *name):
    command = [sys.executable, str(tree / ".ci/new_op.py"), *name]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})


FORM = "NAME must be lower-case words of letters and digits joined by single underscores, got "
KEYWORD = "NAME must not be a keyword of C++ or Python nor a built-in function, got "
NEW = "NAME must be new, got "


@pytest.mark.parametrize(
    "name, text",
    [
        (None, "NAME must be given, as in make new-op NAME=demo_op, got ''"),
        ("", "NAME must be given, as in make new-op NAME=demo_op, got ''"),
        ("MyOp", f"{FORM}'MyOp'"),
        ("2d", f"{FORM}'2d'"),
        ("my-op", f"{FORM}'my-op'"),
        ("my__op", f"{FORM}'my__op'"),
        ("_op", f"{FORM}'_op'"),
        ("../op", f"{FORM}'../op'"),
        ("öp", f"{FORM}'öp'"),
        ("op\n", f"{FORM}'op\\n'"),
        ("o" * 31, f"NAME must have at most 30 characters, got '{'o' * 31}'"),
        ("lambda", f"{KEYWORD}'lambda'"),
        ("match", f"{KEYWORD}'match'"),
        ("template", f"{KEYWORD}'template'"),
        ("sum", f"{KEYWORD}'sum'"),
        ("fsq", f"{NEW}'fsq', which csrc/args/fsq.h uses"),
        ("center_gram", f"{NEW}'center_gram', which pyflow/_schemas.py uses"),
        ("nhsic", f"{NEW}'nhsic', which pyflow/ops/__init__.py uses"),
        ("softplus", f"{NEW}'softplus', which csrc/args/math.h uses"),
        ("digest", f"{NEW}'digest', which docs/new_op/tests/ops/test_demo_op.py uses"),
        ("hsic_stats", f"{NEW}'hsic_stats', but there is benchmarks/hsic_stats.py"),
    ],
)
def test_a_bad_name_gets_one_sentence_and_changes_nothing(untouched, name, text, monkeypatch, capsys):
    monkeypatch.setattr(new_op, "ROOT", untouched)
    before = contents(untouched)
    assert new_op.main([] if name is None else [name]) == 1
    assert capsys.readouterr() == ("", f"new-op: {text}\n")
    assert contents(untouched) == before


def test_make_passes_the_name_on(tree):
    need("make")
    for argument in ("NAME=Op", "NAME=a'b; touch c"):
        done = subprocess.run(["make", "-s", "new-op", argument], cwd=tree, capture_output=True, text=True)
        assert done.returncode and done.stderr.startswith(f"new-op: {FORM}{argument[5:]!r}\n")
    unnamed = {name: value for name, value in os.environ.items() if name != "NAME"}
    done = subprocess.run(["make", "-s", "new-op"], cwd=tree, capture_output=True, text=True, env=unnamed)
    assert done.returncode and done.stderr.startswith("new-op: NAME must be given")
    assert not (tree / "c").exists()


def test_a_second_family_of_the_name_is_refused(tree):
    assert lay(tree, "my_op").returncode == 0
    before = contents(tree)
    assert lay(tree, "my_op").stderr == f"new-op: {NEW}'my_op', which csrc/args/my_op.h uses\n"
    assert contents(tree) == before


@pytest.mark.parametrize("at", [0, 7, 15, 16, 23, 31])
def test_nothing_is_left_if_a_file_cannot_be_written(untouched, at, monkeypatch):
    monkeypatch.setattr(new_op, "formatted", lambda root, path, text: text)
    texts, before, calls = new_op.files(untouched, "my_op"), contents(untouched), iter(range(1000))

    def failing(function):
        def call(*args, **options):
            if next(calls) == at:
                raise OSError("no space left")
            return function(*args, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", failing(Path.write_text))
        patch.setattr(os, "replace", failing(os.replace))
        with pytest.raises(OSError, match="no space left"):
            new_op.write(untouched, texts)
    assert contents(untouched) == before


def test_a_folder_that_cannot_be_written_gets_one_sentence(tree):
    shutil.rmtree(tree / "triton_kernels")
    before = contents(tree)
    done = lay(tree, "my_op")
    assert done.returncode == 1 and re.fullmatch(
        r"new-op: every file must be writable, got: .*triton_kernels.*; nothing is written\n", done.stderr
    )
    assert contents(tree) == before


def named(section):
    """Paths in the numbered lines of a section of CONTRIBUTING."""
    text = (ROOT / "CONTRIBUTING.md").read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    steps = re.findall(r"^\d\. .*(?:\n   .*)*", text, re.MULTILINE)
    return [
        path for step in steps for path in re.findall(r"`([\w/<>.]+\.(?:py|h|cpp|cu|md))`", step) if path != "_vmap.py"
    ]


def test_contributing_names_what_is_laid():
    laid = [str(path).replace("my_op", "<family>") for path in new_op.files(ROOT, "my_op")]
    assert sorted(named("Add an operation")) == sorted(laid)
    assert len(laid) <= 16


def test_every_room_is_filled():
    laid = {str(path) for path in new_op.files(ROOT, "my_op")}
    # the file for GPUs serves both, see tests/triton/interpreted_files.py
    assert {room.format("my_op") for room in ROOMS} - laid == {"tests/triton/interpreted/my_op.py"}


def test_a_scale_map_is_in_the_files_that_contributing_names():
    found = {
        str(path.relative_to(ROOT))
        for top in ("csrc", "triton_kernels", "pyflow", "benchmarks", "docs")
        for path in (ROOT / top).rglob("*")
        if path.suffix in (".py", ".h", ".cpp", ".cu", ".md")
        and re.search(r"\bsoftplus_clamp\b", path.read_text())
        # which of the maps the layers of other packages have
        and path.parent != ROOT / "pyflow/flows/lower"
    }
    listed = named("Add a scale map")
    assert sorted([*found, "CHANGELOG.md"]) == sorted(listed) and len(listed) <= 6


def pytest_in(tree, *arguments, **environment):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    given = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    for name in ("PYFLOW_BACKEND", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        given.pop(name, None)
    return run(*command, cwd=tree, env=given).stdout


@pytest.mark.parametrize("name", ["a_b", "an_operation_with_a_long_name"])
def test_what_is_laid_is_formatted(tree, name):
    need("ruff", "clang-format")
    assert lay(tree, name).returncode == 0
    tool = lambda *command: run(*command, cwd=tree, env={**os.environ, "PATH": PATH})
    tool("ruff", "check")
    tool("ruff", "format", "--check")
    tool("clang-format", "--dry-run", "-Werror", *tree.glob(f"csrc/*/{name}.*"), *tree.glob(f"tests/cpu/*/{name}.cpp"))


def test_what_is_laid_works_without_a_build(tree):
    pytest.importorskip("triton")
    assert lay(tree, "my_op").returncode == 0
    passed = pytest_in(
        tree,
        "tests/ops/test_my_op.py",
        "tests/test_rooms.py",
        "tests/test_schemas.py",
        "pyflow/ops/my_op.py",
        "-k",
        "my_op and not compiles and not transforms",
    )
    assert int(re.search(r"(\d+) passed", passed)[1]) > 70
    of_kernels = "dtypes or layouts or magnitude"
    file = "tests/triton/gpu/test_my_op.py"
    passed = pytest_in(tree, file, "-k", of_kernels, TRITON_INTERPRET="1", PYFLOW_TEST_GPU="interpreter")
    assert int(re.search(r"(\d+) passed", passed)[1]) > 10 and "skipped" not in passed


def test_the_command_that_is_printed_selects_the_tests_of_every_room(tree):
    arguments = re.search(r"make test ARGS='(.*)'", lay(tree, "my_op").stdout)[1]
    command = f"{sys.executable} -m pytest -q --collect-only -p no:cacheprovider {arguments}"
    selected = run("bash", "-c", command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}).stdout
    for test in (
        "pyflow/ops/my_op.py::pyflow.ops.my_op.my_op",
        "tests/test_rooms.py::test_every_operator_has_a_kernel_in_every_native_directory[my_op-my_op]",
        "tests/test_schemas.py::test_types_of_schema_and_function_agree[my_op_backward]",
        "tests/test_operators.py::test_a_backward_shares_names_with_its_forward[my_op_backward]",
        "tests/test_warmup.py::test_every_operator_runs",
        "tests/ops/test_my_op.py::test_gradcheck_twice",
        "tests/ops/test_fuzz.py::test_drawn_calls[my_op]",
        "tests/triton/test_aot.py::test_compiles_to_the_expected_instructions_and_resources[sm_90-my_op-float32]",
        "tests/triton/test_aot.py::test_every_kernel_has_a_case",
        "tests/triton/test_interpreter.py::test_kernels_under_the_interpreter[my_op]",
        "tests/cuda/test_emulated.py::test_kernels_have_the_bits_of_a_cpu[my_op-1]",
        "tests/cuda/test_emulated.py::test_sums_have_the_bits_of_triton[1]",
        "tests/benchmarks/test_cases.py::test_contenders_agree_on_a_tiny_input[my_op/forward]",
        "tests/packaging/test_kernels.py::test_every_simd_loop_is_vectorised",
        "tests/packaging/test_kernels.py::test_same_bits_on_avx2_and_avx512",
        "tests/packaging/test_repeated_lines.py::test_no_two_places_of_csrc_hold_the_same_lines",
    ):
        assert f"\n{test}" in f"\n{selected}", test


def test_what_is_laid_compiles(tree):
    import torch

    need("c++")
    assert lay(tree, "my_op").returncode == 0
    include = Path(torch.__file__).parent / "include"
    flags = [
        "-std=c++17",
        "-fsyntax-only",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
    ]
    stable = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", include]
    cuda = ["-DPYFLOW_CUDA", "-DPYFLOW_EMULATED", f"-I{tree / 'tests/cuda/emulated'}"]
    for path, options in (
        ("csrc/cpu/my_op.cpp", ["-DPYFLOW_ISA=v3", "-fopenmp-simd"]),
        ("csrc/torch/my_op.cpp", stable),
        ("csrc/cuda/my_op.cu", ["-x", "c++", *cuda]),
        ("tests/cpu/kernel_bits/my_op.cpp", []),
    ):
        run("c++", *flags, *options, tree / path)


@pytest.mark.slow
def test_what_is_laid_passes_every_test_once_built(tree):
    need("c++", "cmake", "ninja", "mypy")
    assert lay(tree, "my_op").returncode == 0
    run("mypy", cwd=tree, env={**os.environ, "PATH": PATH})
    native = {**os.environ, "PATH": PATH, "PYFLOW_NATIVE": "1", "PYFLOW_CUDA": "0"}
    run(sys.executable, "setup.py", "native", cwd=tree, env=native)
    passed = pytest_in(
        tree, "tests/ops", "tests/test_rooms.py", "tests/test_operators.py", "tests/triton/test_interpreter.py",
        "tests/cuda/test_emulated.py", "tests/benchmarks/test_cases.py", "tests/test_warmup.py", "pyflow/ops",
        "-k", "my_op or every_operator_runs",
    )  # fmt: skip
    assert int(re.search(r"(\d+) passed", passed)[1]) > 90
    build, bits = tree / "build/native", "kernel_bits"
    run("cmake", "--build", build, "--target", bits, env=native)
    lines = run(build / bits).stdout.splitlines()
    # three results of three shapes
    for name in ("my_op", "ordinary:my_op"):
        assert sum(line.startswith(name) for line in lines) == 9
