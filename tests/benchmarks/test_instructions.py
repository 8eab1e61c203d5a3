"""Counts of SASS instructions per element."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") in ("1", "true"):
    pytest.skip("the interpreter and compilation exclude each other", allow_module_level=True)

from pyflow.benchmarks import instructions
from tests.triton.aot import Instruction


def test_instructions_of_loops_count_once_per_trip():
    code = [Instruction(16 * k, "FADD", "", None) for k in range(10)]
    code[6] = Instruction(96, "BRA", "", 48)  # back to the fourth: a body of 4
    code[8] = Instruction(128, "BRA", "", 144)  # forward: no loop
    assert instructions.per_thread(code, 1) == 10
    assert instructions.per_thread(code, 5) == 6 + 5 * 4


def test_uniform_numbers():
    (row,) = instructions.rows(["uniform"])
    count = 64 * 4 * 512 * 512
    assert row.memory == pytest.approx(4 * count / instructions.BANDWIDTH, rel=1e-4)
    # ten rounds of two products and two exclusive ors for four numbers, a conversion and a product for each
    assert 12 < row.instructions < 40
    assert row.issue == pytest.approx(row.instructions * count / 32 / (instructions.SCHEDULERS * instructions.CLOCK))
    assert 0 < row.registers <= 64 and row.spills == 0


def test_interleaved_parameters_and_indices_are_counted_once():
    from tests.triton.aot import fsq

    (coupling,) = instructions.rows(["interleaved forward"])
    batch, width = instructions.SHAPE
    assert coupling.memory == pytest.approx((4 * 4 * width + 4) * batch / instructions.BANDWIDTH)
    launch = fsq.quantizer(fsq.positions(instructions.F32, 64, 4), (8, 5, 5, 5), "vqp")[0]
    assert instructions.bytes_of(launch) == 64 * (4 + 4 + 1) * 4
    assert instructions.elements_of(launch.constants) == (1024, 1)


def test_all_parameters_of_a_spline_are_counted():
    with instructions.torch.device("meta"):
        launch = instructions.cases()["spline 8 forward"]()
    assert instructions.bytes_of(launch) == 2**20 * (8 * 4 * (1 + 23 + 1) + 4)


def test_a_program_of_the_backward_of_the_flow_head_loops_over_rows():
    launch = instructions.cases()["flow head backward"]()
    constants, (rows, columns) = launch.constants, instructions.SHAPE
    elements, trips = instructions.elements_of(constants)
    tile = constants["TILE"]
    assert trips * tile.rows == constants["block_rows"] == rows // 512
    assert rows * columns // elements == 512 * columns // tile.cols


def test_every_family_of_elementwise_kernels_has_a_case():
    names = {name.partition(" ")[0] for name in instructions.cases()}
    assert {
        "coupling",
        "sde_step",
        "normal",
        "uniform",
        "denoising",
        "fsq",
        "flow",
        "gan_qp",
        "mala",
        "spline",
    } <= names
