"""`make gpu`: the stages that it would run, with an nvidia-smi that answers for a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    asked = folder / "nvidia-smi"
    asked.write_text("#!/bin/sh\ncase $1 in *name*) echo NVIDIA H100 80GB;; *) echo 9.0;; esac\n")
    asked.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "MAKEFLAGS": ""}
    return subprocess.run(
        ["make", "-C", str(ROOT), "gpu", *arguments], env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("stage", "tests", "cases", "out"),
    [
        ("", "tests/triton/gpu 2>&1", "bench --gpu ", "nvidia-h100-80gb"),
        ("quick", "tests/triton/gpu/test_coupling.py", "bench --gpu --quick --no-compile", "nvidia-h100-80gb-quick"),
    ],
)
def test_stages_and_their_results(tmp_path, stage, tests, cases, out):
    plan = make(tmp_path, "-n", f"STAGE={stage}").stdout
    assert tests in plan and cases in plan
    assert "CUDAARCHS=90-real" in plan and f"benchmarks/results/{out}/tests.txt" in plan


@pytest.mark.parametrize(("stage", "left_out"), [("test", "bench"), ("bench", "test")])
def test_one_stage_leaves_the_other_out(tmp_path, stage, left_out):
    # a shell command per stage, behind a comparison that is true for the stage to leave out
    plan = make(tmp_path, "-n", f"STAGE={stage}").stdout
    assert f"test '{stage}' = {stage} || timeout" in plan and f"test '{stage}' = {left_out} || timeout" in plan


def test_an_unknown_stage_is_refused_and_nothing_runs(tmp_path):
    done = make(tmp_path, "STAGE=all", f"OUT={tmp_path}/out")
    assert done.returncode != 0 and "pyflow: STAGE must be test, bench or quick, got 'all'" in done.stderr
    assert not (tmp_path / "out").exists()
