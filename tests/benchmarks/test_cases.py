"""Every case of the registry can be built, and its contenders agree; wrong results are reported."""

import dataclasses
from pathlib import Path

import pytest
import torch

from pyflow.benchmarks import machine, registry
from pyflow.benchmarks.machine import cpu_seconds
from pyflow.benchmarks.measure import Judge, Runner, Settings, compiles, peak_memory

CASES = registry.all_cases()
# the points of the sweep differ only in size
DISTINCT = [name for name, case in CASES.items() if not case.sweep] + ["coupling/sweep 2^10"]


def test_every_family_has_a_file_and_cases():
    for family in registry.FAMILIES:
        assert any(name.startswith(f"{family}/") for name in CASES), family


def test_quick_selects_some_cases():
    quick = registry.select(quick=True)
    assert 0 < len(quick) < len(CASES)
    assert len({case.sweep for case in quick if case.sweep}) >= 4


def test_patterns_select_cases_by_name():
    assert [case.name for case in registry.select("coupling/small forward")] == [
        "coupling/small forward", "coupling/small forward+backward",
    ]  # fmt: skip
    assert registry.select("no such case") == []
    assert {case.name for case in registry.select("bf16*back")} == {"coupling/bf16 forward+backward"}


def test_pages_apply_to_every_case():
    names = [name.removesuffix(registry.FRESH) for name in CASES]
    for pages in ("fresh", "reused"):
        cases = registry.select(pages=pages)
        assert {case.pages for case in cases} == {pages}
        assert {case.name.removesuffix(registry.FRESH) for case in cases} == set(names)


@pytest.mark.parametrize("name", DISTINCT)
def test_contenders_agree_on_a_tiny_input(name):
    case = CASES[name]
    problem = case.build(case.tiny, torch.device("cpu"))
    assert set(problem.calls) | set(problem.missing) == set(case.contenders)
    assert set(problem.forms) <= set(case.contenders)
    assert case.peer is None or case.peer in case.contenders
    assert all(one in case.contenders and other in case.contenders for one, other in case.compare)
    assert problem.bytes is None if case.memory else problem.bytes > 0
    judge = Judge(problem)
    for contender in case.contenders:
        # compiling every case takes minutes; test_run compiles one
        if contender in problem.calls and not compiles(contender):
            assert judge.error(contender, problem.calls[contender]()) <= 1


def test_the_forward_case_counts_its_bytes():
    case = CASES["coupling/forward"]
    rows, dim = 8, 10
    assert case.build((rows, dim), torch.device("cpu")).bytes == 4 * (4 * rows * dim + rows)


def test_wrong_results_are_refused():
    truth = (torch.ones(4, dtype=torch.float64),)
    problem = registry.Problem({}, lambda: truth, 0)
    judge = Judge(problem)
    assert judge.error("eager", (torch.ones(4),)) == 0
    for outputs, why in (
        ((torch.ones(4) + 1e-3,), "off by"),
        ((torch.full((4,), torch.nan),), "off by inf"),
        ((torch.ones(5),), "shape"),
        ((torch.ones(4), torch.ones(4)), "2 results for 1"),
    ):
        with pytest.raises(ArithmeticError, match=why):
            judge.error("other", outputs)


def test_a_wrong_contender_has_a_reason_and_no_number():
    def build(shape, device):
        calls = {"eager": lambda: (torch.zeros(3),), "pyflow": lambda: (torch.ones(3),), "broken": lambda: 1 / 0}
        truth = (torch.zeros(3, dtype=torch.float64),)
        return registry.Problem(calls, lambda: truth, 24, missing={"other": "not here"})

    case = registry.Case("coupling/wrong", build, (3,), (3,))
    measured = _prepare(case, ["eager", "pyflow", "broken", "other"])
    assert set(measured.ready) == {"eager"}
    assert measured.failed["pyflow"].startswith("ArithmeticError: result 0 is off by")
    assert measured.failed["broken"] == "ZeroDivisionError: division by zero"
    assert measured.missing == {"other": "not here"}


def test_a_case_that_cannot_be_built_reports_why():
    def missing(shape, device):
        raise registry.Missing("the package x is not installed")

    measured = _prepare(registry.Case("coupling/none", missing, (3,), (3,)), ["eager", "pyflow"])
    assert measured.missing == dict.fromkeys(["eager", "pyflow"], "the package x is not installed")


def _prepare(case, names):
    # any other value of `pages` leaves the allocator unchanged
    return Runner(Settings(threads=torch.get_num_threads())).prepare(dataclasses.replace(case, pages="default"), names)


def test_peak_memory_counts_live_tensors():
    x = torch.zeros(1000)

    def call():
        y = torch.neg(x)
        z = torch.neg(y)
        del y
        return torch.neg(z)

    assert peak_memory(call, torch.device("cpu")) == 2 * x.nbytes


def test_workers_find_a_case_by_its_name():
    assert all(case.name == name for name, case in CASES.items())


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux")
def test_used_cpu_seconds_are_below_the_available_ones():
    used, available = cpu_seconds()
    assert 0 < used < available


def test_the_header_has_the_facts_of_the_machine():
    names = ["CPU", "instruction set", "threads", "torch", "triton", "compiler", "commit", "date"]
    facts = machine.facts("cpu", 2, 0.25)
    assert set(names) <= set(facts)
    assert all(facts.values())
    assert facts["CPU taken by others"] == "25%"
