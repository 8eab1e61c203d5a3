"""Table, markdown and plots of synthetic results."""

import importlib.util
import json
import math
import sys

import pytest

from pyflow.benchmarks import report


def entry(case, contender, median, memory=1000):
    extra = {"case": case, "contender": contender, "memory": memory, "calls": 1, "error": 0.1, "faults": 0}
    return {"stats": {"median": median, "iqr": median / 10}, "extra_info": extra}


def case(name, contenders, **more):
    plain = {"pages": "reused", "peer": None, "compare": [], "sweep": None, "memory": False, "bytes": 8000}
    plain |= {"flops": None, "others": 0.0, "missing": {}}
    return plain | {"name": name, "contenders": contenders} | more


@pytest.fixture
def results():
    names = ["eager", "compile", "peer-x", "pyflow", "pyflow contiguous", "copy", "warm copy"]
    seconds = dict(zip(names, (8e-3, 3e-3, 4e-3, 1e-3, 0.5e-3, 0.6e-3, 0.5e-3), strict=True))
    main = case(
        "op/forward", [*names, "pyflow other"], peer="peer-x", compare=[["pyflow", "pyflow contiguous"]],
        missing={"pyflow other": "this CPU does not run it"},
    )  # fmt: skip
    deep = case("op/deep", ["a", "b"], memory=True, compare=[["a", "b"]], bytes=None)
    sweeps = [case(f"op/sweep {k}", ["eager", "pyflow", "copy"], sweep=2**k) for k in (10, 14)]
    gemm = case("op/gemm", ["eager", "pyflow"], flops=2e9, others=0.5)
    benchmarks = [entry("op/forward", name, time) for name, time in seconds.items()]
    benchmarks += [entry("op/deep", "a", 2e-3, 3000), entry("op/deep", "b", 1e-3, 2000)]
    benchmarks += [entry(f"op/sweep {k}", name, k * 1e-6) for k in (10, 14) for name in ("eager", "pyflow", "copy")]
    benchmarks += [entry("op/gemm", "eager", 2.0), entry("op/gemm", "pyflow", 1.0)]
    header = {"CPU": "a CPU", "instruction set": "x86-64-v4", "threads": "2 of 2", "torch": "2.11"}
    ours = {"header": header, "cases": [main, deep, *sweeps, gemm]}
    return json.loads(json.dumps({"benchmarks": benchmarks, "pyflow": ours}))


def test_the_columns_of_a_row(results):
    group = report.groups_of(results)[0]
    row = dict(zip(report.COLUMNS, report.cells(group, group.ours()), strict=True))
    assert row == {
        "time": "1.00 ms", "IQR": "100 µs", "vs eager": "8.00x", "vs compile": "3.00x", "vs peer": "4.00x",
        "of copy": "60%", "of warm copy": "50%", "GFLOP/s": "–", "memory": "1.00 KB",
    }  # fmt: skip
    assert list(report.comparisons(group)) == ["pyflow takes 2.00x the time of pyflow contiguous"]


def test_a_contender_without_numbers_keeps_its_reason(results):
    group = report.groups_of(results)[0]
    assert group.rows["pyflow other"].reason == "this CPU does not run it"
    assert math.isnan(group.median("pyflow other"))
    assert "- op/forward: no number for pyflow other: this CPU does not run it\n" in report.markdown(results)


def test_a_reason_that_many_cases_share_takes_one_line(results):
    for each in results["pyflow"]["cases"][1:3]:
        each["contenders"].append("pyflow other")
        each["missing"] = {"pyflow other": "this CPU does not run it"}
    assert report.markdown(results).count("no number") == 1
    assert "- 3 cases: no number for pyflow other: this CPU does not run it\n" in report.markdown(results)


def test_memory_comparisons_and_flops(results):
    deep, gemm = (next(g for g in report.groups_of(results) if g.name == name) for name in ("op/deep", "op/gemm"))
    assert list(report.comparisons(deep)) == ["a takes 2.00x the time of b and 1.50x its memory"]
    assert report.cells(gemm, gemm.ours())[report.COLUMNS.index("GFLOP/s")] == "2.00"


def test_a_busy_machine_is_reported(results):
    assert "other processes took up to 50% of the CPU, more than 10% in 1 of 5 cases" in report.markdown(results)


def test_a_case_without_any_number_takes_one_line(results):
    results["benchmarks"] = [e for e in results["benchmarks"] if e["extra_info"]["case"] != "op/gemm"]
    gemm = results["pyflow"]["cases"][-1]
    gemm["missing"] = dict.fromkeys(gemm["contenders"], "no time left")
    assert "- op/gemm: not measured: no time left\n" in report.markdown(results)


@pytest.mark.parametrize("rich", [True, False])
def test_everything_is_written(results, rich, tmp_path, capsys, monkeypatch):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    else:
        pytest.importorskip("rich")
    report.write(results, tmp_path)
    text = capsys.readouterr().out
    for expected in ("a CPU", "op/forward", "8.00x", "60%", "no number for pyflow other"):
        assert expected in text
    page = (tmp_path / "bench.md").read_text()
    assert "| op/forward | 8.00 ms | 3.00 ms | 4.00 ms (peer-x) | 1.00 ms | 8.00x | 3.00x | 4.00x | 60% |" in page
    if importlib.util.find_spec("matplotlib"):
        assert {p.name for p in tmp_path.glob("*.png")} == {"speedup.png", "scaling.png", "memory.png"}


def test_without_results_there_are_no_plots(results, tmp_path):
    pytest.importorskip("matplotlib")
    from pyflow.benchmarks import plots

    results["benchmarks"] = []
    groups = report.groups_of(results)
    assert plots.speedup(groups) is None
    assert plots.memory(groups) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.50 s"), (0.0123, "12.3 ms"), (0.99999, "1000 ms"), (4.2e-6, "4.20 µs"), (3e-8, "0.03 µs"), (0, "0 µs")],
)
def test_duration(seconds, text):
    assert report.duration(seconds) == text
