"""Square root and division without the branch of IEEE ones: the instructions of ptxas, and the same results."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") in ("1", "true"):
    pytest.skip("the interpreter and compilation exclude each other", allow_module_level=True)

import triton.language as tl

from pyflow.triton_kernels._math import div_normal, sqrt_normal

from . import aot
from .interpreter import exact_fma as fma

F = np.float32


@triton.jit
def kernel(x, y, ROOT: tl.constexpr, BRANCH: tl.constexpr):
    i = tl.arange(0, 128)
    if ROOT:
        result = tl.sqrt_rn(tl.load(x + i)) if BRANCH else sqrt_normal(tl.load(x + i))
    else:
        a, b = tl.load(x + i), tl.load(y + i)
        result = tl.div_rn(a, b) if BRANCH else div_normal(a, b)
    tl.store(y + i, result)


def arithmetic(target, **constants):
    """Names of the floating-point instructions before the slow path; a * b + 0 counts as a product."""
    compiled = aot.compiled(aot.Launch(kernel, (torch.empty(128), torch.empty(128)), constants), target)
    names = []
    for one in aot.sass(compiled):
        name = one.name.partition(".")[0] if not one.name.startswith("MUFU") else one.name
        if name == "EXIT":
            break
        if name.startswith(("FFMA", "FMUL", "MUFU", "CALL")):
            names.append("FMUL" if name == "FFMA" and one.operands.rstrip().endswith("RZ") else name)
    return sorted(names)


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_instructions_are_those_of_the_fast_path(target, root):
    fast, branched = (arithmetic(target, ROOT=root, BRANCH=branch) for branch in (False, True))
    assert "CALL" in branched and "CALL" not in fast
    assert fast == [name for name in branched if name != "CALL"]
    assert len(fast) == (5 if root else 6)


def nudged(y, ulp):
    return (y.astype(F).view(np.int32) + ulp).astype(np.int32).view(F)


def root_of(x):
    above = np.maximum(x, F(2.0**-126))
    y = (1 / np.sqrt(above.astype(np.float64))).astype(F)
    s = x * y
    return fma(fma(-s, s, x), F(0.5) * y, s)


def quotient_of(a, b, ulp):
    y = nudged(1 / b.astype(np.float64), ulp)
    y = fma(y, fma(-b, y, np.ones_like(b)), y)
    q = a * y
    return fma(y, fma(-b, q, a), q)


def test_roots_of_the_arguments_of_normals():
    generator = np.random.default_rng(0)
    x = np.concatenate((np.exp2(generator.uniform(-23, 5.5, 500_000)), [-0.0, 2.0**-23, 44.4])).astype(F)
    assert np.array_equal(root_of(x).view(np.int32), np.sqrt(x).view(np.int32))


@pytest.mark.parametrize("ulp", [-1, 0, 1])
def test_quotients_of_tanh_sigmoid_and_slopes(ulp):
    generator = np.random.default_rng(0)
    denormal = np.arange(0, 1 << 23, 97, dtype=np.int32).view(F)
    t = np.concatenate((np.exp2(generator.uniform(-149, 28.8, 500_000)).astype(F), denormal))
    e = t[t <= 1]
    one = F(1)
    digits = np.concatenate([F(k) - np.arange(2 * k + 1, dtype=F) for k in range(1, 200)])
    widths = np.concatenate([np.full(2 * k + 1, k, F) for k in range(1, 200)])
    pairs = [(t, t + F(2)), (np.full_like(t, 2), t + one), (e, e + one), (np.ones_like(e), e + one),
             (F(4) * e, (e + one) * (e + one)), (digits, widths)]  # fmt: skip
    for number, (a, b) in enumerate(pairs):
        assert np.array_equal(quotient_of(a, b, ulp).view(np.int32), (a / b).view(np.int32)), number
