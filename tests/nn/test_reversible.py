"""ReversibleSequential against the plain stack: gradients, memory, random state, autocast, errors."""

from __future__ import annotations

import copy
import functools
import math
import subprocess
import sys
import weakref
from collections import UserDict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from pyflow import _backend, backend
from pyflow.nn import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    Invertible1x1Conv,
    ReversibleSequential,
    Scale,
    apply_spectral_norm,
)
from pyflow.train import add_loss, collect


class PeakMemory(TorchDispatchMode):
    """Peak bytes of live storages allocated inside the block."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), before)
        return out

    def _count(self, storage, before):
        key = storage._cdata
        if id(storage) in before or key in self.seen:
            return
        size = storage.nbytes()
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed():
            self.seen.discard(key)
            self.live -= size

        weakref.finalize(storage, freed)


def coupling_stack(depth, width=8, hidden=16, dtype=torch.float64, kind=AffineCoupling, dropout=0.0, **options):
    half = width // 2

    def net():
        outputs = half if kind is AdditiveCoupling else 2 * half
        return nn.Sequential(nn.Linear(half, hidden), nn.Tanh(), nn.Dropout(dropout), nn.Linear(hidden, outputs))

    affine = {} if kind is AdditiveCoupling else {"scale_map": "tanh"}
    layers = [kind(net(), swap=i % 2 == 1, **affine) for i in range(depth)]
    return ReversibleSequential(*layers, **options).to(dtype)


def gradients(stack, x, *context, weights=None, seed=None, **named):
    """Return (y, logdet, gradients of x, of every parameter and of the context)."""
    if seed is not None:
        torch.manual_seed(seed)
    y, logdet = stack(x, *context, **named)
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + (logdet**2).sum()
    wanted = [t for t in (x, *stack.parameters(), *context, *named.values()) if torch.is_tensor(t) and t.requires_grad]
    return [y.detach(), logdet.detach(), *torch.autograd.grad(loss, wanted, allow_unused=True)]


def assert_same_gradients(stack, x, *context, tolerance=1e-10, **options):
    plain = copy.deepcopy(stack)
    plain.recompute = False
    for module in plain.modules():
        if isinstance(module, ReversibleSequential):
            module.recompute = False
    got, expected = gradients(stack, x, *context, **options), gradients(plain, x, *context, **options)
    assert any(g is not None for g in got[2:])
    for g, e in zip(got, expected, strict=True):
        if e is None:
            assert g is None
        else:
            torch.testing.assert_close(g, e, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("kind", [AdditiveCoupling, AffineCoupling])
def test_gradients_equal_the_plain_stack(kind, requires_grad):
    torch.manual_seed(0)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=requires_grad)
    assert_same_gradients(coupling_stack(12, kind=kind), x)


def test_every_layer_and_split():
    torch.manual_seed(0)

    def net(inputs, outputs):
        return nn.Conv2d(inputs, outputs, 3, padding=1)

    stack = ReversibleSequential(
        ActNorm(4),
        Invertible1x1Conv(4),
        AffineCoupling(net(2, 4), split="channel", scale_map="sigmoid", shift_first=True),
        AffineCoupling(net(4, 8), split="checkerboard", scale_map="softsign"),
        AffineCoupling(net(2, 4), split="interleave", swap=True, scale_map="atan", packing="interleaved"),
        AdditiveCoupling(net(4, 4), split="checkerboard", swap=True),
        Scale((4, 4, 2)),
        ReversibleSequential(ActNorm(4), AdditiveCoupling(net(2, 2))),
    ).double()
    x = torch.randn(3, 4, 4, 2, dtype=torch.float64, requires_grad=True)
    stack(x)
    assert_same_gradients(stack, x)
    y, logdet = stack(x)
    back, minus = stack.inverse(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -logdet)


def test_float32_gradients_are_close():
    torch.manual_seed(0)
    x = torch.randn(16, 8, requires_grad=True)
    assert_same_gradients(coupling_stack(16, dtype=torch.float32), x, tolerance=1e-3)


def test_shared_frozen_and_unused_parameters():
    torch.manual_seed(0)
    stack = coupling_stack(6)
    stack.layers[2].net = stack.layers[0].net
    stack.layers.append(stack.layers[1])
    for parameter in stack.layers[3].parameters():
        parameter.requires_grad_(False)
    stack.layers[4].net.unused = nn.Identity()
    stack.layers[4].net.register_parameter("idle", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    assert_same_gradients(stack, torch.randn(5, 8, dtype=torch.float64, requires_grad=True))
    stack(torch.randn(5, 8, dtype=torch.float64))[0].sum().backward()
    assert stack.layers[3].net[0].weight.grad is None and stack.layers[0].net[0].weight.grad is not None


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4 + 3, 8)

    def forward(self, x, context, extra=None):
        y = self.mix(torch.cat((x, context), 1))
        return y if extra is None else y * extra["gain"]


def test_context_gets_gradients():
    torch.manual_seed(0)
    stack = ReversibleSequential(*(AffineCoupling(Conditioned(), swap=i % 2 == 1, scale_map="tanh") for i in range(4)))
    stack.double()
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    leaf = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    gain = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    for recompute in (True, False):
        stack.recompute = recompute
        # a non-leaf context, and a context inside a dict
        y, logdet = stack(x, leaf.tanh(), extra={"gain": gain, "name": "kept"})
        found = torch.autograd.grad(y.square().sum() + logdet.sum(), [x, leaf, gain, *stack.parameters()])
        if recompute:
            first = found
    for a, b in zip(first, found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@dataclass(frozen=True)
class Frozen:
    h: torch.Tensor
    name: str = "kept"


class Slotted:
    __slots__ = ("h",)

    def __init__(self, h):
        self.h = h


CONTAINERS = {
    "dataclass": lambda h: Frozen(h),
    "slots": lambda h: Slotted(h),
    "namespace": lambda h: SimpleNamespace(h=h, deep=SimpleNamespace(unused=[h])),
    "user dict": lambda h: UserDict(h=h),
    "nested": lambda h: {"inside": [SimpleNamespace(box=UserDict(h=h))]},
}


class Opening(nn.Module):
    """A net that reads a tensor from an object in its context."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 8)

    def forward(self, x, context):
        if isinstance(context, dict):
            context = context["inside"][0].box
        if callable(context):
            return self.mix(x) + context()
        return self.mix(x) + (context["h"] if isinstance(context, UserDict) else context.h)


