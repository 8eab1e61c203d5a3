"""Whole flows in one call: fused against layer by layer, what is fused, and what must not change by it."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pyflow
from pyflow import _backend
from pyflow.flows import IAF, MAF, NICE, NSF, Glow, RealNVP, fuse
from pyflow.flows.nets import Conditional
from pyflow.nn import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    Invertible1x1Conv,
    ReversibleSequential,
    Scale,
    SplineCoupling,
)

from .peers import assert_changes_are_seen, programs

pytestmark = pytest.mark.skipif(bool(_backend.cpu_missing), reason="programs need compiled kernels")


def net(inputs, outputs, kind=nn.Sequential, activation=nn.ReLU):
    return kind(nn.Linear(inputs, 7), activation(), nn.Linear(7, 6, bias=False), activation(), nn.Linear(6, outputs))


def perturbed(flow, *inputs):
    """The flow in float64, initialised by a batch, with parameters that are not 0."""
    flow = flow.double()
    flow(*inputs)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return flow


def data(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def affine(size, context=0, activation=nn.ReLU, **options):
    """An affine coupling of `size` columns."""
    sizes = (size + 1) // 2, size // 2
    kept, changed = sizes[:: -1 if options.get("swap") else 1]
    kind = Conditional if context else nn.Sequential
    return AffineCoupling(net(kept + context, 2 * changed, kind, activation), **options)


STACKS = {
    "splits": lambda: [
        AdditiveCoupling(net(3, 2)),
        AdditiveCoupling(net(2, 3), swap=True),
        affine(5, split="interleave"),
        affine(5, split="interleave", swap=True),
    ],
    "packings": lambda: [
        ActNorm(4), affine(4, packing="scale_shift"), Scale(4, data_init=True), affine(4, packing="interleaved")
    ],
    "shift_first": lambda: [affine(3, shift_first=True, clamp=1.5, scale_map="tanh"), affine(3, swap=True, scale_map="atan")],
    "convolution": lambda: [Invertible1x1Conv(5), affine(5), Invertible1x1Conv(5), affine(5, swap=True), ActNorm(5)],
    "splines": lambda: [
        SplineCoupling(net(3, 2 * 11), bins=4), SplineCoupling(net(2, 3 * 12), bins=4, tails="circular", swap=True),
        SplineCoupling(net(3, 2 * 13), bins=4, tails=["linear", "circular"], bound=1.5, split="interleave"),
        SplineCoupling(net(3, 2 * 14), bins=5, variant="zuko", bound=5.0),
    ],
    "one_linear": lambda: [AffineCoupling(nn.Linear(2, 4)), AdditiveCoupling(nn.Linear(2, 2), swap=True)],
    "nested": lambda: [
        nn.Sequential(ActNorm(4), ReversibleSequential(affine(4), affine(4, swap=True), recompute=False)),
        AdditiveCoupling(nn.Sequential(nn.Sequential(nn.Linear(2, 5), nn.Dropout(0.0)), nn.Identity(), nn.ELU(0.5), nn.Linear(5, 2))),
    ],
}  # fmt: skip
FLOWS = {
    "nice": (lambda: NICE(6, hidden=(8, 7)), 0),
    "nice_half": (lambda: NICE(7, couplings=3, hidden=(8,), prior="gaussian", split="half", data_init=True), 0),
    "nice_odd": (lambda: NICE(5, couplings=5, hidden=(), context_features=2), 2),
    "realnvp": (lambda: RealNVP(5, couplings=4, hidden=(8, 7)), 0),
    "realnvp_context": (
        lambda: RealNVP(6, couplings=3, hidden=(8,), context_features=3, prior="logistic", scale_map="softplus"), 3,
    ),
    "realnvp_reversible": (lambda: RealNVP(2, couplings=3, hidden=(8,), reversible=True), 0),
    "maf": (lambda: MAF(4, layers=2, hidden=(8, 7)), 0),
    "nsf": (lambda: NSF(3, layers=2, hidden=(8,), bins=4, autoregressive=True), 0),
    "iaf_context": (lambda: IAF(5, layers=2, hidden=(8,), context_features=2), 2),
}  # fmt: skip


@pytest.fixture(params=FLOWS)
def case(request):
    """(flow, x, the arguments after x)."""
    torch.manual_seed(0)
    make, context = FLOWS[request.param]
    flow = make()
    x = data(16, flow.latent_shape[0])
    given = (data(16, context),) if context else ()
    return perturbed(flow, x, *given), x, given


def results(flow, x, given):
    z, logdet = flow(x, *given)
    back = flow.inverse(z.detach().requires_grad_(x.requires_grad), *given)
    kept = [v[:3] for v in given]
    drawn = flow.rsample_and_log_prob(2, *kept, seed=3) if hasattr(flow, "log_prob") else ()
    return flow.log_prob(x, *given) if drawn else logdet, z, logdet, *back, *drawn


def gradients(outputs, inputs):
    loss = sum(
        (each * torch.linspace(0.5, 1.5, each.numel(), dtype=each.dtype).view(each.shape)).sum() for each in outputs
    )
    return torch.autograd.grad(loss, inputs)


def assert_same_as_layers(flow, x, given, count):
    """Results and all gradients, with programs and without."""
    with programs(count):
        got = results(flow, x, given)
    inputs = [x, *given]
    plain = [each.detach() for each in got]
    with pyflow.backend("reference"), programs(0):
        want = results(flow, x, given)
    torch.testing.assert_close(plain, [each.detach() for each in want], rtol=1e-9, atol=1e-9)
    inputs = [each.requires_grad_() for each in (x, *given)] + list(flow.parameters())
    found = gradients(results(flow, x, given), inputs)
    with pyflow.backend("reference"):
        wanted = gradients(results(flow, x, given), inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


def test_flows_by_themselves(case):
    flow, x, given = case
    assert_same_as_layers(flow, x, given, 4)
    with programs(1):
        drawn = flow.sample(2, *(v[:3] for v in given), seed=1)
    with pyflow.backend("reference"):
        torch.testing.assert_close(drawn, flow.sample(2, *(v[:3] for v in given), seed=1))


@pytest.mark.parametrize("name", STACKS)
def test_stacks(name):
    torch.manual_seed(0)
    flow = fuse(STACKS[name]())
    sizes = {"packings": 4, "shift_first": 3, "one_linear": 4, "nested": 4}
    x = data(16, sizes.get(name, 5))
    assert_same_as_layers(perturbed(flow, x), x, (), 2)
    assert flow.explain().count("fused") == 1 and "left" not in flow.explain()


@pytest.mark.parametrize(
    "scale_map", ["exp", "sigmoid", "sigmoid_inv", "softplus", "tanh", "atan", "softsign", "softplus_clamp"]
)
def test_scale_maps(scale_map):
    torch.manual_seed(0)
    flow = fuse(affine(4, scale_map=scale_map, clamp=1.2, eps=1e-2, slope=0.02))
    x = data(8, 4)
    assert_same_as_layers(perturbed(flow, x), x, (), 2)


ACTIVATIONS = [
    nn.ReLU,
    nn.Tanh,
    nn.SiLU,
    nn.GELU,
    nn.Sigmoid,
    nn.Identity,
    lambda: nn.LeakyReLU(0.3),
    lambda: nn.ELU(1.5),
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    torch.manual_seed(0)
    x, context = data(8, 3), data(8, 2)
    flow = perturbed(fuse([affine(3, 2, activation), affine(3, 2, activation, swap=True)]), x, context)
    assert_same_as_layers(flow, x, (context,), 2)


def test_float32_is_close_to_float64(case):
    flow, x, given = case
    want = flow.log_prob(x, *given)
    got = copy.deepcopy(flow).float().log_prob(x.float(), *(v.float() for v in given))
    # about a dozen roundings a layer and column, relative to numbers of about 10
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


def test_empty_batches_and_a_single_row(case):
    flow, x, given = case
    with programs(2):
        empty = flow.log_prob(x[:0].requires_grad_(), *(v[:0] for v in given))
        row = flow.log_prob(x[:1], *(v[:1] for v in given))
    empty.sum().backward()
    assert empty.shape == (0,)
    torch.testing.assert_close(row, flow.log_prob(x, *given)[:1])


def test_the_first_batch_runs_the_layers():
    torch.manual_seed(0)
    x = 3 * data(32, 4) + 1
    for flow in (RealNVP(4, couplings=2, hidden=(8,)).double(), NICE(4, hidden=(8,), data_init=True).double()):
        with programs(1):
            flow.log_prob(x)
            want = flow.log_prob(x)
        torch.testing.assert_close(flow(x)[0].std(0, correction=0), flow(x)[0].new_ones(4) * (1 if flow.prior == "gaussian" else math.pi / math.sqrt(3)))  # fmt: skip
        fresh = type(flow)(4, couplings=len(getattr(flow, "nets", range(2))), hidden=(8,)).double()
        fresh.load_state_dict(flow.state_dict())
        # the flags are set: nothing waits for a batch
        with programs(1):
            assert fresh.log_prob(x).equal(want)


def linear_of(flow):
    return flow.stages[0].layers[3].net[2]


@pytest.fixture
def realnvp():
    torch.manual_seed(0)
    x = data(16, 4)
    return perturbed(RealNVP(4, couplings=3, hidden=(8, 7)), x), x


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


def test_couplings_of_one_column_are_refused():
    flow = fuse([AffineCoupling(nn.Sequential(nn.Linear(0, 8), nn.Linear(8, 2)), swap=True)])
    with pytest.raises(ValueError, match="at least 2 elements along dim 1"):
        flow(torch.randn(3, 1))


def left(flow):
    next(m for m in flow.modules() if isinstance(m, nn.ReLU)).register_forward_hook(lambda *_: None)
    return flow


@pytest.mark.parametrize(
    "make",
    [
        lambda: RealNVP(4, couplings=2, hidden=(8,)),
        lambda: left(RealNVP(4, couplings=2, hidden=(8,))),
        lambda: NICE(4, hidden=(8,)),
        lambda: left(NICE(4, hidden=(8,))),
        lambda: fuse([AffineCoupling(nn.Linear(2, 4))]),
        lambda: fuse(NICE(4, hidden=(8,)), frozen=True),
    ],
)
def test_flows_are_freed_without_the_collector(make):
    gc.collect()
    gc.disable()
    try:
        flow = make().eval()
        gone = weakref.ref(flow), weakref.ref(next(flow.parameters()))
        flow(torch.randn(3, 4))
        flow.inverse(torch.randn(3, 4))
        flow.explain() if hasattr(flow, "explain") else fuse(flow).explain()
        del flow
        assert [each() for each in gone] == [None, None]
    finally:
        gc.enable()


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


def test_shared_and_frozen_parameters(realnvp):
    flow, x = realnvp
    layers = flow.stages[0].layers
    layers[5].net[2].weight = layers[1].net[2].weight
    layers[3].net[0].requires_grad_(False)
    flow.log_prob(x).sum().backward()
    got = [p.grad for p in flow.parameters()]
    flow.zero_grad()
    with pyflow.backend("reference"):
        flow.log_prob(x).sum().backward()
    torch.testing.assert_close(got, [p.grad for p in flow.parameters()])
    assert layers[3].net[0].weight.grad is None and x.grad is None


def test_training_with_fused_adam_and_ema():
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    losses = {}
    for name in ("auto", "reference"):
        torch.manual_seed(1)
        flow = RealNVP(4, couplings=2, hidden=(8,))
        mean = AveragedModel(flow, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        optimizer = torch.optim.Adam(flow.parameters(), 1e-2, fused=True)
        with pyflow.backend(name), programs(5 if name == "auto" else 0):
            for _ in range(5):
                optimizer.zero_grad()
                (-flow.log_prob(x).mean()).backward()
                optimizer.step()
                mean.update_parameters(flow)
            losses[name] = flow.log_prob(x).mean()
        with torch.no_grad(), programs(1):
            got = mean.module.log_prob(x)
        with pyflow.backend("reference"):
            torch.testing.assert_close(got, mean.module.log_prob(x))
    torch.testing.assert_close(losses["auto"], losses["reference"], rtol=1e-4, atol=1e-4)


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


def test_functional_call_and_transforms(realnvp):
    flow, x = realnvp
    flow.eval()
    other = {name: 1.1 * value.detach() for name, value in flow.named_parameters()}
    with programs(1):
        got = torch.func.functional_call(flow, other, (x,))
    with pyflow.backend("reference"):
        torch.testing.assert_close(got, torch.func.functional_call(flow, other, (x,)))
    call = lambda values: torch.func.functional_call(flow, values, (x,))[1].sum()
    with programs(0):
        torch.func.grad(call)(other)
        stacked = torch.func.stack_module_state([flow, copy.deepcopy(flow)])
        each = torch.func.vmap(lambda p, b: torch.func.functional_call(flow, (p, b), (x,))[1])(*stacked)
    torch.testing.assert_close(each, flow(x)[1].expand(2, -1))


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda flow: pickle.loads(pickle.dumps(flow))])
def test_copies(realnvp, copied):
    flow, x = realnvp
    want, names = flow.log_prob(x), list(flow.state_dict())
    other = copied(flow)
    with programs(1):
        assert other.log_prob(x).equal(want)
    assert list(other.state_dict()) == names
    with torch.no_grad():
        linear_of(other).weight.add_(1)
    assert not other.log_prob(x).equal(want)
    assert flow.log_prob(x).equal(want) == (copied is not copy.copy)


def test_modes(realnvp):
    flow, x = realnvp
    want = flow.log_prob(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), programs(1):
            assert flow.log_prob(x).equal(want)
    # in its own dtype under autocast, and layer by layer where the dtypes differ
    flow, x = flow.float(), x.float()
    want = flow.log_prob(x)
    with torch.autocast("cpu", torch.bfloat16), programs(1):
        assert flow.log_prob(x).equal(want)
    with torch.autocast("cpu", torch.bfloat16), programs(0):
        flow(x.bfloat16())
    with pytest.raises(RuntimeError, match="same dtype"), programs(0):
        flow(x.double())


def test_double_backward(realnvp):
    flow, x = realnvp
    found = []
    for name in ("auto", "reference"):
        with pyflow.backend(name):
            grad = torch.autograd.grad(flow.log_prob(x.requires_grad_()).sum(), x, create_graph=True)[0]
            found.append(torch.autograd.grad(grad.square().sum(), list(flow.parameters()), allow_unused=True))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(torch.zeros(()) if got is None else got.sum(), torch.zeros(()) if want is None else want.sum(), check_dtype=False)  # fmt: skip


def test_batched_gradients(realnvp):
    flow, x = realnvp
    rows = torch.eye(16, dtype=x.dtype)
    nats = flow.log_prob(x.requires_grad_())
    inputs = [x, linear_of(flow).weight]
    got = torch.autograd.grad(nats, inputs, rows, is_grads_batched=True, retain_graph=True)
    one_by_one = zip(*(torch.autograd.grad(nats, inputs, row, retain_graph=True) for row in rows), strict=True)
    torch.testing.assert_close(got, tuple(torch.stack(each) for each in one_by_one))


@pytest.mark.parametrize("make", [MAF, IAF, NSF, lambda n: NSF(n, autoregressive=True)])
def test_batched_jacobians(make):
    flow, x = make(4).double().eval(), data(6, 4)
    jacobians = [
        torch.autograd.functional.jacobian(lambda x: flow(x)[0].sum(0), x, vectorize=vectorize)
        for vectorize in (True, False)
    ]
    torch.testing.assert_close(*jacobians)


def test_ddp(tmp_path):
    script = str(Path(__file__).with_name("replicated.py"))
    done = subprocess.run([sys.executable, script, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert "the same gradients" in done.stdout, done.stderr


def test_compiles_to_one_operator(realnvp):
    flow, x = realnvp
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compiled = torch.compile(flow.log_prob, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), flow.log_prob(x))
    op = torch.ops.pyflow.flow_program.default
    assert [target for target in graphs[0] if target is op] == [op] and len(graphs[0]) == 2
    # what replaces a module is seen
    linear_of(flow).weight.data.mul_(2)
    flow.stages[0].layers[3].net[0] = nn.Linear(2, 8).double()
    flow.stages[0].layers[1].net[1] = nn.Tanh()
    flow.stages[0].layers[1].options["clamp"] = 1.0
    torch.testing.assert_close(compiled(x), flow.log_prob(x))
    # and what is appended
    flow.stages[0].layers.append(copy.deepcopy(flow.stages[0].layers[1]))
    flow.stages[0].layers[1].net.append(nn.Tanh())
    torch.testing.assert_close(compiled(x), flow.log_prob(x))


def test_export_keeps_the_layers(realnvp):
    flow, x = realnvp
    program = torch.export.export(flow.eval(), (x,))
    assert "flow_program" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), flow(x))


def test_frozen(case):
    flow, x, given = case
    want = flow.log_prob(x, *given).detach()
    frozen = fuse(flow, frozen=True)
    for fused in (frozen, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        for _ in range(2):
            with programs(1):
                assert fused.log_prob(x, *given).equal(want)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(1)
    assert frozen.log_prob(x, *given).equal(want) and not flow.log_prob(x, *given).equal(want)
    x.requires_grad_()
    assert torch.autograd.grad(frozen.log_prob(x, *given).sum(), x)[0].shape == x.shape
    kept = [v[:3] for v in given]
    assert frozen.sample(2, *kept, seed=0).isfinite().all()
    single = frozen.float().log_prob(x.float(), *(v.float() for v in given))
    torch.testing.assert_close(single.double(), want, rtol=1e-4, atol=1e-4)


def test_frozen_stacks():
    torch.manual_seed(0)
    x = data(8, 5)
    stack = perturbed(ReversibleSequential(*STACKS["convolution"]()), x)
    frozen = fuse(stack, frozen=True)
    with torch.inference_mode(), programs(2):
        y, logdet = frozen(x)
        torch.testing.assert_close(frozen.inverse(y)[0], x)
    got = frozen(x.requires_grad_())
    got[0].sum().backward()
    torch.testing.assert_close((y, logdet), tuple(each.detach() for each in stack(x)))


def test_state_dicts_both_ways(realnvp):
    flow, x = realnvp
    fused = fuse(flow)
    assert list(fused.state_dict()) == [f"flow.{name}" for name in flow.state_dict()]
    assert [*fused.parameters()] == [*flow.parameters()]
    other = fuse(RealNVP(4, couplings=3, hidden=(8, 7)).double())
    other.load_state_dict(fused.state_dict())
    assert other.log_prob(x).equal(flow.log_prob(x))
    plain = RealNVP(4, couplings=3, hidden=(8, 7)).double()
    plain.load_state_dict({name.removeprefix("flow."): value for name, value in other.state_dict().items()})
    assert plain.log_prob(x).equal(flow.log_prob(x))
    assert fused.prior == "gaussian" and "RealNVP" in str(fused) and not hasattr(fuse(ActNorm(2)), "log_prob")


def test_explain():
    layers = [SplineCoupling(nn.Linear(1, 9), bins=3, tails=None), SplineCoupling(nn.Linear(1, 98), bins=33)]
    assert fuse(layers).explain().splitlines() == [
        "flow.layers.0 (SplineCoupling): left, without tails an x outside of the domain is an error",
        "flow.layers.1 (SplineCoupling): left, its 33 bins are more than 32",
    ]
    assert fuse(NICE(4, couplings=2, hidden=(8,))).explain() == "the flow: fused, 1 NICE as 2 Net, 2 Additive, 1 Scale"
    flow = NICE(4, couplings=2, hidden=(8,))
    flow.nets[1][1] = nn.Softplus()
    assert fuse(flow).explain() == "the flow (NICE): left, nets.1.1 (Softplus): its class has no instruction"
    for module, reason in ((nn.LeakyReLU(-0.1), "its negative_slope is -0.1"), (nn.ELU(-1.0), "its alpha is -1.0")):
        flow.nets[1][1] = module
        assert reason in fuse(flow).explain()
    assert "it is a flow of images" in fuse(RealNVP((1, 4, 4))).explain()
    assert fuse(Glow((1, 8, 8))).explain() == "the flow (Glow): left, its class has no instruction"
    assert fuse(MAF(3, layers=1)).explain().endswith("1 ActNorm, 1 MaskedAutoregressive as 1 Scale, 1 Net, 1 Affine")
    assert fuse(IAF(3, layers=1, context_features=2)).explain().endswith("1 _Inverted as 1 Autoregressive")
    flow = RealNVP(4, couplings=2, hidden=(8,), reversible=True)
    flow.stages[0].layers[1].net[1] = nn.Softplus()
    assert "recomputes, so it is fused whole or not at all" in fuse(flow).explain()
    lines = fuse([AffineCoupling(nn.ReLU()), AffineCoupling(nn.Sequential(), split="checkerboard")]).explain()
    assert "flow.layers.0.net (ReLU): it has no linear layer" in lines and "split 'checkerboard' is for images" in lines
    with pyflow.backend("reference"):
        assert fuse(NICE(4)).explain().startswith("on cpu with pyflow.backend 'reference' no program runs")
    with pytest.raises(TypeError, match="fuse: flow must be a module with an inverse or a list of them, got Linear"):
        fuse(nn.Linear(2, 2))


class Own(SplineCoupling):
    """A class that has no rule."""


def test_layers_between_the_fused():
    torch.manual_seed(0)
    x = data(16, 4)
    spline = Own(net(2, 2 * 11), bins=4)
    flow = perturbed(fuse([ActNorm(4), affine(4), spline, ActNorm(4), affine(4, swap=True), ActNorm(4)]), x)
    with programs(4):
        y, logdet = flow(x)
        back = flow.inverse(y)
    with pyflow.backend("reference"):
        torch.testing.assert_close((y, logdet), flow(x))
    torch.testing.assert_close(back, (x, -logdet))


def texts(call):
    with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize(
    "make", [lambda: NICE(4, hidden=(8,)), lambda: RealNVP(4, couplings=2, hidden=(8,), context_features=2)]
)
def test_wrong_arguments_have_the_texts_of_the_layers(make):
    flow = make().eval()
    wanted = flow.context_features
    x, context = torch.randn(8, 4), torch.randn(8, 2)
    calls = [
        lambda f: f.log_prob(x[:, :3]), lambda f: f(x[0]), lambda f: f.inverse(x[:, :3]), lambda f: f.inverse(x[0]),
        lambda f: f.log_prob(x.long()), lambda f: f(None), lambda f: f.inverse([x]), lambda f: f.log_prob(x.to_sparse()),
        lambda f: f.log_prob(x, context[:, :1]), lambda f: f.log_prob(x, context[:3]), lambda f: f.log_prob(x, "context"),
        lambda f: f.log_prob(x.double(), *[context.double()] * (wanted > 0)), lambda f: f.inverse(x, None if wanted else context),
    ]  # fmt: skip
    for call in calls:
        got = texts(lambda: call(flow))
        with pyflow.backend("reference"):
            assert got == texts(lambda: call(flow))
        assert got == texts(lambda: call(fuse(flow)))


def test_wrong_arguments_of_a_stack():
    flow = fuse([ActNorm(4), affine(4), affine(4, swap=True)]).eval()
    x = torch.randn(8, 4)
    for call in (lambda f: f(x[:, :3]), lambda f: f(torch.randn(8, 6)), lambda f: f(x, x), lambda f: f(x.long())):
        assert texts(lambda: call(flow)) == texts(lambda: call(flow.flow))
    masked = flow(x, mask=torch.ones(8, 1, dtype=torch.bool))
    assert masked[0].equal(x)
