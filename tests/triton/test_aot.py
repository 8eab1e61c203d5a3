"""Compiles every Triton kernel ahead of time and checks instructions, vector width, registers and stack."""

from __future__ import annotations

import os
import re
from collections import Counter

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") in ("1", "true"):
    pytest.skip("the interpreter and compilation exclude each other", allow_module_level=True)

from pyflow.triton_kernels import spectral

from . import aot
from .aot import BF16, F16, F32, F64, dense
from .aot.coupling import affine, packed
from .aot.flow_head import head
from .aot.fsq import positions, quantizer
from .aot.gan_qp import critic
from .aot.hsic import PRODUCTS
from .aot.spectral import normalised

FAMILIES = aot.families()
REGISTERS, STACK = (
    {case: most for family in FAMILIES.values() for case, most in getattr(family, name, {}).items()}
    for name in ("REGISTERS", "STACK")
)
NAMED = [(name, launches) for family in FAMILIES.values() for name, launches in family.cases().items()]
CASES = dict(NAMED)
MOST_PARAMETERS = 19


def params():
    """Every case for sm_90; for other targets those that bring a kernel, the rest and SLOW ones marked slow."""
    seen = set()
    slow = {name for family in FAMILIES.values() for name in getattr(family, "SLOW", ())}
    for name, launches in NAMED:
        target = name.partition("-")[0]
        kernels = {(target, launch.name) for launch in launches}
        quick = name not in slow and (target == "sm_90" or kernels - seen)
        yield pytest.param(name, marks=() if quick else pytest.mark.slow)
        seen |= kernels


def test_every_family_has_its_launches():
    assert {path.stem for path in aot.KERNELS.glob("[a-z]*.py")} == FAMILIES.keys()
    assert len(NAMED) == len(CASES)


@pytest.mark.parametrize("module, function", aot.jit_functions(), ids=lambda value: getattr(value, "name", value))
def test_functions_have_few_parameters(module, function):
    parameters = function.args
    assert not (parameters.vararg or parameters.kwarg)
    count = len([*parameters.posonlyargs, *parameters.args, *parameters.kwonlyargs])
    assert count <= MOST_PARAMETERS, f"{module}.{function.name}: {count}: group what belongs together, see _tiles.py"


def dtypes(launch):
    """Dtypes of tensors, and those behind addresses in a table, which are constants."""
    behind = set(launch.constants.get("TYPES", ()))
    return {t.dtype for t in launch.tensors} | {d for d, element in spectral.ELEMENT.items() if element in behind}


def test_every_kernel_has_a_case():
    launches = [launch for case in CASES.values() for launch in case]
    assert {launch.name for launch in launches} == aot.launched_kernels()
    due = {name: dtypes for family in FAMILIES.values() for name, dtypes in getattr(family, "DTYPES", {}).items()}
    for name in aot.launched_kernels():
        compiled = set().union(*(dtypes(launch) for launch in launches if launch.name == name))
        assert compiled >= due.get(name, {F32, F64, BF16, F16}), name


@pytest.mark.parametrize("layers, tables", [(1, 1), (54, 1), (57, 2)])
@pytest.mark.parametrize("n_iter", [0, 1, 3])
def test_all_layers_share_the_launches(n_iter, layers, tables):
    weights = [torch.empty(8 + i, 4, 3, 3) for i in range(layers)]
    u, v = [torch.empty(len(w)) for w in weights], [torch.empty(36)] * layers
    with aot.recorded() as launches:
        sigmas = spectral.spectral_normalize(weights, u, v, n_iter)[-layers:]
    names = Counter(launch.name.partition(".")[2] for launch in launches)
    rounds = max(n_iter, 1)
    want = {"fill_kernel": tables, "product_kernel": rounds, "scale_kernel": rounds, "reduce_kernel": n_iter}
    assert names == Counter(want)
    with aot.recorded() as launches:
        spectral.spectral_normalize_backward(weights, sigmas, weights, u, v, sigmas)
    assert len(launches) == 2 + tables


def test_arguments_of_a_table_fit_the_limit_of_a_launch():
    for launch in normalised(F32, 56):
        tuples = [a for a in launch.args if isinstance(a, tuple)]
        # addresses of 8 bytes, numbers of 4; table, pitch, first and Triton's two scratch pointers
        assert sum(len(a) * size for a, size in zip(tuples, (8, 4), strict=False)) + 32 <= 4096


