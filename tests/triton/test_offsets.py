"""Tensors of more than 2**31 elements: no kernel computes an index or a bound by an int32 product that can overflow.

Launches are recorded with meta tensors, which need no memory, and their TTIR is searched for such products.
"""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from . import aot

LARGE = 2**31 + 4096
# one long row, a few long rows, many short rows
SHAPES = [(1, LARGE), (3, LARGE), (LARGE, 3)]

# kernels whose int32 products stay small for every tensor that fits memory, with the reason
BOUNDED = {name: why for family in aot.families().values() for name, why in getattr(family, "BOUNDED", {}).items()}


def launches_of(shape):
    """Launches of every kernel that loops over rows and columns, for tensors of this shape."""
    with torch.device("meta"):
        return [one for family in aot.families().values() if hasattr(family, "large") for one in family.large(shape)]


def overflows(text):
    """Return the lines of TTIR that multiply int32 values derived from an argument or a program id."""
    large, found = set(), []
    for line in text.splitlines():
        line = line.partition(" loc(")[0] if "tt.func" not in line else line
        if "tt.func" in line:
            large |= set(re.findall(r"(%\w+): i32", line))
            continue
        names = re.findall(r"%[\w#]+", line)
        if not names or ("=" not in line and "scf.for" not in line):
            continue
        result, operands = names[0].partition(":")[0], names[1:]
        if "scf.for" in line:
            # the loop counter and the loop-carried values
            bounds = line[line.index("=", line.index("scf.for")) :].partition("iter_args")[0]
            if large & set(re.findall(r"%\w+", bounds)):
                large.add(re.search(r"scf\.for (%\w+)", line)[1])
            for carried, start in re.findall(r"(%\w+) = (%\w+)", line.partition("iter_args")[2]):
                large |= {carried} if start in large else set()
            continue
        wide = not re.search(r"\b(tensor<[\dx]*)?i32\b", line.rpartition(":")[2])
        if "tt.get_program_id" in line or "tt.get_num_programs" in line:
            large.add(result)
        elif "arith.remsi" in line and operands[-1].startswith(("%c", "%cst")):
            continue  # smaller than a constant
        elif large & set(operands) and "tt.load" not in line:
            large.add(result)
            if "arith.muli" in line and not wide:
                found.append(line.strip())
    return found


@pytest.fixture(scope="module")
def large_launches():
    return [launch for shape in SHAPES for launch in launches_of(shape)]


def test_every_kernel_has_a_large_launch_or_a_bound(large_launches):
    assert {launch.name for launch in large_launches} | BOUNDED.keys() == aot.launched_kernels()


def test_no_int32_product_overflows(large_launches):
    seen = set()
    for launch in large_launches:
        text = aot.ttir(launch, "sm_90")
        if launch.name in BOUNDED or text in seen:
            continue
        seen.add(text)
        found = overflows(text)
        assert not found, f"{launch.name}: {found}"
    assert len(seen) > 20


def test_overflowing_products_are_found():
    text = """tt.func public @kernel(%out: !tt.ptr<f32>, %cols: i32, %n: i64) {
    %c4_i32 = arith.constant 4 : i32
    %0 = tt.get_program_id x : i32
    %1 = arith.remsi %0, %c4_i32 : i32
    %2 = arith.muli %1, %c4_i32 : i32
    %3 = arith.extsi %cols : i32 to i64
    %4 = arith.muli %3, %n : i64
    %5 = tt.splat %cols : i32 -> tensor<8xi32>
    %6 = arith.muli %5, %cst : tensor<8xi32>
    scf.for %i = %c4_i32 to %cols step %c4_i32 iter_args(%a = %0) -> (i32) : i32 {
      %7 = arith.muli %i, %c4_i32 : i32
      %8 = arith.muli %a, %c4_i32 : i32
    }"""
    assert [line.partition(" ")[0] for line in overflows(text)] == ["%6", "%7", "%8"]
