"""Flows of normflows as programs: fused against the flow itself. They run from z to x."""

from __future__ import annotations

import copy
import inspect
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import pyflow
from pyflow import _backend
from pyflow.flows import fuse

from .peers import assert_changes_are_seen, assert_float32_as_exact_as, assert_same, data, programs, randomised, texts

nf = pytest.importorskip("normflows")
N = nf.flows

pytestmark = [
    pytest.mark.skipif(bool(_backend.cpu_missing), reason="programs need compiled kernels"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*deprecated"),
]
EVEN = torch.tensor([1.0, 0, 1, 0, 0])


def mlp(inputs, outputs, **options):
    return nf.nets.MLP([inputs, 8, 7, outputs], **options)


def block(first=True, scale_map="exp", **options):
    net = mlp(3, 4, **options) if first else mlp(2, 6, **options)
    return N.AffineCouplingBlock(net, scale_map=scale_map, split_mode="channel" if first else "channel_inv")


def coupled(context=None, kind=N.CoupledRationalQuadraticSpline, **options):
    given = {} if context is None else {"num_context_channels": context}
    if not {*given} <= {*inspect.signature(kind.__init__).parameters}:
        pytest.skip("releases before 1.7.3 have no context here")
    return kind(5, 2, 8, num_bins=4, **given, **options)


def circular(places, kind):
    return coupled(None, kind, ind_circ=places, tail_bound=math.pi, init_identity=False)


def autoregressive(context=None, **options):
    return coupled(context, N.AutoregressiveRationalQuadraticSpline, init_identity=False, **options)


LAYERS = {
    "exp": lambda: [block(leaky=0.1), N.Permute(5, "swap"), block(False, output_fn="tanh", output_scale=2.0, score_scale=0.5)],
    "sigmoid": lambda: [block(True, "sigmoid", output_fn="sigmoid"), N.Permute(5, "shuffle"), block(False, "sigmoid")],
    "sigmoid_inv": lambda: [block(True, "sigmoid_inv", output_fn="relu", dropout=0.5), block(False, "sigmoid_inv")],
    "additive": lambda: [N.AffineCouplingBlock(mlp(3, 2, output_fn="clampexp"), scale=False), N.AffineConstFlow((5,))],
    "linear": lambda: [
        block(), N.InvertibleAffine(5), N.InvertibleAffine(5, use_lu=False), N.LULinearPermute(5), N.AffineConstFlow((5,), shift=False)
    ],
    "nested": lambda: [block(), N.Reverse(N.Composite([block(False), N.LULinearPermute(5), N.Permute(5)]))],
    "glow": lambda: [N.ActNorm((5,)), N.InvertibleAffine(5), block(True, "sigmoid"), N.ActNorm((5,)), block(False, "sigmoid")],
    "masked": lambda: [
        N.MaskedAffineFlow(EVEN, mlp(5, 5), mlp(5, 5, output_fn="tanh")), N.MaskedAffineFlow(1 - EVEN, mlp(5, 5)),
        N.MaskedAffineFlow(EVEN, None, mlp(5, 5)), N.MaskedAffineFlow(EVEN),
    ],
    "masked by integers": lambda: [
        N.MaskedAffineFlow(EVEN.long(), mlp(5, 5), mlp(5, 5, output_fn="tanh")), N.MaskedAffineFlow(EVEN.byte(), mlp(5, 5)),
        N.MaskedAffineFlow(EVEN.int()),
    ],
    "residual": lambda: [N.AffineCouplingBlock(nf.nets.ResidualNet(3, 4, 8, use_batch_norm=True, activation=F.silu))],
    "spline": lambda: [coupled(), N.LULinearPermute(5, identity_init=False), coupled(reverse_mask=True, activation=nn.Tanh)],
    "circular": lambda: [coupled(tails="circular", tail_bound=2.0)],
    "bounds": lambda: [N.Reverse(nf.flows.neural_spline.coupling.PiecewiseRationalQuadraticCoupling(
        torch.tensor([1, 0, 1, 1, 0]), lambda i, o: nf.nets.ResidualNet(i, o, 8, preprocessing=waves(i)), num_bins=4,
        tails="linear", tail_bound=torch.tensor([1.0, 2, 3, 2, 1.5]), apply_unconditional_transform=True))],
    "torus": lambda: [coupled(None, N.CircularCoupledRationalQuadraticSpline, ind_circ=[0, 3], tail_bound=1.5)],
    "torus_bounds": lambda: [
        coupled(None, N.CircularCoupledRationalQuadraticSpline, ind_circ=[1, 2], tail_bound=torch.linspace(0.5, 2, 5), init_identity=False)
    ],
    "torus_autoregressive": lambda: [
        coupled(None, N.CircularAutoregressiveRationalQuadraticSpline, ind_circ=[0], tail_bound=1.5, init_identity=False)
    ],
    "periodic": lambda: [
        N.PeriodicWrap([1, 3], 2.0), N.Permute(5), circular([0, 3], N.CircularCoupledRationalQuadraticSpline),
        N.PeriodicShift([0, 3], math.pi, torch.tensor([0.4, -2.0])), N.LULinearPermute(5, identity_init=False),
        circular([1, 2], N.CircularAutoregressiveRationalQuadraticSpline),
        N.PeriodicShift((2, 1), torch.tensor([0.7, 1.5]), 0.3), N.Reverse(N.PeriodicShift(4, 1.0, 0.25)), N.PeriodicWrap([4]),
    ],
    "maf": lambda: [N.MaskedAffineAutoregressive(5, 12), N.Permute(5)],
    "maf_feedforward": lambda: [
        N.MaskedAffineAutoregressive(5, 12, use_residual_blocks=False, use_batch_norm=True, activation=F.elu)
    ],
    "autoregressive": lambda: [autoregressive(permute_mask=True), N.LULinearPermute(5, identity_init=False)],
}  # fmt: skip
CONDITIONAL = {
    "spline": lambda: [coupled(3), N.LULinearPermute(5, identity_init=False), coupled(3, reverse_mask=True)],
    "maf": lambda: [N.MaskedAffineAutoregressive(5, 12, context_features=3), N.Permute(5)],
    "autoregressive": lambda: [autoregressive(3)],
}


def waves(features):
    return nf.utils.nn.PeriodicFeaturesElementwise(features, [1], scale=torch.tensor([1.3]), bias=True)


@pytest.fixture(autouse=True)
def double():
    """What normflows draws and adds is float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def made(layers, kind=nf.NormalizingFlow, base=None, spread=0.3):
    torch.manual_seed(1)
    flow = kind(base or nf.distributions.DiagGaussian(5), layers(), nf.distributions.DiagGaussian(5)).double()
    if any(isinstance(layer, N.ActNorm) for layer in flow.modules()):
        flow.log_prob(data(32, 5))
    return randomised(flow, spread)


def check(flow, *given):
    fused, x = fuse(flow), data(16, 5).requires_grad_()
    inputs = [x, *given, *flow.parameters()]
    methods = (
        "log_prob",
        "forward_kld",
        "inverse",
        "inverse_and_log_det",
        "forward",
        "forward_and_log_det",
        "__call__",
    )
    for method in methods:
        found, own = getattr(fused, method), getattr(flow, method)
        assert_same(lambda f=found: f(x, *given), lambda f=own: f(x, *given), inputs)
    assert_same(lambda: fused.sample(16, *given), lambda: flow.sample(16, *given), inputs[1:])
    layer = fuse([*flow.flows])
    for own, back in ((flow.forward_and_log_det, layer.forward), (flow.inverse_and_log_det, layer.inverse)):
        assert_same(lambda b=back: b(x, *given), lambda f=own: f(x, *given), inputs)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    check(made(LAYERS[name]))


def test_periodic_layers_that_change():
    flow, x = made(LAYERS["periodic"]), data(8, 5)
    fused, shift = fuse(flow), flow.flows[3]
    changes = [
        lambda: shift.shift.add_(0.5), lambda: setattr(flow.flows[0], "bound", 1.5), lambda: setattr(shift, "ind", [0, 1]),
    ]  # fmt: skip
    assert_changes_are_seen(changes, lambda: fused.log_prob(x), lambda: flow.log_prob(x))
    # as in normflows
    shift.ind = [0, 7]
    assert texts(lambda: fused.log_prob(x)) == texts(lambda: flow.log_prob(x))


@pytest.mark.parametrize("layer, reason", [
    (lambda: N.PeriodicWrap(torch.tensor([1, 2])), "its ind is no list of integers from 0 on"),
    (lambda: N.PeriodicWrap([-1]), "its ind is no list of integers from 0 on"),
    (lambda: N.PeriodicWrap([1, 1]), r"its ind is (1, 1), its bound (1.0,) and its shift (0.0,)"),
    (lambda: N.PeriodicWrap([1], bound=-1.0), r"its ind is (1,), its bound (-1.0,) and its shift (0.0,)"),
    (lambda: N.PeriodicShift([1], shift=torch.tensor(0.5, requires_grad=True)), "its shift is neither a number nor"),
])  # fmt: skip
def test_periodic_layers_without_an_instruction(layer, reason):
    flow = made(lambda: [coupled(), layer()])
    fused, x = fuse(flow), data(4, 5)
    assert f"flow.flows.1 ({type(flow.flows[1]).__name__}): left, {reason}" in fused.explain()
    with programs(1):
        torch.testing.assert_close(fused.log_prob(x), flow.log_prob(x))


def test_a_direction_without_a_program_is_named():
    flow = made(LAYERS["maf"])
    flow.flows[0].autoregressive_net.initial_layer.mask.fill_(1)
    lines = fuse(flow).explain().splitlines()
    assert lines[0].endswith("fused, 1 MaskedAffineAutoregressive, 1 Permute as 1 Net, 1 Affine; its inverse left")
    assert lines[1] == "flow.q0 (DiagGaussian): left, the layers before it are not one program"


@pytest.mark.parametrize("name", CONDITIONAL)
def test_conditional_layers(name):
    flow = made(CONDITIONAL[name], nf.ConditionalNormalizingFlow)
    check(flow, data(16, 3, seed=1).requires_grad_())


@pytest.mark.parametrize("name", ["exp", "spline"])
def test_other_estimates(name):
    flow = made(LAYERS[name])
    fused, inputs = fuse(flow), [*flow.parameters()]
    assert_same(lambda: fused.reverse_kld(6), lambda: flow.reverse_kld(6), inputs)
    assert_same(lambda: fused.reverse_kld(6, 0.5, False), lambda: flow.reverse_kld(6, 0.5, False), inputs, 2)
    alpha = lambda f: f.reverse_alpha_div(6, alpha=2, dreg=True)
    assert_same(lambda: alpha(fused), lambda: alpha(flow), inputs, 2)
    single, fused = copy.deepcopy(flow).float(), copy.deepcopy(fused).float()
    # sums in the default dtype
    assert fused.forward_kld(data(4, 5).float()).dtype == single.forward_kld(data(4, 5).float()).dtype


@pytest.mark.parametrize("base, fuses", [
    (nf.distributions.DiagGaussian(5, trainable=False), True), (nf.distributions.UniformGaussian(5, [1, 3]), True),
    (nf.distributions.UniformGaussian(5, [0], torch.linspace(0.5, 2, 5)), True), (nf.distributions.GaussianMixture(2, 5), False),
])  # fmt: skip
def test_bases(base, fuses):
    flow = made(LAYERS["exp"], base=base)
    fused, x = fuse(flow), data(16, 5).requires_grad_()
    assert (f"flow.q0: fused, 1 {type(base).__name__}" in fused.explain()) == fuses
    assert_same(lambda: fused.log_prob(x), lambda: flow.log_prob(x), [x, *flow.parameters()])
    if isinstance(base, nf.distributions.DiagGaussian):
        base.temperature = 0.5
        assert "q0 (DiagGaussian): left, its temperature is 0.5" in fused.explain()
        assert_same(lambda: fused.log_prob(x), lambda: flow.log_prob(x), [x, *flow.parameters()])


def test_a_uniform_base():
    base = nf.distributions.base.Uniform(5, -0.5, 4.0)
    flow, x = made(LAYERS["exp"], base=base), data(64, 5)
    fused, inputs = fuse(flow), [x.requires_grad_(), *flow.flows.parameters()]
    assert "flow.q0: fused, 1 Uniform in log_prob" in fused.explain()
    with programs(1):
        got = fused.log_prob(x)
    want = flow.log_prob(x)
    assert 0 < want.isneginf().sum() < 64
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(v.sum(), inputs) for v in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
    assert_same(lambda: fused.sample(9), lambda: flow.sample(9), inputs[1:])
    # normflows keeps the density of the ends that it was made with
    base.low.sub_(1)
    assert "q0 (Uniform): left, its log_prob_val is not that of its low and high" in fused.explain()
    torch.testing.assert_close(fused.log_prob(x), flow.log_prob(x))
    base.log_prob_val, base.high = -5 * torch.log(base.high + 1.5), base.high.clone()
    with programs(1):
        torch.testing.assert_close(fused.log_prob(x), flow.log_prob(x))
    base.low = nn.Parameter(base.low)
    assert "q0 (Uniform): left, its low and high are not constant tensors" in fused.explain()
    base.high = 4.0
    assert "q0 (Uniform): left, its low and high are not one number each" in fused.explain()
    torch.testing.assert_close(fused.log_prob(x), flow.log_prob(x))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_a_uniform_base_are_inside(dtype):
    # the first column is one that the layer keeps
    base = nf.distributions.base.Uniform(5, -5.0, 4.1)
    flow = made(lambda: [N.MaskedAffineFlow(EVEN, mlp(5, 5))], base=base).to(dtype)
    z = torch.tensor([-5.0, 4.1, 0.0], dtype=dtype)
    z = torch.cat([z, z.nextafter(9 * z[1:2]), z.nextafter(-9 * z[1:2])])
    x = torch.zeros(len(z), 5, dtype=dtype).index_copy(1, torch.tensor([0]), z[:, None])
    with programs(1):
        got = fuse(flow).log_prob(x)
    torch.testing.assert_close(got, flow.log_prob(x).to(dtype))
    assert got.isneginf().nonzero().flatten().tolist() == [4, 6]


@pytest.mark.parametrize("name", ["exp", "masked", "masked by integers", "linear", "spline", "periodic"])
def test_float32(name):
    flow = made(LAYERS[name], spread=0.1)
    assert_float32_as_exact_as("log_prob", flow, fuse(flow), data(256, 5))


def test_act_norm_waits_in_both_directions():
    for method in ("log_prob", "forward"):
        torch.manual_seed(1)
        flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(5), [N.ActNorm((5,)), block()]).double()
        fused, x = fuse(flow), 3 * data(16, 5) + 1
        with programs(0):
            getattr(fused, method)(x)
        assert flow.flows[0].data_dep_init_done > 0
        with programs(1):
            torch.testing.assert_close(getattr(fused, method)(x), getattr(flow, method)(x))


def test_copies_and_snapshots():
    flow, x = made(LAYERS["glow"]), data(8, 5)
    fused, want = fuse(flow), flow.log_prob(x)
    assert list(fused.state_dict()) == [f"flow.{name}" for name in flow.state_dict()]
    assert [*fused.parameters()] == [*flow.parameters()] and fused.q0 is flow.q0 and fused.flows[0].fused is fused
    frozen = fuse(flow, frozen=True)
    for other in (fused, frozen, copy.deepcopy(fused), copy.deepcopy(frozen), pickle.loads(pickle.dumps(fused))):
        for _ in range(2):
            with programs(1):
                torch.testing.assert_close(other.log_prob(x), want)
    with torch.no_grad():
        flow.q0.loc.add_(1)
    torch.testing.assert_close(fused.log_prob(x), flow.log_prob(x))
    torch.testing.assert_close(frozen.log_prob(x), want)


def net(flow):
    return flow.flows[0].flows[1].param_map.net


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Shifted(N.AffineCouplingBlock):
    def forward(self, z):
        z, logdet = super().forward(z)
        return z + 1, logdet


def hook(flow):
    net(flow)[0].register_forward_hook(lambda module, args, output: 2 * output)


def own_forward(flow):
    net(flow)[2].forward = lambda x: nn.Linear.forward(net(flow)[2], x) + 1


def parametrization(flow):
    parametrize.register_parametrization(net(flow)[0], "weight", Twice())


def subclass(flow):
    flow.flows[0] = Shifted(mlp(3, 4)).double()


def checkerboard(flow):
    flow.flows[0].flows[0].mode = flow.flows[0].flows[2].mode = "checkerboard"


def unknown(flow):
    net(flow)[1] = nn.Softplus()


CHANGES = {
    hook: "flow.flows.0.flows.1.param_map.net.0 (Linear): it has hooks",
    own_forward: "flow.flows.0.flows.1.param_map.net.2 (Linear): it has its own forward",
    parametrization: "flow.flows.0.flows.1.param_map.net.0 (ParametrizedLinear): it has parametrizations",
    subclass: "flow.flows.0 (Shifted): left, its class has no instruction",
    checkerboard: "flow.flows.0 (AffineCouplingBlock): left, its split mode is 'checkerboard'",
    unknown: "flow.flows.0.flows.1.param_map.net.1 (Softplus): its class has no instruction",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_layer_is_left_and_named(change):
    flow, x = made(lambda: [block(), N.Permute(5), block(False)]), data(16, 5).requires_grad_()
    fused = fuse(flow)
    fused.log_prob(x)
    change(flow)
    assert CHANGES[change] in fused.explain() and "are not one program" in fused.explain()
    if change is checkerboard:
        # it halves an even last dim
        assert texts(lambda: fused.log_prob(x)) == texts(lambda: flow.log_prob(x))
    else:
        assert_same(lambda: fused.log_prob(x), lambda: flow.log_prob(x), [x, *flow.parameters()])


def test_changes_are_seen():
    flow, x = made(lambda: [block(False, output_fn="tanh", output_scale=2.0), N.Permute(5), N.MaskedAffineFlow(EVEN, mlp(5, 5)),
                            N.InvertibleAffine(5), coupled()]), data(16, 5)  # fmt: skip
    fused = fuse(flow)
    first, permute, masked, affine, spline = flow.flows
    changes = [
        lambda: setattr(first.flows[1], "scale_map", "sigmoid"),
        lambda: first.flows[1].param_map.net[6].scale.data.mul_(2),
        lambda: permute.inv_perm.copy_(permute.inv_perm.flip(0)),
        lambda: setattr(permute, "mode", "swap"),
        lambda: setattr(masked, "b", 1 - masked.b),
        lambda: setattr(masked, "s", mlp(5, 5).double()),
        lambda: (affine.sign_S.data[:2].neg_(), affine.log_S.data.add_(0.1)),
        lambda: setattr(spline.prqct, "tail_bound", 2.0),
        lambda: setattr(spline.prqct.unconditional_transform, "min_derivative", 0.1),
        lambda: flow.flows.append(block().double()),
        lambda: flow.q0.log_scale.data.add_(0.1),
    ]
    assert_changes_are_seen(changes, lambda: fused.log_prob(x), lambda: flow.log_prob(x))


def test_a_class_without_a_rule_is_not_said_to_have_changed():
    # nothing of its source is known, in any release
    left = fuse(made(lambda: [N.Planar((5,)), block(), N.Radial((5,))])).explain()
    assert "flows.0 (Planar): left, its class has no instruction" in left
    assert "flows.2 (Radial): left, its class has no instruction" in left


def test_the_dtype_of_a_mask_is_seen():
    flow = made(lambda: [N.MaskedAffineFlow(EVEN.long(), mlp(5, 5))]).float()
    fused, x = fuse(flow), data(16, 5).float()
    with programs(1):
        assert fused.log_prob(x).dtype == torch.float32
    # its network does not take what a float64 mask makes of float32
    flow.flows[0].b = EVEN.double()[None]
    assert texts(lambda: fused.log_prob(x)) == texts(lambda: flow.log_prob(x))


def test_hooks_of_the_flow_run():
    flow, x, seen = made(LAYERS["exp"]), data(8, 5), []
    flow.register_forward_hook(lambda *_: seen.append("forward"))
    torch.testing.assert_close(fuse(flow)(x), flow(x))
    assert seen == ["forward"] * 2


def test_wrong_arguments_have_the_texts_of_the_flow():
    flow, x = made(LAYERS["exp"]), data(8, 5)
    calls = [
        lambda f: f.log_prob(x[:, :4]), lambda f: f.log_prob(x[0]), lambda f: f.log_prob(x, x), lambda f: f.log_prob(),
        lambda f: f.log_prob(x.float()), lambda f: f(x, x), lambda f: f.inverse(x[:, :2]), lambda f: f.sample("two"),
        lambda f: f.nothing, lambda f: f.log_prob(x, context=x),
    ]  # fmt: skip
    for call in calls:
        kind, text = texts(lambda: call(fuse(flow)))
        assert (kind, text.replace("_Normflows", "NormalizingFlow")) == texts(lambda: call(flow)), text


def test_other_backends_run_the_flow():
    flow, x = made(LAYERS["spline"]), data(8, 5)
    with pyflow.backend("reference"), programs(0):
        torch.testing.assert_close(fuse(flow).log_prob(x), flow.log_prob(x))
