"""Whole flows in one call: fused against layer by layer, and what must not change by it."""

from __future__ import annotations

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
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pyflow
from pyflow import _backend
from pyflow.flows import IAF, MAF, NICE, NSF, Glow, RealNVP, fuse
from pyflow.nn import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    Invertible1x1Conv,
    ReversibleSequential,
    Scale,
    SplineCoupling,
)

from .ours import affine, assert_same_as_layers, data, linear_of, net, perturbed
from .peers import programs

pytestmark = pytest.mark.skipif(bool(_backend.cpu_missing), reason="programs need compiled kernels")

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
    text = "^RealNVP: x must have the dtype of the parameters, float32, got float64$"
    with pytest.raises(TypeError, match=text), programs(0):
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
