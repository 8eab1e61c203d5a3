"""`KernelSpec`: one per variable, made of the public arguments."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch

from pyflow import ops, stats
from pyflow.hsic.inputs import variables
from pyflow.hsic.kernels import KERNEL_OPTIONS, KernelSpec, kernel_of, kernel_specs
from pyflow.nn import HSICLoss

from .dense import dependent


def fields(spec):
    return spec.name, spec.bandwidth, spec.degree, spec.gamma, spec.coef0


def test_the_kernel_of_y_is_that_of_x_where_none_is_named():
    common = (5, 0.25, 2.0)
    of_x, of_y = kernel_specs("rbf", 0.5, None, None, *common)
    assert fields(of_x) == fields(of_y) == ("rbf", 0.5, *common)
    assert fields(kernel_specs("rbf", 0.5, "linear", None, *common)[1]) == ("linear", 0.5, *common)
    assert fields(kernel_specs("rbf", 0.5, None, 3.0, *common)[1]) == ("rbf", 3.0, *common)
    assert fields(kernel_specs("rbf", 0.5, "delta", "median", *common)[1]) == ("delta", "median", *common)


def test_defaults_are_those_of_the_public_functions():
    (of_x, of_y) = kernel_specs(*(inspect.signature(ops.hsic).parameters[name].default for name in KERNEL_OPTIONS))
    assert fields(of_x) == fields(of_y) == fields(KernelSpec("rbf"))
    for function in (ops.hsic_matrix, ops.nhsic, stats.hsic, stats.hsic_test, HSICLoss):
        given = inspect.signature(function).parameters
        for name in KERNEL_OPTIONS:
            assert given[name].default == inspect.signature(ops.hsic).parameters[name].default, (function, name)
    assert list(inspect.signature(kernel_specs).parameters) == list(KERNEL_OPTIONS)


def test_is_frozen_and_pickles():
    spec = KernelSpec("polynomial", gamma=0.5)
    with pytest.raises(AttributeError):
        spec.degree = 2
    assert fields(pickle.loads(pickle.dumps(spec))) == fields(spec)


def test_a_variable_knows_the_name_of_its_kernel():
    x, y = dependent(10, 2)
    for name in ("rbf", "laplacian", "linear", "polynomial"):
        pair = variables("hsic", x, y, (KernelSpec(name), KernelSpec("polynomial", degree=1)))
        assert [kernel_of(v) for v in pair] == [name, "polynomial"]
        assert [v.degree for v in pair] == [3 if name == "polynomial" else 1, 1]


def test_bandwidths_of_both_variables_pass_through_compile_and_trace():
    x, y = dependent(20, 2)
    wide, narrow = torch.tensor(2.0, requires_grad=True), torch.tensor(0.7, requires_grad=True)
    f = lambda x, y, a, b: ops.hsic(x, y, kernel="rbf", bandwidth=a, kernel_y="laplacian", bandwidth_y=b)
    value = f(x, y, wide, narrow)
    for other in (torch.compile(f, backend="eager", fullgraph=True), torch.jit.trace(f, (x, y, wide, narrow))):
        got = other(x, y, wide, narrow)
        torch.testing.assert_close(got, value)
        for a, b in zip(
            *(torch.autograd.grad(v, (wide, narrow), retain_graph=True) for v in (got, value)), strict=True
        ):
            torch.testing.assert_close(a, b)
