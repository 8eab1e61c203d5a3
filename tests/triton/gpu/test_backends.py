"""Checks across families: both backends agree, and kernels run on the device of the tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pyflow
from pyflow import _backend, ops, testing
from pyflow._operators import OPERATORS
from pyflow._schemas import PRIORS

from .common import DEVICE, draw, moved, needs_cuda

CUDA = Path(__file__).parents[3] / "csrc" / "cuda"
FUNCTIONS = {
    "tanh": lambda x, t, s: ops.affine_coupling(x, t, s, scale_map="tanh"),
    "softplus inverse": lambda x, t, s: ops.affine_coupling(x, t, s, scale_map="softplus", inverse=True),
    **{prior: lambda x, *_, prior=prior: ops.flow_log_prob(x, prior=prior) for prior in PRIORS},
}


def test_auto_backend_runs_the_kernels(kernels):
    x = torch.zeros(2, device=DEVICE)
    for op, operator in OPERATORS.items():
        assert operator.cuda == (CUDA / f"{operator.family}.cu").exists(), op
        here = operator.cuda or (operator.triton and not _backend.status()["triton"])
        assert _backend.runs_reference(op, x, operator.cuda, operator.triton) != here, op


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(65, 3), (33, 37), (7, 1000), (3, 9001)], ids=str)
def test_triton_and_cuda_agree_even_in_sums(both_backends, shape, name):
    leaves = moved([draw(shape, seed=i) for i in range(3)])
    for inputs in (leaves, [torch.cat((v, v), 1)[:, ::2] for v in leaves]):
        results = []
        for backend in ("triton", "cuda"):
            with pyflow.backend(backend):
                out = FUNCTIONS[name](*inputs)
                results.append(out if isinstance(out, tuple) else (out,))
        for a, b in zip(*results, strict=True):
            # a zero may have either sign
            testing.assert_same_bits(a + 0, b + 0)


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_runs_on_the_tensors_device(gpu):
    leaves = [draw((9, 100), seed=i) for i in range(3)]
    assert torch.cuda.current_device() == 0
    y, logdet = ops.affine_coupling(*(v.to("cuda:1") for v in leaves))
    assert y.device.index == logdet.device.index == 1 and torch.cuda.current_device() == 0
    testing.assert_same_bits(y, ops.affine_coupling(*(v.to("cuda:0") for v in leaves))[0].to("cuda:1"))


@needs_cuda
def test_kernels_run_on_the_current_stream(gpu):
    x, shift, scale = moved([draw((300, 392), seed=i) for i in range(3)])
    want = ops.affine_coupling(x, shift, scale)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = torch.zeros_like(x)
        # long enough for a kernel on the wrong stream to read the values before they are written
        torch.cuda._sleep(10**8)
        y.copy_(x)
        got = ops.affine_coupling(y, shift, scale)
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(got, want, strict=True):
        testing.assert_same_bits(a, b)


@needs_cuda
def test_tensors_on_two_devices_are_refused(gpu):
    x = torch.zeros(4, 6, device=DEVICE)
    with pytest.raises(ValueError, match=r"^affine_coupling: shift must be on the device of x, cuda:0, got cpu$"):
        ops.affine_coupling(x, x.cpu(), x)
