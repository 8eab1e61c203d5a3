"""Flows of nflows as programs: fused against the flow itself."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import pyflow
from pyflow import _backend
from pyflow.flows import fuse
from pyflow.flows.lower import nflows as nflows_rules

from .peers import assert_changes_are_seen, assert_float32_as_exact_as, assert_same, data, programs, randomised, texts

nflows = pytest.importorskip("nflows")
from nflows import distributions, flows, transforms
from nflows.nn import nets
from nflows.utils import create_alternating_binary_mask

pytestmark = [
    pytest.mark.skipif(bool(_backend.cpu_missing), reason="programs need compiled kernels"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*deprecated"),
]
MASK = [1, -1, 1, 1, -1]
T = transforms


def res(context=None, **options):
    options = {"num_blocks": 2, "hidden_features": 8, **options}
    return lambda inputs, outputs: nets.ResidualNet(inputs, outputs, context_features=context, **options)


def spline(net, **options):
    return T.PiecewiseRationalQuadraticCouplingTransform(
        MASK, net, num_bins=4, tail_bound=2.0, tails="linear", **options
    )


def maf(context, **options):
    return T.MaskedAffineAutoregressiveTransform(5, 12, context_features=context, **options)


LAYERS = {
    "affine": lambda c: [T.AffineCouplingTransform(MASK, res(c))],
    "additive": lambda c: [T.AdditiveCouplingTransform(MASK, res(c, activation=torch.tanh))],
    "batch_norm": lambda c: [T.AffineCouplingTransform(MASK, res(c, activation=F.elu, use_batch_norm=True)), T.BatchNorm(5)],
    "dropout": lambda c: [T.AffineCouplingTransform(MASK, res(c, activation=nn.SiLU(), dropout_probability=0.5))],
    "spline": lambda c: [spline(res(c))],
    "unconditional": lambda c: [spline(res(c), apply_unconditional_transform=True)],
    "maf": lambda c: [maf(c, activation=torch.tanh), T.RandomPermutation(5)],
    "maf_feedforward": lambda c: [maf(c, use_residual_blocks=False, activation=F.leaky_relu)],
    "maf_random": lambda c: [maf(c, use_residual_blocks=False, random_mask=True), T.ReversePermutation(5)],
    "maf_batch_norm": lambda c: [maf(c, use_batch_norm=True)],
    "maf_spline": lambda c: [
        T.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
            5, 12, context_features=c, num_bins=4, tails="linear", tail_bound=2.0
        )
    ],
    "linear": lambda c: [
        T.AffineCouplingTransform(MASK, res(c)), T.LULinear(5, identity_init=False), T.SVDLinear(5, 4), T.QRLinear(5, 3),
        T.NaiveLinear(5),
    ],
    "elementwise": lambda c: [
        T.PointwiseAffineTransform(torch.randn(5), torch.rand(5) + 0.5), T.AffineCouplingTransform(MASK, res(c)),
        T.AffineScalarTransform(0.3, 2.0), T.ActNorm(5), T.IdentityTransform(),
    ],
    "nested": lambda c: [
        T.InverseTransform(T.CompositeTransform([
            spline(res(c), apply_unconditional_transform=True), T.LULinear(5, identity_init=False), T.RandomPermutation(5),
            T.InverseTransform(T.AffineCouplingTransform(MASK, res(c))), T.BatchNorm(5),
        ])),
        T.CompositeTransform([T.Permutation(torch.tensor([3, 0, 1, 4, 2])), T.AdditiveCouplingTransform(MASK, res(c))]),
    ],
}  # fmt: skip


def flow_of(layers, base=None):
    return flows.Flow(T.CompositeTransform(layers), base or distributions.StandardNormal([5]))


def made(name, context=None, **more):
    torch.manual_seed(1)
    return randomised(flow_of(LAYERS[name](context)), **more)


@pytest.mark.parametrize("context", [None, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, context, double):
    flow = made(name, context)
    fused, x = fuse(flow), data(16, 5).requires_grad_()
    given = () if context is None else (data(16, context, seed=1).requires_grad_(),)
    few, inputs = [each[:3] for each in given], [x, *given, *flow.parameters()]
    assert_same(lambda: fused.log_prob(x, *given), lambda: flow.log_prob(x, *given), inputs)
    assert_same(lambda: fused.transform_to_noise(x, *given), lambda: flow.transform_to_noise(x, *given), inputs)
    if name == "linear":
        # torch has removed what nflows' NaiveLinear solves by
        y, logdet = flow._transform(x, *given)
        with programs(1):
            back = fuse(flow._transform).inverse(y, *given)
        torch.testing.assert_close(back, (x, -logdet))
        return
    assert_same(lambda: fused.sample(2, *few), lambda: flow.sample(2, *few), inputs[1:])
    assert_same(lambda: fused.sample_and_log_prob(2, *few), lambda: flow.sample_and_log_prob(2, *few), inputs[1:])
    layers = fuse(flow._transform)
    assert_same(lambda: layers(x, *given), lambda: flow._transform(x, *given), inputs)
    named = {"context": given[0] if given else None}
    assert_same(lambda: layers.inverse(x, **named), lambda: flow._transform.inverse(x, **named), inputs)


def test_draws_share_a_context(double):
    flow, c = made("nested", 3), data(3, 3, seed=1).requires_grad_()
    with programs(1) as seen:
        fuse(flow).sample(20, c)
    assert seen.rows == [(60, 3)]
    with programs(1) as seen:
        fuse(flow).sample_and_log_prob(20, c[:1])
    assert seen.rows == [(20, 1)]
    # layers that are left see every row's
    torch.manual_seed(1)
    middle = T.AffineCouplingTransform(MASK, res(3))
    middle.register_forward_hook(lambda *_: None)
    flow = randomised(flow_of([*LAYERS["nested"](3), middle, *LAYERS["affine"](3)]))
    inputs = [c, *flow.parameters()]
    assert_same(lambda: fuse(flow).sample_and_log_prob(4, c), lambda: flow.sample_and_log_prob(4, c), inputs, 2)


@pytest.mark.parametrize("name", ["affine", "unconditional", "maf", "maf_spline", "linear"])
def test_float32(name):
    flow = made(name, spread=0.1)
    assert_float32_as_exact_as("log_prob", flow, fuse(flow), data(256, 5))


def sbi_nsf(context, layers=3):
    """As sbi's build_nsf."""
    stack = [T.PointwiseAffineTransform(torch.randn(4), torch.rand(4) + 0.5)]
    for i in range(layers):
        mask = create_alternating_binary_mask(features=4, even=(i % 2 == 0))
        net = res(context, hidden_features=10, activation=torch.relu)
        stack += [
            T.PiecewiseRationalQuadraticCouplingTransform(mask, net, num_bins=10, tails="linear", tail_bound=3.0),
            T.LULinear(4, identity_init=True),
        ]
    embedding = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, context))
    return flows.Flow(T.CompositeTransform(stack), distributions.StandardNormal((4,)), embedding)


