"""What the tests of fused flows of other packages share."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Programs(TorchDispatchMode):
    """Counts the programs that run forward inside the block, and keeps how many rows x and the context of each have."""

    def __init__(self):
        super().__init__()
        self.count, self.rows = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.pyflow.flow_program.default:
            self.count += 1
            self.rows.append((len(args[0]), 0 if args[1] is None else len(args[1])))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def programs(count):
    """Require that the block runs so many programs."""
    with Programs() as seen:
        yield seen
    assert seen.count == count


def assert_changes_are_seen(changes, got, want, without_effect=None):
    """After each change one program returns what the layers do, and something else than before."""
    for change in changes:
        before = got()
        change()
        with programs(1):
            after = got()
        torch.testing.assert_close(after, want())
        assert not after.allclose(before) or change is without_effect


def data(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def randomised(module, spread=0.3):
    """The module in float64 with parameters and statistics that hide nothing: fresh ones are often the identity."""
    torch.manual_seed(3)
    module = module.double()
    for parameter in module.parameters():
        parameter.add_(spread * torch.randn_like(parameter))
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return module.eval()


def results(call, inputs):
    """What a call returns, with the same random numbers every time, and the gradients of a weighted sum of it."""
    torch.manual_seed(7)
    outputs = call()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weighted = [(v * torch.linspace(0.5, 1.5, v.numel(), dtype=v.dtype).view(v.shape)).sum() for v in outputs]
    grads = torch.autograd.grad(sum(weighted), inputs, allow_unused=True)
    unused = [torch.zeros_like(v) if grad is None else grad for grad, v in zip(grads, inputs, strict=True)]
    return [each.detach() for each in outputs], unused


def assert_same(call, own, inputs, count=1):
    """A call of the fused module against one of the module itself: results, shapes, dtypes and gradients."""
    with programs(count):
        got = results(call, inputs)
    for found, wanted in zip(got, results(own, inputs), strict=True):
        for a, b in zip(found, wanted, strict=True):
            # a few hundred roundings of 1e-16, relative to the largest number
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * float(1 + b.abs().max() if b.numel() else 1))


def assert_float32_as_exact_as(method, flow, fused, *inputs):
    """In float32 a fused flow may be off by four times what the flow itself is, and by a few roundings."""
    exact = getattr(flow, method)(*inputs)
    single = [each.float() for each in inputs]
    own = getattr(copy.deepcopy(flow).float(), method)(*single)
    with programs(1):
        got = getattr(copy.deepcopy(fused).float(), method)(*single)
    off, allowed = (got - exact).abs().max(), (own - exact).abs().max()
    assert off <= 4 * allowed + 2e-6 * exact.abs().max()


def texts(call):
    """The kind and text of the error that a call raises."""
    with pytest.raises(Exception) as error:
        call()
    return type(error.value), str(error.value)
