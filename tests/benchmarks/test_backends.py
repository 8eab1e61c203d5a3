"""Cases of the comparison of both GPU backends run on a CPU; the table is that of given rows."""

from __future__ import annotations

import math

import pytest
import torch

from pyflow.benchmarks import backends

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", backends.CASES)
def test_cases_run_at_small_sizes(case):
    for power in backends.POWERS[:2]:
        work = backends.build(case, power, CPU)
        result = work.call()
        outputs = result if isinstance(result, tuple) else (result,)
        assert all(output is None or output.numel() for output in outputs)
        # each value is read or written at least once, and no case moves more than ten tensors of its size
        assert 2**power < work.bytes <= 40 * 2**power


@pytest.mark.parametrize("n", [2**k for k in backends.POWERS])
def test_shapes_have_the_asked_size(n):
    assert math.prod(backends.matrix(n)) == math.prod(backends.images(n)) == n


def test_the_table_has_shares_launches_and_kernels():
    of = lambda backend, power, seconds: backends.Row("normal", power, backend, seconds, 2 * seconds, 1 << power)
    rows = [of("triton", 11, 1e-6), of("cuda", 11, 2e-6), of("triton", 26, 1e-4)]
    head, _, line = backends.table(rows, 2**26 / 5e-5).splitlines()
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert [cell.strip() for cell in head.strip("|").split("|")][:3] == ["case", "of copy, triton, cuda", "2^11"]
    assert cells[:3] == ["normal", "50% / –", "2.00 µs / 4.00 µs (1.00 µs / 2.00 µs)"]
    assert cells[-1] == "200 µs / – (100 µs / –)"
