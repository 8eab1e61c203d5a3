"""The unit of the data does not matter: rows are scaled by powers of two, also in traces."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import pyflow
from pyflow import ops

from .dense import F32, F64, dependent, draw


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16])
def test_values_do_not_depend_on_the_unit_of_the_data(dtype, estimator, backend):
    x, y = dependent(60, 3, dtype)
    z, size = x.double(), draw((60, 60), dtype)
    size = size + size.mT
    exponents = (-1000, -530, 0, 530, 1000) if dtype == F64 else (-120, -80, 0, 64, 100)

    def everything(unit):
        leaf = (x * unit).requires_grad_()
        options = dict(estimator=estimator, normalize=True)
        values = [ops.hsic(leaf, y, kernel=kernel, **options) for kernel in ("rbf", "laplacian", "linear")]
        values.append(ops.hsic(leaf, y, kernel="polynomial", coef0=0.0, kernel_y="rbf", **options))
        values.append(ops.hsic(leaf, y, bandwidth=1.5 * unit, bandwidth_y=1.0, **options))
        values += [ops.hsic(leaf, y, approximate=how, **options) for how in ("rff", "nystrom")]
        grads = [torch.autograd.grad(value, leaf)[0].double() * unit for value in values]
        values += [ops.hsic(size * unit, size, kernel="precomputed", kernel_y="precomputed", **options)]
        values += [ops.hsic_matrix([leaf], [y, leaf], kernel="linear", **options).sum()]
        values.append(ops.hsic(leaf, y, estimator=estimator))
        return torch.stack([v.detach().double() for v in values]), torch.stack(grads)

    with pyflow.backend(backend):
        want = everything(1.0)
        assert z.isfinite().all() and want[0].abs().min() > 0
        for exponent in exponents:
            got = everything(2.0**exponent)
            torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
            # gradients of bfloat16 leaves are rounded to bfloat16
            rtol = 2.0**-7 if dtype == torch.bfloat16 else 1e-3
            torch.testing.assert_close(got[1], want[1], rtol=rtol, atol=1e-5, msg=f"gradient at 2**{exponent}")


def test_items_of_a_batch_may_have_different_units():
    x, y = dependent(40, 2)
    batch = torch.stack([x * unit for unit in (1.0, 2.0**-90, 2.0**70, 2.0**100)])
    for kernel in ("rbf", "laplacian", "linear"):
        f = lambda x: ops.cka(x, y, kernel=kernel)
        for values in (f(batch), torch.compile(f, fullgraph=True, backend="eager")(batch), torch.vmap(f)(batch)):
            torch.testing.assert_close(values, f(x).expand(4), rtol=1e-6, atol=0)
    # no overflow on the way to a value that fits into the dtype
    torch.testing.assert_close(
        ops.hsic(x * 2.0**70, y * 2.0**-70, kernel="linear"), ops.hsic(x, y, kernel="linear"), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("kernel", ["rbf", "linear", "polynomial"])
@pytest.mark.parametrize("unit", [1.0, 1e20])
def test_traces_do_not_depend_on_the_values_that_were_traced(kernel, unit):
    x, y = dependent(12, 2)
    cka = lambda x, y: ops.cka(x, y, kernel=kernel, estimator="unbiased")
    traces = [torch.jit.trace(cka, (unit * x, y)), make_fx(cka)(unit * x, y)]
    for other in (x, 1e20 * x, 1e-25 * x, torch.ones_like(x)):
        for trace in traces:
            torch.testing.assert_close(trace(other, y), cka(other, y), rtol=1e-5, atol=1e-6)
