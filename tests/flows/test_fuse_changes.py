"""Whole flows in one call: changes of a flow are seen, and what has no instruction is left and named."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import pyflow
from pyflow import _backend
from pyflow.flows import NSF, fuse
from pyflow.nn import (
    ActNorm,
    AffineCoupling,
)

from .ours import affine, assert_same_as_layers, data, linear_of
from .peers import assert_changes_are_seen, programs

pytestmark = pytest.mark.skipif(bool(_backend.cpu_missing), reason="programs need compiled kernels")


def hook(flow):
    linear_of(flow).register_forward_hook(lambda module, args, output: 2 * output)


def pre_hook(flow):
    linear_of(flow).register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def backward_hook(flow):
    linear_of(flow).register_full_backward_hook(lambda module, grads, _: (2 * grads[0],))


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrization(flow):
    parametrize.register_parametrization(linear_of(flow), "weight", Twice())


def pruned(flow):
    prune.l1_unstructured(linear_of(flow), "weight", 0.5)


def weight_norm(flow):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(linear_of(flow))
    with torch.no_grad():
        linear_of(flow).weight_g.mul_(2)


def own_forward(flow):
    linear_of(flow).forward = lambda x: nn.Linear.forward(linear_of(flow), x) + 1


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def subclass(flow):
    flow.stages[0].layers[3].net[2] = Shifted(8, 7).double()


def unknown(flow):
    flow.stages[0].layers[3].net[3] = nn.Softplus()


CHANGES = {
    hook: "stages.0.layers.3.net.2 (Linear): it has hooks",
    pre_hook: "stages.0.layers.3.net.2 (Linear): it has hooks",
    backward_hook: "stages.0.layers.3.net.2 (Linear): it has hooks",
    parametrization: "stages.0.layers.3.net.2 (ParametrizedLinear): it has parametrizations",
    pruned: "stages.0.layers.3.net.2 (Linear): it has hooks",
    weight_norm: "stages.0.layers.3.net.2 (Linear): it has hooks",
    own_forward: "stages.0.layers.3.net.2 (Linear): it has its own forward",
    subclass: "stages.0.layers.3.net.2 (Shifted): its class has no instruction",
    unknown: "stages.0.layers.3.net.3 (Softplus): its class has no instruction",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_layer_is_left_and_named(realnvp, change):
    flow, x = realnvp
    before = flow.log_prob(x)
    change(flow)
    assert fuse(flow).explain().splitlines() == [
        "stages.0.layers.0 to stages.0.layers.2: fused, 2 ActNorm, 1 AffineCoupling as 2 Scale, 1 Net, 1 Affine",
        f"stages.0.layers.3 (AffineCoupling): left, {CHANGES[change]}",
        "stages.0.layers.4 to stages.0.layers.5: fused, 1 ActNorm, 1 AffineCoupling as 1 Scale, 1 Net, 1 Affine",
    ]
    inputs = [x.requires_grad_(), *flow.parameters()]
    with programs(2):
        got = flow.log_prob(x)
    grads = torch.autograd.grad(got.sum(), inputs)
    with pyflow.backend("reference"):
        want = flow.log_prob(x)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(grads, torch.autograd.grad(want.sum(), inputs))
    assert change is backward_hook or not torch.allclose(got, before)
    with programs(2):
        torch.testing.assert_close(flow.inverse(flow.stages[0](x)[0])[0], x)


def test_what_depends_on_the_mode(realnvp):
    flow, x = realnvp
    norm = nn.BatchNorm1d(7).double()
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), norm.weight.data.normal_(), norm.bias.data.normal_()
    flow.stages[0].layers[3].net.insert(3, nn.Dropout(0.5))
    flow.stages[0].layers[5].net.insert(3, norm)
    lines = fuse(flow).explain()
    assert "net.3 (Dropout): it drops with p=0.5" in lines and "(BatchNorm1d): it normalises by the batch" in lines
    assert "left" not in fuse(flow.eval()).explain()
    assert_same_as_layers(flow, x, (), 4)
    norm.running_mean = norm.running_var = None
    assert "(BatchNorm1d): it has no running statistics" in fuse(flow).explain()
    got = flow.log_prob(x)
    with pyflow.backend("reference"):
        torch.testing.assert_close(got, flow.log_prob(x))


def test_a_layer_is_fused_again_when_nothing_is_in_the_way(realnvp):
    flow, x = realnvp
    want = flow.log_prob(x)
    for change, undo in (
        (lambda: linear_of(flow).register_forward_hook(lambda *_: None), lambda handle: handle.remove()),
        (lambda: parametrization(flow), lambda _: parametrize.remove_parametrizations(linear_of(flow), "weight", False)),
        (lambda: setattr(linear_of(flow), "forward", lambda x: x), lambda _: delattr(linear_of(flow), "forward")),
    ):  # fmt: skip
        done = change()
        assert "left" in fuse(flow).explain()
        with contextlib.suppress(RuntimeError), programs(2):
            flow.log_prob(x)
        undo(done)
        with programs(1):
            got = flow.log_prob(x)
        assert "left" not in fuse(flow).explain()
    flow.stages[0].layers[3].net[2].weight.data.div_(1)
    assert got.equal(flow.log_prob(x)) and got.shape == want.shape


def test_replaced_modules_and_changed_options(realnvp):
    flow, x = realnvp
    coupling, nets = flow.stages[0].layers[3], flow.stages[0].layers[5].net
    flow.log_prob(x)
    gone = weakref.ref(linear_of(flow))

    def forget():
        coupling.net[2] = nn.Linear(8, 5).double()
        coupling.net[4] = nn.Linear(5, 4).double()

    changes = [
        forget,
        lambda: coupling.net.append(nn.Tanh()),
        lambda: coupling.options.update(clamp=1.0),
        lambda: setattr(coupling, "split", "interleave"),
        lambda: setattr(coupling, "options", {**coupling.options, "shift_first": True}),
        lambda: flow.stages[0].layers[1].net.__setitem__(1, nn.LeakyReLU(0.1)),
        lambda: setattr(flow.stages[0].layers[1].net[1], "negative_slope", 0.4),
        lambda: setattr(nets[4], "bias", None),
        lambda: setattr(nets[4], "bias", nn.Parameter(data(4))),
        lambda: flow.stages[0].layers.append(ActNorm(4).double().eval()),
        lambda: setattr(flow, "prior", "logistic"),
        lambda: flow.stages[0].layers.__setitem__(5, affine(4).double()),
    ]

    def want():
        with pyflow.backend("reference"):
            return flow.log_prob(x)

    # the appended ActNorm is the identity
    assert_changes_are_seen(changes, lambda: flow.log_prob(x), want, without_effect=changes[9])
    gc.collect()
    assert gone() is None


def test_modules_in_a_container_that_was_empty_are_seen():
    inner = nn.Sequential()
    flow = fuse([AffineCoupling(nn.Sequential(nn.Linear(2, 8), inner, nn.Linear(8, 4)))]).double()
    x = data(5, 4)
    before = flow(x)[0]
    inner.append(nn.Tanh())
    with programs(1):
        got = flow(x)
    torch.testing.assert_close(got, flow.flow(x))
    assert not got[0].allclose(before)


def test_a_forward_that_is_replaced_in_a_class_is_seen(realnvp, monkeypatch):
    flow, x = realnvp
    before = flow.log_prob(x)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: nn.functional.linear(x, 2 * self.weight, self.bias))
    assert "net.0 (Linear): its method forward has been replaced" in fuse(flow).explain()
    got = flow.log_prob(x)
    with pyflow.backend("reference"):
        torch.testing.assert_close(got, flow.log_prob(x))
    assert not got.allclose(before)
    monkeypatch.undo()
    with programs(1):
        torch.testing.assert_close(flow.log_prob(x), before)


@pytest.mark.parametrize("bound", [torch.tensor([1.0, 2.0]), 0.5], ids=str)
def test_a_bound_that_becomes_a_tensor_is_seen(bound):
    flow, x = NSF(4, layers=2, hidden=(8,)).eval(), torch.randn(16, 4)
    flow.log_prob(x)
    flow.stack.layers[1].bound = bound
    for _ in range(2):
        got = flow.log_prob(x)
        with pyflow.backend("reference"):
            torch.testing.assert_close(got, flow.log_prob(x), rtol=1e-4, atol=1e-4)
        if isinstance(bound, torch.Tensor):
            bound.mul_(1.5)


def test_hooks_of_parameters_run(realnvp):
    flow, x = realnvp
    weight, seen = linear_of(flow).weight, []
    weight.register_hook(lambda grad: seen.append("hook") or 2 * grad)
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append("after"))
    flow.log_prob(x).sum().backward()
    with pyflow.backend("reference"):
        want = torch.autograd.grad(flow.log_prob(x).sum(), weight)[0]
    torch.testing.assert_close(weight.grad, want)
    assert seen[:2] == ["hook", "after"]


def test_hooks_of_the_flow_run_in_log_prob(realnvp):
    flow, x = realnvp
    want, seen = flow.log_prob(x), []
    flow.register_forward_hook(lambda *_: seen.append("forward"))
    with programs(1):
        torch.testing.assert_close(flow.log_prob(x), want)
    assert seen == ["forward"]


def test_global_hooks_run_the_layers(realnvp):
    flow, x = realnvp
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        with programs(0):
            flow.log_prob(x)
    finally:
        handle.remove()
    assert nn.Linear in seen


def test_other_values_of_parameters_are_seen(realnvp):
    flow, x = realnvp
    weight = linear_of(flow).weight
    for change in (
        lambda: weight.data.mul_(2),
        lambda: setattr(weight, "data", weight.data.clone() + 1),
        lambda: weight.detach().numpy().fill(0.25),
        lambda: flow.load_state_dict({k: 1.1 * v for k, v in flow.state_dict().items()}),
    ):
        before = flow.log_prob(x)
        change()
        with programs(1):
            got = flow.log_prob(x)
        with pyflow.backend("reference"):
            torch.testing.assert_close(got, flow.log_prob(x))
        assert not got.equal(before)
