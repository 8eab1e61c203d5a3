"""The path past the dispatcher, with CPU tensors in the place of CUDA tensors."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import pyflow
from pyflow import _backend, _operators, _torch, ops
from pyflow._operators import OPERATORS

OP = "affine_coupling"
LISTS = "spectral_normalize"
NAMES = (OP, f"{OP}_backward", LISTS, f"{LISTS}_backward")


@pytest.fixture
def direct(monkeypatch):
    """Count the calls of affine_coupling and its backward that skip the dispatcher."""
    calls = []

    def kernel(name):
        def run(*args):
            calls.append(name)
            return OPERATORS[name].overload(*args)

        return run

    real = _torch.dense_keys
    monkeypatch.setattr(_torch, "dense_keys", lambda device: real("cpu") if device == "cuda" else frozenset())
    for name in NAMES:
        operator = OPERATORS[name]
        monkeypatch.setattr(operator, "kinds", _operators.kinds_of(operator.overload))
        monkeypatch.setattr(operator, "launch", kernel(name))
    # without compiled kernels the public function would call the reference
    monkeypatch.setattr(_backend, "runs_reference", lambda *args, **options: False)
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
        want = OPERATORS[OP].overload(*leaves(), None, 0, 0.0, False, False, 1)
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
    got = OPERATORS[OP](x, special(shift), scale, *arguments)
    assert direct == []
    want = OPERATORS[OP](x, special(shift).clone().as_subclass(torch.Tensor), scale, *arguments)
    assert direct == [OP]
    assert torch.equal(got[0].as_subclass(torch.Tensor), want[0])


@pytest.mark.parametrize("index, value", [(0, 0.0), (1, 0), (2, 0), (4, True)], ids=["int", "float", "bool", "int2"])
def test_arguments_of_other_types_are_converted_by_the_operator(direct, index, value):
    arguments = [0, 0.0, False, False, 1]
    arguments[index] = value
    try:
        OPERATORS[OP](*leaves(), None, *arguments)
    except RuntimeError:
        assert index == 0
    assert direct == []


def test_an_operator_that_writes_keeps_the_dispatcher():
    without = {name for name, operator in OPERATORS.items() if _operators.kinds_of(operator.overload) is None}
    assert without == {"center_gram_"}


def test_lists_of_tensors_skip_the_dispatcher(direct):
    def normalised(weights, u, v):
        out, _, _, sigmas = ops.spectral_normalize(weights, u, v)
        loss = sum(w.square().sum() * s for w, s in zip(out[:2], sigmas[1:], strict=True))
        return [*out, *torch.autograd.grad(loss, weights)]

    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, 3, generator=generator, requires_grad=True) for n in (4, 5, 6)]
    u, v = [torch.ones(n) for n in (4, 5, 6)], [torch.ones(3)] * 3
    got = normalised(weights, u, v)
    assert direct == [LISTS, f"{LISTS}_backward"]
    with FlopCounterMode(display=False):
        want = normalised(weights, u, v)
    assert direct == [LISTS, f"{LISTS}_backward"]
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    ops.spectral_normalize([weights[0].detach(), weights[1].detach().as_subclass(Named)], u[:2], v[:2])
    assert direct == [LISTS, f"{LISTS}_backward"]


def test_a_call_without_a_tensor_in_gpu_memory_uses_the_operator():
    kinds = _operators.kinds_of(OPERATORS[OP].overload)
    cpu = _torch.dense_keys("cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_torch, "dense_keys", lambda device: cpu if device == "cpu" else frozenset())
        assert not _operators.passes_on((*leaves(), None, 0, 0.0, False, False, 1), kinds)
        numbers = [torch.tensor(1.0)] * 3
        assert not _operators.passes_on((*numbers, None, 0, 0.0, False, False, 1), kinds)


class Launchers:
    """Stand in for a module of launchers; counts how often one is looked up."""

    def __init__(self):
        self.asked, self.ran = 0, []

    def __getattr__(self, name):
        self.asked += 1
        return lambda *args: self.ran.append(name)


def test_a_launcher_is_looked_up_once_and_follows_the_backend(monkeypatch):
    operator, triton, cuda = OPERATORS["flow_log_prob"], Launchers(), Launchers()
    monkeypatch.setattr(_operators.importlib, "import_module", lambda name: triton)
    monkeypatch.setattr(
        _backend, "cuda_operators", lambda: SimpleNamespace(flow_log_prob=SimpleNamespace(default=cuda.x))
    )
    monkeypatch.setattr(_backend, "_triton_runs", True)
    monkeypatch.setattr(_backend, "_cuda_loads", lambda: False)
    h = torch.zeros(2, 3)
    try:
        for _ in range(3):
            operator.launch(h, None, 0)
        with _backend.on("cuda"):
            operator.launch(h, None, 0)
        monkeypatch.setattr(_backend, "_triton_runs", False)
        operator.launch(h, None, 0)
    finally:
        for name in ("triton_kernel", "cuda_kernel"):
            vars(operator).pop(name, None)
    assert triton.asked == 1 and triton.ran == ["flow_log_prob"] * 3 and cuda.ran == ["x"] * 2


@pytest.mark.parametrize("name", ["affine_coupling", "sde_step_backward", "noise", "hsic_sums", "spectral_normalize"])
def test_small_calls_run_on_cuda_unless_a_backend_is_chosen(monkeypatch, name):
    operator, chosen = OPERATORS[name], []
    monkeypatch.setitem(vars(operator), "triton_kernel", lambda *args: chosen.append("triton"))
    monkeypatch.setitem(vars(operator), "cuda_kernel", lambda *args: chosen.append("cuda"))
    monkeypatch.setattr(_backend, "_triton_runs", True)
    monkeypatch.setattr(_backend, "_cuda_loads", lambda: True)

    def launched(elements):
        # only the large tensor, wherever the schema has it
        types = operator.signature.types.items()
        large = {"x": torch.empty(elements, device="meta"), "size": [elements]}
        operator.launch(*(large.get(a, torch.zeros(2) if kind == "Tensor" else None) for a, kind in types))
        return chosen.pop()

    most = _backend.MOST_CUDA.get(operator.family)
    if most is None:
        assert launched(1) == "triton"
        return
    assert launched(most) == "cuda" and launched(most + 1) == "triton"
    for choice in ("cuda", "triton"):
        with _backend.on(choice):
            assert launched(most) == launched(most + 1) == choice


def test_cuda_operators_that_do_not_load_are_named_once(monkeypatch):
    def refuse():
        raise OSError("no such symbol")

    monkeypatch.setattr(_backend, "_cuda_missing", lambda: None)
    monkeypatch.setattr(_backend, "cuda_operators", refuse)
    _backend._cuda_loads.cache_clear()
    try:
        with pytest.warns(UserWarning, match="pyflow runs Triton's kernels on small tensors too: no such symbol"):
            assert not _backend._cuda_loads()
        assert not _backend._cuda_loads()
    finally:
        _backend._cuda_loads.cache_clear()