def sbi_maf(context, layers=3):
    """As sbi's build_maf."""
    stack = [T.PointwiseAffineTransform(torch.tensor(0.2), torch.tensor(1.5))]
    for _ in range(layers):
        made = T.MaskedAffineAutoregressiveTransform(
            4, 10, context_features=context, num_blocks=2, use_residual_blocks=False, activation=torch.tanh
        )
        stack += [made, T.RandomPermutation(4)]
    return flows.Flow(T.CompositeTransform(stack), distributions.StandardNormal((4,)), nn.Linear(6, context))


def dingo_nsf(context):
    """As dingo's create_nsf_model: linear layers between spline couplings, and one at the end."""
    linear = lambda: T.CompositeTransform([T.RandomPermutation(4), T.LULinear(4, identity_init=True)])
    steps = [T.CompositeTransform([linear(), T.PiecewiseRationalQuadraticCouplingTransform(
        create_alternating_binary_mask(4, even=i % 2 == 0), res(context, activation=F.elu, use_batch_norm=True), num_bins=8,
        tails="linear", tail_bound=1.0)]) for i in range(2)]  # fmt: skip
    transform = T.CompositeTransform([*steps, linear()])
    return flows.Flow(transform, distributions.StandardNormal((4,)), nn.Linear(6, context))


