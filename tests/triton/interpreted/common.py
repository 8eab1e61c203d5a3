"""Comparisons of Triton's results with the C++ kernels, bit for bit, and with the reference."""

from __future__ import annotations

import pytest
import torch

import pyflow
from pyflow import _backend, testing

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def draw(shape, dtype=torch.float32, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def run(backend, function, leaves, weights=None):
    """Return the outputs of a public function, then the gradients of the leaves for the output gradients `weights`."""
    leaves = [v.detach().requires_grad_() for v in leaves]
    with pyflow.backend(backend):
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if weights is None:
            weights = [draw(o.shape, o.dtype, seed=9) for o in outputs]
        grads = torch.autograd.grad(outputs, leaves, weights)
    return [v.detach() for v in (*outputs, *grads)]


def compare(function, leaves, *, sums=(), error=2e-5):
    """Compare with the bits of the C++ kernels (results at `sums` within rounding) and with the float64 reference."""
    got = run("triton", function, leaves)
    dtype = testing.compute_dtype(leaves[0].dtype)
    exact = run("reference", function, [v.double() for v in leaves],
                [draw(o.shape, o.dtype, seed=9).double() for o in got[: len(got) - len(leaves)]])  # fmt: skip
    scale = 1e-6 if dtype == torch.float64 else error
    for i, (a, b) in enumerate(zip(got, exact, strict=True)):
        testing.assert_within(a, b, scale * (1 + b.abs()), f"output {i} against the reference")
    if _backend.cpu_missing is not None or dtype == torch.float64:
        return got
    for i, (a, b) in enumerate(zip(got, run("cpu", function, leaves), strict=True)):
        assert a.dtype == b.dtype and a.stride() == b.stride(), f"output {i}"
        if i in sums:
            size = 1 + b.double().abs()
            testing.assert_within(a, b.double(), (1e-5 + testing.UNIT[a.dtype]) * size, f"output {i} against C++")
        else:
            testing.assert_same_bits(a, b, f"output {i} against C++")
    return got


def equal(got, want, name):
    """Check equal bits and strides; float64 gradients within rounding, because their exp is libm's."""
    assert got.dtype == want.dtype and (got.stride() == want.stride() or got.numel() == 0), name
    if not got.is_floating_point():
        assert torch.equal(got, want), name
    elif "gradient" in name and got.dtype == torch.float64:
        testing.assert_within(got, want, 1e-14 * (1 + want.abs()), name)
    else:
        testing.assert_same_bits(got, want, name)


def both_backends(function, z):
    """Return Triton's outputs and the gradient through the first one, after a comparison with C++."""
    if _backend.cpu_missing is not None:
        pytest.skip(_backend.cpu_missing)
    results = []
    for backend in ("triton", "cpu"):
        leaf = z.detach().requires_grad_()
        with pyflow.backend(backend):
            outputs = function(leaf)
            gradient = torch.autograd.grad(outputs[0], leaf, draw(z.shape, z.dtype, seed=9))
        results.append({f"output {i}": v.detach() for i, v in enumerate(outputs)} | {"gradient": gradient[0]})
    for name, got in results[0].items():
        equal(got, results[1][name], name)
    return results[0]


def same_on_every_backend(function):
    """Check that the result has the same bits on the reference and on C++."""
    got = function()
    for backend in ("reference",) + ("cpu",) * (_backend.cpu_missing is None):
        with pyflow.backend(backend):
            want = function()
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert a.stride() == b.stride()
            testing.assert_same_bits(a, b, f"output {i} against {backend}")
