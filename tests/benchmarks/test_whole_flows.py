"""The tables of whole flows, from made-up times."""

from __future__ import annotations

import pytest

from pyflow import _backend
from pyflow.benchmarks import flow_program, peer_flows, registry, report, whole_flows


def group(what, shape, times):
    name = flow_program.case_name(what, shape)
    rows = {contender: report.Row(contender, seconds) for contender, seconds in times.items()}
    return report.Group(name, "reused", "normflows", [], None, False, 1, 1, 0.0, rows=rows)


def test_speed_ups_and_shares_of_the_rate():
    shape = (8, 64, 8, 256)
    forward = {"normflows": 8.0, "normflows compiled": 4.0, "nflows": 7.0, "zuko": 6.0, "pyflow layers": 3.0}
    groups = [
        group("log_prob", shape, {**forward, "pyflow": 1.0}),
        group("log_prob+backward", shape, {"normflows": 20.0, "pyflow": 5.0, "zuko": 30.0}),
    ]
    # a forward at half of the rate; the backward has both gradients and 4 of the 76 rows of the layers again, in 4 s
    rate = 2.0 * flow_program.multiply_adds(shape)
    lines = whole_flows.table(groups, rate).splitlines()[2:]
    start = "| (8, 64, 8, 256) |"
    assert lines == [
        f"{start} log_prob | 1.00 s | 8.00x (4x) | 4.00x (2.5x) | 6.00x (zuko) | 3.00x | 50% |",
        f"{start} log_prob+backward | 5.00 s | 4.00x (3x) | – (2.5x) | 6.00x (zuko) | – | 31%, backward 26% |",
    ]


def test_speed_ups_over_peers():
    shape = (32, 128, 5, 4096)
    rows = {name: report.Row(name, seconds) for name, seconds in {"nflows": 12.0, "pyflow": 1.0}.items()}
    name = peer_flows.case_name("nflows MAF", "sample", shape)
    groups = [report.Group(name, "reused", "nflows", [], None, False, 1, 1, 0.0, rows=rows)]
    lines = whole_flows.peers_table(groups).splitlines()[2:]
    assert lines == ["| nflows MAF | (32, 128, 5, 4096) | sample | 12.0 s | 1.00 s | 12.00x (10x) |"]


def test_times_of_one_row():
    lines = whole_flows.one_row([group("log_prob", flow_program.ONE_ROW, {"normflows": 1e-3, "pyflow": 1e-4})])
    assert lines.splitlines()[2:] == ["| log_prob | 1.00 ms | – | – | – | – | 100 µs | – |"]


def test_every_shape_has_its_cases_and_aims():
    assert set(whole_flows.AIMS) == set(flow_program.SHAPES)
    names = {flow_program.case_name(what, flow_program.ONE_ROW) for what in flow_program.FORWARD}
    names |= {
        flow_program.case_name(what, shape)
        for shape in flow_program.SHAPES
        for what in (*flow_program.FORWARD, *flow_program.TRAINING)
    }
    assert names == {case.name for case in registry.select("flow_program/*")}


def test_the_rate_of_multiply_adds():
    if _backend.cpu_missing:
        pytest.skip(_backend.cpu_missing)
    assert whole_flows.multiply_add_rate(2) > 1e8
