"""`pyflow bench` from options to files, on the smallest case."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("pytest_benchmark")


def bench(*options):
    command = [sys.executable, "-m", "pyflow.benchmarks.run", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_small_case_from_end_to_end(tmp_path):
    done = bench("--case", "coupling/small forward", "--budget", "0.01", "--threads", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "[2/2] coupling/small forward+backward: eager" in done.stdout
    results = json.loads((tmp_path / "bench.json").read_text())
    assert "node" not in results["machine_info"]
    assert results["pyflow"]["header"]["threads"].startswith("1 of")
    for case in results["pyflow"]["cases"]:
        # every contender has at least ten rounds or a reason
        entries = [entry for entry in results["benchmarks"] if entry["group"] == case["name"]]
        rounds = {entry["extra_info"]["contender"]: entry["stats"]["rounds"] for entry in entries}
        assert set(rounds) | set(case["missing"]) == set(case["contenders"])
        assert {"eager", "compile", "pyflow", "copy"} <= set(rounds)
        assert min(rounds.values()) >= 10


def test_list_prints_the_names_of_the_cases():
    done = bench("--list", "--quick")
    assert done.returncode == 0
    assert "coupling/forward+backward" in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--case", "nonsense"], "bench: no case matches 'nonsense'; --list shows them all\n"),
        (["--threads", "0"], "bench: --threads must be at least 1, got 0\n"),
        (["--threads", str(10**20)], f"bench: --threads must be at most 4096, got {10**20}\n"),
        (["--budget", "nan"], "bench: --budget must be positive and finite, got nan\n"),
        (["--timeout", "-3"], "bench: --timeout must be positive and finite, got -3.0\n"),
    ],
)
def test_wrong_options_give_one_sentence(options, text):
    done = bench(*options)
    assert (done.returncode, done.stderr) == (2, text)