def opening_stack(**options):
    torch.manual_seed(0)
    layers = (AffineCoupling(Opening(), swap=i % 2 == 1, scale_map="tanh") for i in range(3))
    return ReversibleSequential(*layers, **options).double()


@pytest.mark.parametrize("kind", CONTAINERS)
def test_tensors_in_objects_get_gradients(kind):
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for recompute in (True, False):
        leaf = torch.linspace(-1, 1, 40, dtype=torch.float64).view(5, 8).requires_grad_()
        context = CONTAINERS[kind](leaf.tanh())
        y, logdet = opening_stack(recompute=recompute)(x, context)
        (y.square().sum() + logdet.sum()).backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("hide", [lambda h: functools.partial(torch.mul, h, 1), lambda h: lambda: h])
def test_hidden_tensor_that_needs_a_gradient_raises(hide):
    stack, x = opening_stack(), torch.randn(5, 8, dtype=torch.float64)
    h = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    y, _ = stack(x, hide(h))
    with pytest.raises(
        RuntimeError, match=r"context must not hide tensors that need a gradient, got one inside (partial|function)"
    ):
        y.sum().backward()
    y, _ = stack(x, hide(h.detach()))
    y.sum().backward()


@pytest.mark.parametrize("kept", [False, True])
def test_saved_tensor_hooks(kept):
    torch.manual_seed(0)
    stack = coupling_stack(4)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    _, _, *expected = gradients(stack, x)

    class Hooked(nn.Module):
        def forward(self, x):
            with torch.autograd.graph.save_on_cpu():
                return stack(x)

    class Checkpointed(nn.Module):
        def forward(self, x):
            return checkpoint(stack, x, use_reentrant=kept)

    for module in (Hooked(), Checkpointed()):
        y, logdet = module(x)
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + (logdet**2).sum()
        for tensor in (x, *stack.parameters()):
            tensor.grad = None
        loss.backward()
        for tensor, gradient in zip((x, *stack.parameters()), expected, strict=True):
            torch.testing.assert_close(tensor.grad, gradient, atol=1e-12, rtol=1e-12)


