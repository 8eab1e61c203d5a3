"""Losses and metrics added inside a model."""

from __future__ import annotations

import sys
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyflow
from pyflow.train import add_loss, add_metric, collect


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x).tanh()
        add_loss(y.square().mean(), "size")
        add_metric(y.abs().mean(), "magnitude")
        return y


class Stack(nn.Module):
    def __init__(self, recompute=False):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.recompute = nn.ModuleList([Block(), Block()]), recompute

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def test_losses_of_one_name_are_summed_and_metrics_averaged():
    with collect() as c:
        add_loss(torch.tensor(1.0), "a")
        add_loss(torch.tensor([[2.0]]), "a")
        add_loss(3, "b")
        add_metric(1.0, "m")
        add_metric(torch.tensor(2.0, requires_grad=True), "m")
    assert {k: v.item() for k, v in c.losses.items()} == {"a": 3.0, "b": 3.0}
    assert c.metrics["m"].item() == 1.5 and not c.metrics["m"].requires_grad and c.total().item() == 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sums_are_float32_or_wider_and_the_gradient_keeps_its_dtype(dtype):
    weight = torch.ones((), dtype=dtype, requires_grad=True)
    with collect() as c:
        for _ in range(600):
            add_loss(weight * 1000, "fit")
            add_metric(weight * 1000, "level")
        add_metric(torch.tensor(True), "flag")
        add_metric(torch.tensor(2), "count")
    wide = torch.promote_types(dtype, torch.float32)
    assert c.total().dtype == wide and c.total().item() == 600_000
    assert c.metrics["level"].dtype == wide and c.metrics["level"].item() == 1000
    assert c.metrics["flag"].item() == 1 and c.metrics["count"].item() == 2
    (c.losses["fit"] / 600).backward()
    assert weight.grad.dtype == dtype


def test_numbers_do_not_follow_the_default_dtype_or_device():
    torch.set_default_dtype(torch.bfloat16)
    # stands for an accelerator
    torch.set_default_device("meta")
    try:
        with collect() as c:
            for _ in range(600):
                add_loss(1.001, "fit")
                add_metric(1.001, "level")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert c.total().item() == pytest.approx(600.6) and c.metrics["level"].item() == pytest.approx(1.001)


def test_add_loss_outside_a_block_does_nothing_and_blocks_nest():
    add_loss(torch.tensor(1.0), "a")
    with collect() as outer:
        add_loss(1.0, "a")
        with collect() as inner:
            add_loss(2.0, "a")
        add_loss(3.0, "b")
        with pytest.raises(KeyError), collect():
            raise KeyError
        add_loss(4.0, "b")
    add_loss(5.0, "b")
    assert {k: v.item() for k, v in outer.losses.items()} == {"a": 1.0, "b": 7.0}
    assert inner.losses["a"].item() == 2.0


def test_a_recomputed_block_does_not_add_twice():
    results = []
    for recompute in (False, True):
        model = Stack(recompute)
        with collect() as c:
            model(X)
            before = c.losses["size"].item()
            c.total().backward()
        assert c.losses["size"].item() == before and c._metrics["magnitude"][1] == 2
        results.append([c.losses["size"].detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_loss_without_a_graph_beside_others_warns():
    weight = torch.ones(2, requires_grad=True)

    def part(x):
        add_loss(x.square().sum(), "inside")
        return 2 * x

    with collect() as c:
        add_loss(checkpoint(part, weight, use_reentrant=True).sum(), "outside")
    with pytest.warns(UserWarning, match="^collect: 'inside' cannot train, being added where no graph is recorded"):
        c.total()
    # no warning if no loss has a graph
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with collect() as c, torch.no_grad():
            part(weight)
        assert c.total().item() == 2


def test_added_values_are_copies():
    running = torch.full((), 5.0)
    loss = torch.full((), 2.0, requires_grad=True) * 1
    with collect() as c:
        add_loss(running, "running")
        add_loss(loss, "fit")
        add_metric(running, "level")
    running.fill_(100)
    loss += 3
    assert {name: value.item() for name, value in c.losses.items()} == {"running": 5, "fit": 2}
    assert c.metrics["level"].item() == 5


def test_uint8_values_do_not_overflow():
    with collect() as c:
        for _ in range(2):
            add_metric(torch.tensor(200, dtype=torch.uint8), "pixels")
            add_loss(torch.tensor(200, dtype=torch.uint8), "pixels")
    assert c.metrics["pixels"].item() == 200 and c.total().item() == 400


def test_a_block_inside_a_backward_collects():
    inner = []

    class Solver(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            add_loss(7.0, "outer")
            with collect() as c:
                add_loss(1.0, "inner")
                with torch.enable_grad():
                    y = checkpoint(lambda x: (add_loss(x.sum(), "inner"), x.exp())[1], X.clone().requires_grad_(),
                                   use_reentrant=False)  # fmt: skip
                    # recomputed in a nested backward: not added again
                    y.sum().backward()
            inner.append(c.total().item())
            return grad

    with collect() as outer:
        Solver.apply(torch.ones(1, requires_grad=True)).sum().backward()
    assert inner == pytest.approx([1 + X.sum().item()]) and not outer.losses


def test_blocks_are_per_thread():
    with collect() as c:
        thread = threading.Thread(target=lambda: add_loss(1.0, "other"))
        thread.start()
        thread.join()
        add_loss(2.0, "mine")
    assert list(c.losses) == ["mine"]


def test_under_compile_the_graph_breaks_and_the_result_is_the_same():
    model = Stack()
    with collect() as want:
        model(X)
    with collect() as got:
        torch.compile(model)(X)
    torch.testing.assert_close(got.losses, want.losses)
    torch.testing.assert_close(got.metrics, want.metrics)
    got.total().backward()
    torch._dynamo.reset()
    with pytest.raises(Exception, match="collect\\(\\) lives outside the graph"):
        torch.compile(model, fullgraph=True)(X)


def test_without_lightning_only_the_module_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.delitem(sys.modules, "pyflow.train._lightning", raising=False)
    with pytest.raises(ImportError, match=r"needs the package lightning: pip install 'pyflow-kernels\[train\]'"):
        pyflow.train.LossOnlyModule  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        pyflow.train.Trainer  # noqa: B018


@pytest.mark.parametrize("op", [add_loss, add_metric])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    "args, error, text",
    [
        ((torch.zeros(3), "a"), ValueError, r"value must be a scalar, got shape \(3,\)"),
        (("1", "a"), TypeError, "value must be a number, got str"),
        ((torch.tensor(1j), "a"), TypeError, "value must be real, got complex64"),
        ((1.0, 2), TypeError, "name must be a string, got int"),
        ((1.0, ""), ValueError, "name must not be empty"),
    ],
)
def test_wrong_arguments(op, inside, args, error, text):
    with pytest.raises(error, match=f"^{op.__name__}: {text}$"):
        if inside:
            with collect():
                op(*args)
        op(*args)


def test_total_without_losses_raises():
    with pytest.raises(RuntimeError, match=r"^collect: the model added no loss; call pyflow.train.add_loss"):
        with collect() as c:
            pass
        c.total()