def test_layers_of_other_shapes_need_no_compilation():
    def keys(weights):
        u, v = [torch.empty(len(w)) for w in weights], [torch.empty(w[0].numel()) for w in weights]
        with aot.recorded() as launches:
            sigmas = spectral.spectral_normalize(weights, u, v, 2)[-len(weights) :]
            spectral.spectral_normalize_backward(weights, sigmas, weights, u, v, sigmas)
        # the source's hash holds signature, constants and alignment
        return {aot.specialised(launch, "sm_90")[0].hash() for launch in launches}

    shapes = [(1, 1), (16, 16), (64, 3, 7, 7), (1000, 48)]
    assert keys([torch.empty(shape) for shape in shapes]) == keys([torch.empty(33, 5)] * 2)


@pytest.mark.parametrize("case", list(params()))
def test_compiles_to_the_expected_instructions_and_resources(case):
    target = case.partition("-")[0]
    for launch in CASES[case]:
        kernel = aot.compiled(launch, target)
        where = f"{case}: {launch.name}"
        # neither reassociated nor contracted: only an explicit fma fuses a * b + c
        relaxed = re.search(r"= f(mul|add|sub|div) (fast|reassoc|contract|arcp|afn|nnan|ninf|nsz)", kernel.asm["llir"])
        assert not relaxed, f"{where}: {relaxed[0]}"
        if target.startswith("sm_"):
            check_ptx(kernel.asm["ptx"], launch, where)
            used = aot.resources(kernel)
            if launch.name in PRODUCTS:
                assert used.stack <= 128 and used.local == 0, f"{where}: {used}"
                continue
            assert used.stack <= STACK.get((case, launch.name), 0) and used.local == 0, f"{where}: {used}"
            # 168: three blocks of 128 threads per multiprocessor
            assert used.registers <= REGISTERS.get((case, launch.name), 168), f"{where}: {used}"


def check_ptx(ptx, launch, where):
    if F64 in dtypes(launch):
        return  # exp and log are libdevice's and use instructions excluded below
    assert ".f64" not in ptx, where
    # the fma of sqrt_normal and div_normal make these two results IEEE
    roots, quotients = (len(re.findall(rf"\b{name}\.approx\.ftz\.f32", ptx)) for name in ("rsqrt", "rcp"))
    if launch.name.startswith(("_fsq.", "noise.")):
        # a packed instruction of sm_100 computes one or two
        least = len(re.findall(r"\bfma\.", ptx))
        most = least + len(re.findall(r"\bfma\.\S*f32x2", ptx))
        assert least <= 2 * roots + 4 * quotients <= most, where
    ptx = re.sub(r"\b(?:rsqrt|rcp)\.approx\.ftz\.f32", "", ptx)
    loose = re.findall(r"\b(?:mul|add|sub|fma|div)\.f32\b|\S*\.(?:ftz|approx|full)\b\S*", ptx)
    assert not loose, f"{where}: {loose}"


@pytest.mark.parametrize(
    "target, dtype", [("sm_80", F32), *(("sm_90", dtype) for dtype in (F32, F64, BF16, F16)), ("sm_100", F32)]
)
def test_unit_stride_data_moves_in_128_bit_vectors(target, dtype):
    launches = affine(*dense(dtype, 3)) + head(*dense(dtype, 1), torch.empty(392, dtype=dtype), 1)
    launches += critic(torch.empty(64, 3, 32, 32, dtype=dtype), None, torch.empty(64, dtype=dtype))[:1]
    launches += quantizer(positions(dtype, 1000, 5), (7, 5, 5, 5, 5), "symmetric")
    launches += quantizer(positions(dtype, 4, 5, 1000, dim=1), (7, 5, 5, 5, 5), "symmetric")
    launches += packed(*dense(dtype, 1), torch.empty(64, 784, dtype=dtype), 2, 1) if dtype != F64 else []
    for launch in launches:
        ptx = aot.compiled(launch, target).asm["ptx"]
        widths = Counter(re.findall(r"\b((?:ld|st)\.global)\S*?((?:\.v\d)?\.b\d+)", ptx))
        full = {".v4.b32", ".v2.b64"}
        loads = sum(n for (op, width), n in widths.items() if op == "ld.global" and width in full)
        stores = sum(n for (op, width), n in widths.items() if op == "st.global" and width in full)
        size = 16 // torch.empty((), dtype=dtype).element_size()
        # decode loads an index once per channel, not in vectors
        assert loads or launch.name == "_fsq.decode_kernel", f"{launch.name}: {widths}"
        # narrow accesses are allowed only for one value per row: logdet, its gradient, sums, indices
        narrow = {k: n for k, n in widths.items() if k[1] not in full}
        # channel first, a thread has 16 elements of several positions, each with its indices
        most = 16 if launch.name.startswith("_fsq.") else 8
        assert sum(narrow.values()) <= most, f"{launch.name}, {size} a vector: {narrow}"
        sums = ("flow_head.forward_kernel", "flow_head.sum_blocks", "gan_qp.sums_kernel")
        assert stores or launch.name in sums, f"{launch.name}: {widths}"