@pytest.mark.parametrize("make", [sbi_nsf, sbi_maf, dingo_nsf])
def test_as_their_builders_make_them(make):
    torch.manual_seed(1)
    flow = randomised(make(3), 0.1)
    fused = fuse(flow)
    x, y = data(16, 4).requires_grad_(), data(16, 6, seed=1).requires_grad_()
    assert "left, " not in fused.explain() and "_distribution: fused" in fused.explain()
    assert_same(lambda: fused.log_prob(x, y), lambda: flow.log_prob(x, y), [x, y, *flow.parameters()])
    assert fused._embedding_net is flow._embedding_net and [*fused.parameters()] == [*flow.parameters()]
    assert list(fused.state_dict()) == [f"flow.{name}" for name in flow.state_dict()]
    for other in (fuse(flow, frozen=True), copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        with programs(1):
            torch.testing.assert_close(other.log_prob(x, y), flow.log_prob(x, y))


def context_spline_map(inputs, outputs):
    """sbi's: parameters of a spline of one column, from the context alone; one layer twice."""
    flow = pytest.importorskip("sbi.neural_nets.net_builders.flow")
    return flow.ContextSplineMap(inputs, outputs, 8, 3, 2)


class MyResidualBlock(nn.Module):
    """As dingo's."""

    __module__ = "dingo.core.nn.resnet"

    def __init__(self, context):
        super().__init__()
        self.activation, self.norm, self.dropout = F.elu, "LayerNorm", nn.Dropout(0.1)
        self.layer_norm_layers = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.linear_layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        if context:
            self.context_layer = nn.Linear(context, 8)

    def forward(self, inputs, context=None):
        h = inputs
        for norm, linear in zip(self.layer_norm_layers, self.linear_layers, strict=True):
            h = linear(self.dropout(self.activation(norm(h))))
        return inputs + (h if context is None else F.glu(torch.cat((h, self.context_layer(context)), -1), -1))


class DenseResidualNet(nn.Module):
    """As dingo's: the context only gates its blocks."""

    __module__ = "dingo.core.nn.resnet"

    def __init__(self, inputs, outputs, context):
        super().__init__()
        self.hidden_features, self.initial_layer = 8, nn.Linear(inputs, 8)
        self.blocks = nn.ModuleList(MyResidualBlock(context) for _ in range(2))
        self.resize_layers = nn.ModuleList([nn.Identity(), nn.Linear(8, outputs)])

    def forward(self, x, context=None):
        x = self.initial_layer(x)
        for block, resize in zip(self.blocks, self.resize_layers, strict=True):
            x = resize(block(x, context=context))
        return x


@pytest.mark.parametrize("net, columns, context", [
    (context_spline_map, 1, 3), (lambda i, o: DenseResidualNet(i, o, 3), 4, 3),
    (lambda i, o: DenseResidualNet(i, o, 0), 4, 0),
])  # fmt: skip
def test_networks_of_sbi_and_dingo(net, columns, context):
    torch.manual_seed(1)
    layer = randomised(T.PiecewiseRationalQuadraticCouplingTransform([1, -1, 1, -1][:columns], net, 4, "linear", 2.0))
    fused, x = fuse(layer), data(16, columns).requires_grad_()
    given = (data(16, context, seed=1).requires_grad_(),) if context else ()
    inputs = [x, *given, *layer.parameters()]
    assert_same(lambda: fused(x, *given), lambda: layer(x, *given), inputs)
    assert_same(lambda: fused.inverse(x, *given), lambda: layer.inverse(x, *given), inputs)


def test_glasflow():
    glasflow = pytest.importorskip("glasflow")
    torch.manual_seed(1)
    for scales in ("nflows", "nflows_general", "log2"):
        flow = randomised(
            glasflow.RealNVP(4, 2, n_conditional_inputs=3, linear_transform="lu", scale_activation=scales)
        )
        fused, x, c = fuse(flow), data(16, 4).requires_grad_(), data(16, 3, seed=1).requires_grad_()
        inputs = [x, c, *flow.parameters()]
        for call in (lambda f: f.log_prob(x, c), lambda f: f(x, c), lambda f: f.inverse(x, conditional=c)):
            assert_same(lambda c=call, f=fused: c(f), lambda c=call, f=flow: c(f), inputs)


def test_a_conditional_base_gets_no_context_from_glasflow():
    glasflow = pytest.importorskip("glasflow")
    base = glasflow.nflows.distributions.ConditionalDiagonalNormal([4], nn.Linear(3, 8))
    flow = randomised(glasflow.RealNVP(4, 2, n_conditional_inputs=3, distribution=base))
    fused, x, c = fuse(flow), data(16, 4), data(16, 3)
    assert "_distribution (ConditionalDiagonalNormal): left, its flow gives it no context" in fused.explain()
    assert texts(lambda: fused.log_prob(x, c)) == texts(lambda: flow.log_prob(x, c))


@pytest.mark.parametrize("context", [None, 3])
def test_the_uniform_base_of_glasflow(context, double):
    glasflow = pytest.importorskip("glasflow")
    torch.manual_seed(1)
    # splines on [0, 1], outside of which is an error
    flow = randomised(glasflow.CouplingNSF(4, 2, n_conditional_inputs=context, distribution="uniform"))
    fused, x = fuse(flow), data(16, 4).sigmoid().requires_grad_()
    given = [data(16, context, seed=1).requires_grad_()] if context else []
    assert "flow._distribution: fused, 1 MultivariateUniform in log_prob" in fused.explain()
    assert_same(lambda: fused.log_prob(x, *given), lambda: flow.log_prob(x, *given), [x, *given, *flow.parameters()])
    assert_same(lambda: fused.sample(16, *given), lambda: flow.sample(16, *given), [*flow.parameters()])
    outside = torch.cat((x.detach()[1:], -x.detach()[:1]))
    assert texts(lambda: fused.log_prob(outside, *given)) == texts(lambda: flow.log_prob(outside, *given))
    # without splines
    wide = randomised(flow_of([T.AffineCouplingTransform(MASK, res(context))], box(glasflow, -1.5, 2.0)))
    fused, x = fuse(wide), 0.5 * data(64, 5)
    if context:
        assert texts(lambda: fused.log_prob(x, data(64, 3))) == texts(lambda: wide.log_prob(x, data(64, 3)))
        return
    x[:, 0] = torch.linspace(-1.5, 2.0, 64)
    with programs(1):
        got = fused.log_prob(x)
    torch.testing.assert_close(got, wide.log_prob(x))
    assert 1 < got.isfinite().sum() < 64


def box(glasflow, low, high):
    return glasflow.distributions.MultivariateUniform(torch.full((5,), low), torch.full((5,), high))


@pytest.mark.parametrize("flow", [
    lambda: flows.SimpleRealNVP(4, 8, 2, 2, batch_norm_between_layers=True),
    lambda: flows.MaskedAutoregressiveFlow(4, 8, 2, 1),
])  # fmt: skip
def test_their_own_flows(flow):
    torch.manual_seed(1)
    flow, x = randomised(flow()), data(8, 4).requires_grad_()
    assert_same(lambda: fuse(flow).log_prob(x), lambda: flow.log_prob(x), [x, *flow.parameters()])


@pytest.mark.parametrize("encoder", [nn.Linear(3, 10), nets.MLP((3,), (10,), [7, 6], activation=torch.tanh)])
def test_conditional_base(encoder, double):
    torch.manual_seed(1)
    base = distributions.ConditionalDiagonalNormal([5], encoder)
    flow = randomised(flow_of([T.AffineCouplingTransform(MASK, res(3))], base))
    fused, x, c = fuse(flow), data(16, 5).requires_grad_(), data(16, 3, seed=1).requires_grad_()
    assert_same(lambda: fused.log_prob(x, c), lambda: flow.log_prob(x, c), [x, c, *flow.parameters()])
    assert_same(lambda: fused.sample(2, c), lambda: flow.sample(2, c), [c, *flow.parameters()])


@pytest.mark.parametrize("context", [None, 3])
def test_a_base_with_trained_numbers(context):
    torch.manual_seed(1)
    flow = randomised(flow_of([T.AffineCouplingTransform(MASK, res(context))], distributions.DiagonalNormal([5])))
    fused, x = fuse(flow), data(16, 5).requires_grad_()
    given = [data(16, context, seed=1).requires_grad_()] if context else []
    assert "flow._distribution: fused, 1 DiagonalNormal in log_prob" in fused.explain()
    assert_same(lambda: fused.log_prob(x, *given), lambda: flow.log_prob(x, *given), [x, *given, *flow.parameters()])
    # nflows has no samples of it
    assert texts(lambda: fused.sample(2)) == texts(lambda: flow.sample(2))
    base = flow._distribution
    changes = [lambda: base.mean_.data.add_(1), lambda: base.log_std_.data.sub_(0.5)]
    assert_changes_are_seen(changes, lambda: fused.log_prob(x, *given), lambda: flow.log_prob(x, *given))


class Narrow(distributions.DiagonalNormal):
    def _log_prob(self, inputs, context):
        return super()._log_prob(2 * inputs, context)


def test_bases_without_instruction():
    torch.manual_seed(1)
    flow = randomised(flow_of([T.AffineCouplingTransform(MASK, res())], Narrow([5])))
    x = data(8, 5).requires_grad_()
    assert "flow._distribution (Narrow): left, its class has no instruction" in fuse(flow).explain()
    assert_same(lambda: fuse(flow).log_prob(x), lambda: flow.log_prob(x), [x, *flow.parameters()])


@pytest.fixture
def double():
    """What nflows draws is float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def net(flow):
    return flow._transform._transforms[2].transform_net


def hook(flow):
    net(flow).blocks[0].linear_layers[0].register_forward_hook(lambda module, args, output: 2 * output)


def own_forward(flow):
    net(flow).blocks[1].forward = lambda x, context=None: x + 1


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrization(flow):
    parametrize.register_parametrization(net(flow).final_layer, "weight", Twice())


class Shifted(nets.ResidualNet):
    def forward(self, inputs, context=None):
        return super().forward(inputs, context) + 1


def subclass(flow):
    flow._transform._transforms[2].transform_net = Shifted(2, 6, 8).double()


def unknown_activation(flow):
    net(flow).blocks[0].activation = F.softplus


def unknown_module(flow):
    net(flow).blocks[0].activation = nn.Softplus()


def in_place(flow):
    net(flow).blocks[0].activation = nn.ReLU(inplace=True)


def own_method(flow):
    layer = flow._transform._transforms[2]
    count = layer.num_transform_features
    layer._scale_and_shift = lambda params: (params[:, count:].exp(), params[:, :count])


def own_density(flow):
    own = flow._distribution._log_prob
    flow._distribution._log_prob = lambda inputs, context: 2 * own(inputs, context)


def dropping(flow):
    net(flow).blocks[0].dropout.p = 0.5
    flow.train()


def cached(flow):
    flow._transform._transforms[1].use_cache()


def training(flow):
    flow._transform._transforms[0].train()


PLACE = "flow._transform._transforms"
CHANGES = {
    hook: f"{PLACE}.2.transform_net.blocks.0.linear_layers.0 (Linear): it has hooks",
    own_forward: f"{PLACE}.2.transform_net.blocks.1 (ResidualBlock): it has its own forward",
    parametrization: f"{PLACE}.2.transform_net.final_layer (ParametrizedLinear): it has parametrizations",
    subclass: f"{PLACE}.2.transform_net (Shifted): its class has no instruction",
    unknown_activation: f"{PLACE}.2.transform_net.blocks.0 (ResidualBlock): its activation softplus has no instruction",
    unknown_module: f"{PLACE}.2.transform_net.blocks.0.activation (Softplus): its class has no instruction",
    in_place: f"{PLACE}.2.transform_net.blocks.0.activation (ReLU): it changes the input of its network or block in place",
    own_method: f"{PLACE}.2 (AffineCouplingTransform): left, it has its own _scale_and_shift",
    own_density: "flow._distribution (StandardNormal): left, it has its own _log_prob",
    dropping: f"{PLACE}.2.transform_net.blocks.0.dropout (Dropout): it drops with p=0.5",
    cached: f"{PLACE}.1 (LULinear): left, it keeps its weight in a cache",
    training: f"{PLACE}.0 (BatchNorm): left, it normalises by the batch",
}


@pytest.fixture
def flow():
    torch.manual_seed(1)
    layers = [
        T.BatchNorm(5),
        T.LULinear(5),
        T.AffineCouplingTransform(MASK, res()),
        T.AffineCouplingTransform(MASK, res()),
    ]
    return randomised(flow_of(layers))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_layer_is_left_and_named(flow, change):
    fused, x = fuse(flow), data(16, 5).requires_grad_()
    fused.log_prob(x)
    change(flow)
    assert CHANGES[change] in fused.explain()
    # the graph of a cached weight is gone after one backward
    inputs = [x] if change is cached else [x, *flow.parameters()]
    flow.requires_grad_(change is not cached)
    assert_same(lambda: fused.log_prob(x), lambda: flow.log_prob(x), inputs)


def test_changes_are_seen():
    torch.manual_seed(1)
    flow = randomised(flow_of([
        T.RandomPermutation(5), maf(None), spline(res(use_batch_norm=True)), T.PointwiseAffineTransform(0.5, 2.0)
    ]))  # fmt: skip
    fused, x = fuse(flow), data(16, 5)
    permutation, made, coupling, pointwise = flow._transform._transforms
    block = coupling.transform_net.blocks[0]
    changes = [
        lambda: permutation._permutation.copy_(torch.tensor([4, 3, 2, 1, 0])),
        lambda: setattr(permutation, "_permutation", torch.tensor([1, 0, 2, 3, 4])),
        lambda: made.autoregressive_net.initial_layer.mask.data.zero_(),
        lambda: setattr(made, "_epsilon", 0.1),
        lambda: setattr(coupling, "tail_bound", 1.5),
        lambda: setattr(coupling, "min_derivative", 0.05),
        lambda: setattr(coupling.transform_net, "hidden_features", 2),
        lambda: setattr(block, "activation", torch.tanh),
        lambda: block.batch_norm_layers[0].running_mean.data.add_(1),
        lambda: setattr(block.batch_norm_layers[1], "eps", 0.5),
        lambda: pointwise._scale.data.mul_(2),
        lambda: coupling.transform_features.copy_(coupling.transform_features.flip(0)),
        lambda: setattr(coupling, "tail_bound", torch.tensor(0.5)),
        lambda: coupling.tail_bound.fill_(2.5),
    ]
    assert_changes_are_seen(changes, lambda: fused.log_prob(x), lambda: flow.log_prob(x))


def test_blocks_of_a_network_that_had_none_are_seen():
    flow, x = randomised(flow_of([T.AffineCouplingTransform(MASK, res(num_blocks=0))])), data(16, 5)
    fused = fuse(flow)
    fused.log_prob(x)
    net, other = flow._transform._transforms[0].transform_net, res()(2, 2)
    other = randomised(other)
    change = lambda: net.blocks.append(other.blocks[0])
    assert_changes_are_seen([change], lambda: fused.log_prob(x), lambda: flow.log_prob(x))


@torch.inference_mode()
def test_what_is_written_into_inference_tensors_is_seen():
    flow, x = randomised(flow_of([T.RandomPermutation(5), T.AffineCouplingTransform(MASK, res())])), data(16, 5)
    fused, order = fuse(flow), flow._transform._transforms[0]._permutation
    assert order.is_inference()
    change = lambda: order.copy_(order.roll(1))
    assert_changes_are_seen([change], lambda: fused.log_prob(x), lambda: flow.log_prob(x))


def test_the_constant_of_the_base_is_read():
    flow, x = made("linear"), data(16, 5)
    fused = fuse(flow)
    fused.log_prob(x)
    flow._distribution._log_z.add_(1.0)
    assert "flow._distribution (StandardNormal): left, its _log_z is not that of its shape" in fused.explain()
    torch.testing.assert_close(fused.log_prob(x), flow.log_prob(x))


@torch.no_grad()
@pytest.mark.parametrize("kind", [T.LULinear, lambda n: T.QRLinear(n, 4), T.SVDLinear], ids=["lu", "qr", "svd"])
def test_inverses_of_matrices_are_as_exact_as_theirs(kind):
    torch.manual_seed(0)
    # condition numbers up to 1e10
    layer = kind(*((32, 4) if kind is T.SVDLinear else (32,)))
    for parameter in layer.parameters():
        parameter.add_(torch.randn_like(parameter))
    flow = T.CompositeTransform([layer, T.AffineCouplingTransform(torch.tensor([1.0, -1.0] * 16), res())]).eval()
    z = torch.randn(64, 32)
    exact, own = copy.deepcopy(flow).double().inverse(z.double())[0], flow.inverse(z)[0]
    with programs(1):
        got = fuse(flow).inverse(z)[0]
    assert (got - exact).norm() <= 4 * (own - exact).norm() + 1e-6 * exact.norm()


def test_weights_that_are_not_used_have_no_gradient():
    flow, x = randomised(flow_of([maf(3)])), data(16, 5)
    fused = fuse(flow)
    with programs(1):
        nats = fused.log_prob(x)
    nats.sum().backward()
    without = {name for name, parameter in flow.named_parameters() if parameter.grad is None}
    flow.zero_grad()
    flow.log_prob(x).sum().backward()
    assert without == {name for name, parameter in flow.named_parameters() if parameter.grad is None} != set()


def test_masks_in_another_order():
    flow, other = (randomised(flow_of([maf(None, use_residual_blocks=False, random_mask=True)])) for _ in range(2))
    fused, x = fuse(flow._transform), data(8, 5)
    before = fused.inverse(x)[0]
    masks = {name: value for name, value in other.state_dict().items() if name.endswith(("mask", "degrees"))}
    flow.load_state_dict(masks, strict=False)
    with programs(1):
        got = fused.inverse(x)
    torch.testing.assert_close(got, flow._transform.inverse(x))
    assert not got[0].allclose(before)


def test_the_same_values_of_a_permutation_are_no_change():
    flow, x = made("nested"), data(8, 5)
    fused = fuse(flow)
    want, structure = fused.log_prob(x), fused._fuser.structure
    for name, buffer in flow.named_buffers():
        if name.endswith("_permutation"):
            buffer.copy_(buffer.clone())
    assert fused.log_prob(x).equal(want) and fused._fuser.structure is structure
    flow.load_state_dict(flow.state_dict())
    assert fused.log_prob(x).equal(want) and fused._fuser.structure is structure


def test_training_and_evaluation_take_turns():
    flow, x = made("dropout"), data(8, 5)
    fused, found = fuse(flow), []
    for training in [True, False] * 3:
        fused.train(training)
        torch.manual_seed(0)
        got = fused.log_prob(x)
        torch.manual_seed(0)
        torch.testing.assert_close(got, flow.log_prob(x))
        found.append(fused._fuser.structure)
    assert len(set(found)) == 2 and found[:2] * 3 == found
    # what was replaced is not kept
    old = weakref.ref(flow._transform._transforms[0])
    flow._transform._transforms[0] = LAYERS["affine"](None)[0].double()
    del found
    fused.log_prob(x)
    gc.collect()
    assert old() is None


def test_a_pending_act_norm_runs():
    torch.manual_seed(1)
    flow = flow_of([T.ActNorm(5), T.AffineCouplingTransform(MASK, res())]).double().train()
    fused, x = fuse(flow), 3 * data(16, 5) + 1
    with programs(0):
        fused.log_prob(x)
    assert flow._transform._transforms[0].initialized
    with programs(1):
        torch.testing.assert_close(fused.log_prob(x), flow.log_prob(x))


def test_splines_on_the_unit_interval():
    torch.manual_seed(1)
    layers = T.CompositeTransform([
        T.PiecewiseRationalQuadraticCouplingTransform(mask, res(), num_bins=4, apply_unconditional_transform=True)
        for mask in (MASK, [-v for v in MASK])
    ])  # fmt: skip
    layers = randomised(layers)
    fused, x = fuse(layers), torch.rand(16, 5, dtype=torch.float64).requires_grad_()
    assert_same(lambda: fused(x), lambda: layers(x), [x, *layers.parameters()])
    assert_same(lambda: fused.inverse(x), lambda: layers.inverse(x), [x, *layers.parameters()])
    assert texts(lambda: fused(2 * x)) == texts(lambda: layers(2 * x))


def test_wrong_arguments_have_the_texts_of_the_flow():
    torch.manual_seed(1)
    plain, given = made("affine"), made("affine", 3)
    x, c = data(8, 5), data(8, 3)
    for flow, calls in (
        (plain, [
            lambda f: f.log_prob(x[:, :4]), lambda f: f.log_prob(x[0]), lambda f: f.log_prob(x, c), lambda f: f.sample(0),
            lambda f: f.log_prob(x.float()), lambda f: f(x), lambda f: f.sample(2, batch_size=-1), lambda f: f.mean(),
            lambda f: f.log_prob("x"), lambda f: f.sample_and_log_prob(1.5), lambda f: f.nothing,
        ]),
        (given, [
            lambda f: f.log_prob(x), lambda f: f.log_prob(x, c[:, :2]), lambda f: f.log_prob(x, c[:3]),
            lambda f: f.sample(2), lambda f: f.log_prob(x, c.float()), lambda f: f.transform_to_noise(x, 3),
        ]),
    ):  # fmt: skip
        for call in calls:
            kind, text = texts(lambda: call(fuse(flow)))
            assert (kind, text) == texts(lambda: call(flow)), text


def test_flows_are_freed_without_the_collector():
    gc.collect()
    gc.disable()
    try:
        fused = fuse(made("nested").float())
        gone = weakref.ref(fused), weakref.ref(next(fused.parameters()))
        fused.log_prob(data(3, 5).float()), fused.sample(2), fused.explain()
        del fused
        assert [each() for each in gone] == [None, None]
    finally:
        gc.enable()


def test_compiles_to_one_program():
    flow, x, graphs = made("linear"), data(8, 5), []
    fused = fuse(flow)

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    # a method that is looked up in the trace, as in a training step
    step = lambda x: fused.log_prob(x)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), flow.log_prob(x))
    assert graphs[0].count(torch.ops.pyflow.flow_program.default) == 1


def test_autocast_inference_mode_and_empty_batches():
    flow, x = made("linear").float(), data(8, 5).float()
    fused = fuse(flow)
    nflows_rules._cached_triangles.cache_clear()
    with torch.inference_mode(), programs(1):
        want = fused.log_prob(x)
    fused.log_prob(x).sum().backward()
    with torch.autocast("cpu", torch.bfloat16), programs(1):
        assert fused.log_prob(x).equal(want)
    with programs(1):
        assert fused.log_prob(x[:0]).shape == (0,)


def test_other_backends_run_the_flow():
    flow, x = made("spline"), data(8, 5)
    with pyflow.backend("reference"), programs(0):
        assert fuse(flow).log_prob(x).equal(flow.log_prob(x))


def test_batches_of_samples(double):
    flow, c = made("affine", 3), data(4, 3)
    assert_same(
        lambda: fuse(flow).sample(6, c, batch_size=2), lambda: flow.sample(6, c, batch_size=2), [*flow.parameters()], 3
    )