class Around(nn.Module):
    def __init__(self, stack, recompute):
        super().__init__()
        self.first, self.stack, self.recompute = nn.Linear(8, 8).double(), stack, recompute

    def forward(self, x):
        x = self.first(x)
        return checkpoint(self.stack, x, use_reentrant=False) if self.recompute else self.stack(x)


@pytest.mark.parametrize("through_iteration", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("forwards", [1, 2])
def test_spectral_norm_applied_to_the_root(through_iteration, recompute, forwards):
    torch.manual_seed(0)
    model = apply_spectral_norm(Around(coupling_stack(3), recompute), through_iteration=through_iteration)
    plain = copy.deepcopy(model)
    plain.stack.recompute = plain.recompute = False
    x = torch.randn(5, 8, dtype=torch.float64)
    for module in (model, plain):
        outputs = [module((i + 1) * x) for i in range(forwards)]
        sum(y.square().sum() + logdet.sum() for y, logdet in outputs).backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-10, rtol=1e-10)


def test_export():
    torch.manual_seed(0)
    stack, x = coupling_stack(3).eval(), torch.randn(5, 8, dtype=torch.float64)
    for strict in (False, True):
        program = torch.export.export(stack, (x,), strict=strict)
        for got, expected in zip(program.module()(x), stack(x), strict=True):
            torch.testing.assert_close(got, expected)


