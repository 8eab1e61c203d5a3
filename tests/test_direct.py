"""The path past the dispatcher, with CPU tensors in the place of CUDA tensors."""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import pyflow
from pyflow import _backend, _direct, ops

OP = "affine_coupling"


@pytest.fixture
def direct(monkeypatch):
    """Count the calls of affine_coupling and its backward that skip the dispatcher."""
    calls = []

    def kernel(name):
        def run(*args):
            calls.append(name)
            return _backend._operators[name](*args)

        return run

    real = _direct._dense_keys
    monkeypatch.setattr(_direct, "_dense_keys", lambda device: real("cpu") if device == "cuda" else frozenset())
    kinds = {name: _direct.kinds_of(_backend._operators[name]) for name in (OP, f"{OP}_backward")}
    monkeypatch.setattr(_backend, "_gpu_kernels", {name: (kernel(name), kind) for name, kind in kinds.items()})
    # without compiled kernels the public function would call the reference
    monkeypatch.setattr(sys.modules["pyflow.ops.coupling"], "runs_reference", lambda *args, **options: False)
    return calls


def leaves(**options):
    return [torch.randn(4, 6, generator=torch.Generator().manual_seed(i), **options) for i in range(3)]


@pytest.mark.parametrize(
    "context", [contextlib.nullcontext, torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__
)
def test_plain_calls_skip_the_dispatcher(direct, context):
    with context():
        x, shift, scale = leaves()
        got = ops.affine_coupling(x, torch.nn.Parameter(shift, requires_grad=False), scale)
    assert direct == [OP]
    with pyflow.backend("reference"):
        want = _backend._operators[OP](*leaves(), None, 0, 0.0, False, False, 1)
    torch.testing.assert_close(tuple(got), tuple(want))


def test_forward_and_backward_skip_the_dispatcher(direct):
    inputs = [v.requires_grad_() for v in leaves()]
    y, logdet = ops.affine_coupling(*inputs)
    got = torch.autograd.grad(y.sum() + logdet.sum(), inputs)
    assert direct == [OP, f"{OP}_backward"]
    y, logdet = torch.ops.pyflow.affine_coupling(*inputs, None, 0, 0.0, False, False, 1)
    want = torch.autograd.grad(y.sum() + logdet.sum(), inputs)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


class Nothing(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "context",
    [
        lambda: FlopCounterMode(display=False), Nothing,
        lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    ],
    ids=["dispatch mode", "function mode", "profiler"],
)  # fmt: skip
def test_modes_and_the_profiler_see_the_operator(direct, context):
    inputs = leaves()
    with context() as active:
        ops.affine_coupling(*inputs)
    assert direct == []
    if isinstance(active, torch.profiler.profile):
        assert any(event.key == "pyflow::affine_coupling" for event in active.key_averages())


def test_fake_tensors_and_transforms_use_the_operator(direct):
    with FakeTensorMode():
        y, _ = ops.affine_coupling(*(torch.empty(4, 6) for _ in range(3)))
    assert type(y) is not torch.Tensor
    torch.func.vmap(ops.affine_coupling)(*(v[:, None] for v in leaves()))
    torch.jit.trace(lambda *v: ops.affine_coupling(*v)[0], leaves(), check_trace=False)
    assert direct == []


class Named(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "special", [lambda x: x.as_subclass(Named), torch._neg_view, lambda x: torch._efficientzerotensor(x.shape)],
    ids=["subclass", "lazy negation", "zero tensor"],
)  # fmt: skip
def test_unusual_tensors_use_the_operator(direct, special):
    x, shift, scale = leaves()
    arguments = (None, 0, 0.0, False, False, 1)
    got = _backend.call(OP, x, special(shift), scale, *arguments)
    assert direct == []
    want = _backend.call(OP, x, special(shift).clone().as_subclass(torch.Tensor), scale, *arguments)
    assert direct == [OP]
    assert torch.equal(got[0].as_subclass(torch.Tensor), want[0])


@pytest.mark.parametrize("index, value", [(0, 0.0), (1, 0), (2, 0), (4, True)], ids=["int", "float", "bool", "int2"])
def test_arguments_of_other_types_are_converted_by_the_operator(direct, index, value):
    arguments = [0, 0.0, False, False, 1]
    arguments[index] = value
    try:
        _backend.call(OP, *leaves(), None, *arguments)
    except RuntimeError:
        assert index == 0
    assert direct == []


def test_operators_that_write_or_take_lists_keep_the_dispatcher():
    without = {name for name, op in _backend._operators.items() if _direct.kinds_of(op) is None}
    assert without == {
        "center_gram_", "hsic_sums", "hsic_sums_backward", "spectral_normalize", "spectral_normalize_backward",
    }  # fmt: skip


def test_a_call_without_a_tensor_in_gpu_memory_uses_the_operator():
    kinds = _direct.kinds_of(_backend._operators[OP])
    cpu = _direct._dense_keys("cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_direct, "_dense_keys", lambda device: cpu if device == "cpu" else frozenset())
        assert not _direct.changes_nothing((*leaves(), None, 0, 0.0, False, False, 1), kinds)
        numbers = [torch.tensor(1.0)] * 3
        assert not _direct.changes_nothing((*numbers, None, 0, 0.0, False, False, 1), kinds)