def test_on_meta():
    stack = coupling_stack(3).to("meta")
    y, logdet = stack(torch.empty(5, 8, dtype=torch.float64, device="meta"))
    (y.sum() + logdet.sum()).backward()
    assert all(p.grad.is_meta for p in stack.parameters())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_fully_sharded(tmp_path):
    script = str(Path(__file__).with_name("sharded.py"))
    done = subprocess.run([sys.executable, script, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_mask_reaches_every_layer():
    torch.manual_seed(0)
    net = lambda: nn.Conv1d(2, 4, 3, padding=1)
    stack = ReversibleSequential(ActNorm(4), Invertible1x1Conv(4), AffineCoupling(net(), scale_map="tanh")).double()
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    padding = torch.arange(6) >= torch.tensor([6, 4, 2])[:, None, None]
    stack(x, mask=padding)
    assert_same_gradients(stack, x, mask=padding)


def test_only_one_output_used():
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    stack = coupling_stack(4)
    for pick in (0, 1):
        found = []
        for recompute in (True, False):
            stack.recompute = recompute
            found.append(torch.autograd.grad(stack(x)[pick].sum(), [x, *stack.parameters()], allow_unused=True))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b if b is not None else torch.zeros_like(a), atol=1e-10, rtol=1e-10)


def test_dropout_is_replayed_and_random_state_restored():
    torch.manual_seed(0)
    stack = coupling_stack(6, dropout=0.5)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    assert_same_gradients(stack, x, seed=3)
    y, logdet = stack(x)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    (y.sum() + logdet.sum()).backward()
    assert torch.rand(3).equal(expected)


class NoRebuild(nn.Module):
    """A coupling with forward and inverse only, like third-party layers."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)

    def inverse(self, y):
        return self.inner.inverse(y)


def test_layers_without_rebuild():
    torch.manual_seed(0)
    stack = coupling_stack(5, dropout=0.3)
    stack = ReversibleSequential(*map(NoRebuild, stack.layers))
    assert_same_gradients(stack, torch.randn(5, 8, dtype=torch.float64, requires_grad=True), seed=1)


class Block(NoRebuild):
    """Two couplings in one layer; the inverse draws random numbers in reverse order."""

    def __init__(self, *parts):
        super().__init__(ReversibleSequential(*parts, recompute=False))


@pytest.mark.parametrize("around", [ReversibleSequential, Block])
def test_dropout_in_layers_of_several_parts(around):
    torch.manual_seed(0)
    parts = coupling_stack(4, dropout=0.5).layers
    stack = ReversibleSequential(around(*parts[:2]), around(*parts[2:]))
    assert_same_gradients(stack, torch.randn(5, 8, dtype=torch.float64, requires_grad=True), seed=3)


class Doubled(AffineCoupling):
    def forward(self, x):
        y, logdet = super().forward(x)
        return 2 * y, logdet + x.shape[1] * math.log(2)

    def inverse(self, y):
        x, logdet = super().inverse(y / 2)
        return x, logdet - y.shape[1] * math.log(2)


class NestedDoubled(ReversibleSequential):
    def forward(self, x):
        y, logdet = super().forward(x)
        return 2 * y, logdet

    def inverse(self, y):
        x, logdet = super().inverse(y / 2)
        return x, logdet


def test_rebuild_is_unused_if_forward_or_inverse_is_overridden():
    torch.manual_seed(0)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    stack = coupling_stack(3, kind=Doubled)
    assert_same_gradients(stack, x)
    assert_same_gradients(ReversibleSequential(NestedDoubled(*stack.layers), Scale(8).double()), x)
    stack = coupling_stack(3)
    for layer in stack.layers:
        layer.register_forward_hook(lambda layer, args, output: (-output[0], output[1]))
        layer.inverse = lambda y, layer=layer: type(layer).inverse(layer, -y)
    plain = gradients(ReversibleSequential(*stack.layers, recompute=False), x)
    for a, b in zip(gradients(stack, x), plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("nested", [False, True])
def test_backward_hooks_of_layers_run(nested):
    torch.manual_seed(0)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    stack = coupling_stack(3)
    hooked = ReversibleSequential(*stack.layers[:2]) if nested else stack[1]
    seen = []
    hooked.register_full_backward_pre_hook(lambda layer, grads: seen.append("before"))
    hooked.register_full_backward_hook(lambda layer, grad_in, grad_out: seen.append("after") or (3 * grad_in[0],))
    layers = (hooked, stack[2]) if nested else stack.layers
    plain = gradients(ReversibleSequential(*layers, recompute=False), x)
    assert seen == ["before", "after"]
    found = gradients(ReversibleSequential(*layers), x)
    assert seen == ["before", "after"] * 2
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_training_flags_are_replayed():
    torch.manual_seed(0)
    stack = coupling_stack(4, dropout=0.5)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    found = []
    for switched in (False, True):
        torch.manual_seed(1)
        y, logdet = stack(x)
        stack.layers[2].train(not switched)
        found.append(torch.autograd.grad(y.square().sum() + logdet.sum(), [x, *stack.parameters()]))
        assert [layer.training for layer in stack.layers] == [True, True, not switched, True]
        assert stack.layers[2].net.training is not switched
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


class Counting(nn.Linear):
    """A net whose output depends on the number of calls."""

    def __init__(self):
        super().__init__(4, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (self.calls / 10).clamp(max=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_wrongly_rebuilt_input_raises(dtype):
    torch.manual_seed(0)
    nets = [nn.Linear(4, 8), Counting(), nn.Linear(4, 8)]
    stack = ReversibleSequential(*(AffineCoupling(net, scale_map="tanh") for net in nets)).to(dtype)
    x = torch.randn(16, 8, dtype=dtype)
    x[3] = torch.nan
    y, logdet = stack(x)
    with pytest.raises(RuntimeError, match="layer 1, AffineCoupling, must rebuild its input from its output, got"):
        (y.nansum() + logdet.nansum()).backward()
    # after enough calls the output is constant, and the backward passes
    nets[1].calls += 20
    y, logdet = stack(x)
    (y.nansum() + logdet.nansum()).backward()
    assert all(parameter.grad is not None for parameter in stack.parameters())


def test_inaccurate_inverse_raises():
    torch.manual_seed(0)
    # scale exp(-8) and shift 1e4: the changed half keeps few digits in y
    net = nn.Linear(4, 8)
    nn.init.zeros_(net.weight)
    with torch.no_grad():
        net.bias.copy_(torch.tensor([1e4] * 4 + [-8.0] * 4))
    _y, logdet = ReversibleSequential(AffineCoupling(net))(torch.randn(16, 8))
    with pytest.raises(RuntimeError, match="inverse is inaccurate; use recompute=False"):
        logdet.sum().backward()


def test_cached_parametrizations_get_gradients():
    torch.manual_seed(0)
    stack = coupling_stack(2)
    for layer in stack.layers:
        nn.utils.parametrizations.weight_norm(layer.net[0])
    plain = ReversibleSequential(*stack.layers, recompute=False)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    found = []
    for module in (stack, plain):
        with nn.utils.parametrize.cached():
            found.append(gradients(module, x))
    assert nn.utils.parametrize._cache_enabled == 0
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


class Flip(nn.Module):
    def __init__(self, logdet):
        super().__init__()
        self.logdet, self.weight = logdet, nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        return x.flip(1), self.logdet(self.weight)

    def inverse(self, y):
        return self.forward(y)


@pytest.mark.parametrize("logdet", [lambda w: 0, lambda w: 3 * w, lambda w: 3 * w.reshape(1)])
@pytest.mark.parametrize("alone", [False, True])
def test_scalar_logdet_for_all_samples(logdet, alone):
    torch.manual_seed(0)
    layers = [Flip(logdet), Flip(logdet)]
    stack = ReversibleSequential(*layers, *(() if alone else coupling_stack(2).layers))
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    found = []
    for recompute in (True, False):
        stack.recompute = recompute
        y, total = stack(x)
        loss = y.square().sum() + (torch.as_tensor(total) ** 2).sum()
        found.append(torch.autograd.grad(loss, [x, *stack.parameters()], allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


class SeesBackend(nn.Linear):
    def forward(self, x):
        self.seen.append(_backend.current())
        return super().forward(x)


def test_backward_uses_the_backend_of_its_forward():
    net = SeesBackend(2, 4)
    net.seen = []
    stack = ReversibleSequential(AffineCoupling(net))
    with backend("reference"):
        y, logdet = stack(torch.randn(3, 4))
    (y.sum() + logdet.sum()).backward()
    assert net.seen == ["reference", "reference"] and _backend.current() == "auto"


def test_jit_trace():
    stack, x = coupling_stack(2), torch.randn(5, 8, dtype=torch.float64)
    traced = torch.jit.trace(stack, x)
    y, logdet = traced(2 * x)
    torch.testing.assert_close(y, stack(2 * x)[0])
    (y.sum() + logdet.sum()).backward()
    assert all(parameter.grad is not None for parameter in stack.parameters())


class Regularised(nn.Linear):
    def forward(self, x):
        add_loss(self.weight.square().sum(), "decay")
        return super().forward(x)


def test_add_loss_inside_raises():
    stack = ReversibleSequential(AffineCoupling(Regularised(2, 4)))
    x = torch.randn(3, 4)
    with collect(), pytest.raises(RuntimeError, match="must not call add_loss, got a loss 'decay'"):
        stack(x)
    stack(x)[0].sum().backward()
    stack.recompute = False
    with collect() as collected:
        stack(x)
    assert collected.losses["decay"].requires_grad


def test_autocast_is_replayed():
    torch.manual_seed(0)
    stack, x = coupling_stack(4, dtype=torch.float32, hidden=64), torch.randn(5, 8, requires_grad=True)
    found = []
    for recompute in (True, False):
        stack.recompute = recompute
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, logdet = stack(x)
        found.append(torch.autograd.grad(y.square().sum() + logdet.sum(), [x, *stack.parameters()]))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 0.02 * b.norm()
    # a forward without autocast rebuilds without it, even where backward is called under it
    stack.recompute = True
    y, _ = stack(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(y.sum(), x)[0]
    torch.testing.assert_close(inside, torch.autograd.grad(stack(x)[0].sum(), x)[0], atol=1e-6, rtol=1e-6)


def test_backward_twice_and_accumulation():
    stack, x = coupling_stack(3), torch.randn(5, 8, dtype=torch.float64)
    y, logdet = stack(x)
    (y.sum() + logdet.sum()).backward(retain_graph=True)
    once = [p.grad.clone() for p in stack.parameters()]
    (y.sum() + logdet.sum()).backward()
    for parameter, grad in zip(stack.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * grad)


def peak(depth, recompute, backward=True):
    stack = coupling_stack(depth, width=64, hidden=64, dtype=torch.float32, kind=AffineCoupling, recompute=recompute)
    for parameter in stack.parameters():
        # no gradients of parameters: they grow with depth, and this measures activations
        parameter.requires_grad_(False).mul_(0.5)
    x = torch.randn(1024, 64, requires_grad=True)
    with PeakMemory() as memory:
        y, logdet = stack(x)
        (y.sum() + logdet.sum()).backward()
    return memory.peak


def test_activation_memory_does_not_grow_with_depth():
    shallow, deep = peak(8, True), peak(64, True)
    assert deep <= 1.5 * shallow, (shallow, deep)
    plain_shallow, plain_deep = peak(8, False), peak(64, False)
    assert plain_deep >= 4 * plain_shallow and deep < plain_deep / 8


def saved_bytes(stack, x):
    """Bytes of distinct storages autograd saves, without parameters."""
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in stack.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _y, _logdet = stack(x)
    return sum(kept.values())


def test_only_the_output_is_saved():
    x = torch.randn(256, 8, dtype=torch.float64)
    assert saved_bytes(coupling_stack(8), x) == saved_bytes(coupling_stack(64), x) == x.nbytes


def test_double_backward_raises():
    stack, x = coupling_stack(2), torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="ReversibleSequential: create_graph=True is not supported"):
        torch.autograd.grad(stack(x)[0].sum(), x, create_graph=True)
    stack.recompute = False
    assert torch.autograd.gradgradcheck(lambda v: stack(v), (x,))


def test_modified_output_and_parameters_raise():
    stack, x = coupling_stack(2), torch.randn(5, 8, dtype=torch.float64)
    y, _logdet = stack(x)
    with torch.no_grad():
        stack.layers[0].net[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y, _logdet = stack(x)
    loss = y.sum()
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_swapped_parameters_raise():
    stack, x = coupling_stack(2), torch.randn(5, 8, dtype=torch.float64)
    other = {name: p.detach().clone().requires_grad_() for name, p in stack.named_parameters()}
    y, _ = torch.func.functional_call(stack, other, (x,))
    with pytest.raises(RuntimeError, match="parameters must be the same tensors in forward and backward"):
        y.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    stack, x = coupling_stack(3).eval(), torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    with mode():
        y, logdet = stack(x)
        back, minus = stack.inverse(y)
    assert not y.requires_grad
    torch.testing.assert_close(back, x.detach())
    torch.testing.assert_close(minus, -logdet)
    assert stack(x)[0].detach().equal(y.clone())


def test_nothing_requires_a_gradient():
    stack = coupling_stack(3).requires_grad_(False)
    y, logdet = stack(torch.randn(5, 8, dtype=torch.float64))
    assert not y.requires_grad and not logdet.requires_grad


def test_transforms_keep_activations():
    stack, x = coupling_stack(3), torch.randn(5, 8, dtype=torch.float64)
    expected = torch.autograd.grad(stack(v := x.clone().requires_grad_())[0].sum(), v)[0]
    torch.testing.assert_close(torch.func.grad(lambda v: stack(v)[0].sum())(x), expected)
    tangent = torch.randn_like(x)
    _, pushed = torch.func.jvp(lambda v: stack(v)[0], (x,), (tangent,))
    torch.testing.assert_close(pushed.sum(), (expected * tangent).sum())


def test_compile_has_a_graph_break_only_for_gradients():
    stack, x = coupling_stack(3), torch.randn(5, 8, dtype=torch.float64)
    y, logdet = torch.compile(stack, backend="aot_eager")(x)
    (y.sum() + logdet.sum()).backward()
    assert all(p.grad is not None for p in stack.parameters())
    torch._dynamo.reset()
    with pytest.raises(Exception, match="ReversibleSequential rebuilds activations outside the graph"):
        torch.compile(stack, fullgraph=True, backend="aot_eager")(x)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(stack, fullgraph=True, backend="aot_eager")(x)[0], y)


def test_compiled_nets_inside():
    stack, x = coupling_stack(2), torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(stack(x)[0].sum(), x)[0]
    for layer in stack.layers:
        layer.net = torch.compile(layer.net, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(stack(x)[0].sum(), x)[0], expected)


def test_state_dict_length_and_indexing():
    first, second = coupling_stack(3), coupling_stack(3)
    second.load_state_dict(first.state_dict())
    x = torch.randn(5, 8, dtype=torch.float64)
    assert second(x)[0].equal(first(x)[0])
    assert len(first) == 3 and first[1] is first.layers[1]


def test_lazy_nets_train_from_their_first_batch():
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    nets = [nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.LazyLinear(8)).double() for _ in range(2)]
    stack = ReversibleSequential(*(AffineCoupling(net, scale_map="tanh", swap=i == 1) for i, net in enumerate(nets)))
    first = gradients(stack, x)
    for a, b in zip(first, gradients(stack, x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_wrong_layers():
    with pytest.raises(TypeError, match="layers must be modules with an inverse, got Linear at 1"):
        ReversibleSequential(ActNorm(2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="ReversibleSequential: layers must not be empty"):
        ReversibleSequential()
    with pytest.raises(TypeError, match="ReversibleSequential: x must be a tensor, got list"):
        ReversibleSequential(ActNorm(2))([0.0])
