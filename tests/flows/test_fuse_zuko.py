"""Flows of zuko as programs: fused against the flow itself."""

from __future__ import annotations

import copy
import functools
import inspect
import math

import pytest
import torch
from torch import nn

import pyflow
from pyflow import _backend
from pyflow.flows import fuse

from .peers import assert_same, data, programs, randomised, texts

zuko = pytest.importorskip("zuko")
from zuko import distributions, flows, lazy, transforms

pytestmark = pytest.mark.skipif(bool(_backend.cpu_missing), reason="programs need compiled kernels")
HIDDEN = {"hidden_features": (8, 8)}
# releases before 1.6 have no slope, and their base has names of its own
SLOPE = {"slope": 0.1} if "slope" in inspect.signature(flows.NSF.__init__).parameters else {}
LOC = next(name for name, _ in flows.NSF(2).base.named_buffers())
ADDITIVE = {"univariate": transforms.AdditiveTransform, "shapes": [()]}
SPLINE = {"univariate": functools.partial(transforms.MonotonicRQSTransform, bound=2.0), "shapes": [(3,), (3,), (2,)]}

FLOWS = {
    "nice": lambda c: flows.NICE(5, c, **ADDITIVE, **HIDDEN),
    "realnvp": lambda c: flows.RealNVP(5, c, activation=nn.ELU, **HIDDEN),
    "normalize": lambda c: flows.RealNVP(5, c, randmask=True, normalize=True, **HIDDEN),
    "coupling_spline": lambda c: flows.NICE(5, c, **SPLINE, **HIDDEN),
    "slope": lambda c: flows.NICE(5, c, univariate=functools.partial(transforms.MonotonicAffineTransform, slope=0.1)),
    "nsf": lambda c: flows.NSF(5, c, bins=4, **HIDDEN),
    "nsf_passes": lambda c: flows.NSF(5, c, bins=4, passes=2, **SLOPE, **HIDDEN),
    "ncsf": lambda c: flows.NCSF(5, c, bins=4, **HIDDEN),
    "ncsf_passes": lambda c: flows.NCSF(5, c, bins=3, passes=2, randperm=True, **SLOPE, **HIDDEN),
    "maf": lambda c: flows.MAF(5, c, randperm=True, **HIDDEN),
    "maf_residual": lambda c: flows.MAF(5, c, passes=3, residual=True, activation=nn.ELU, **HIDDEN),
    "adjacency": lambda c: flows.MAF(5, c, adjacency=torch.ones(5, 5).tril().bool(), **HIDDEN),
}


def made(name, context=0):
    torch.manual_seed(1)
    return randomised(FLOWS[name](context))


def flow_of(*layers):
    base = lazy.UnconditionalDistribution(distributions.DiagNormal, torch.zeros(5), torch.ones(5), buffer=True)
    return randomised(lazy.Flow(layers, base))


def coupling(**options):
    return flows.GeneralCouplingTransform(5, **HIDDEN, **options)


def assert_same_flow(flow, *given, counts=(1, 1, 1)):
    """Densities, samples and their gradients, with so many programs."""
    fused, x = fuse(flow), data(16, 5).requires_grad_()
    inputs = [*[each for each in given if each.requires_grad], *flow.parameters()]
    calls = [
        lambda flow: flow(*given).log_prob(x),
        lambda flow: flow(*given).rsample((2,)),
        lambda flow: flow(*given).rsample_and_log_prob((2,)),
    ]
    for call, more, count in zip(calls, ([x], [], []), counts, strict=True):
        assert_same(lambda call=call: call(fused), lambda call=call: call(flow), [*more, *inputs], count)
    return fused


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("name", FLOWS)
def test_flows(name, context):
    given = [data(16, context, seed=1).requires_grad_()] if context else []
    fused = assert_same_flow(made(name, context), *given)
    layers = fused.explain().splitlines()
    assert len(layers) == 2 and ": fused, 3 " in layers[0] and "left" not in layers[0]
    assert layers[1] == "flow.base: fused, 1 UnconditionalDistribution in log_prob"


@torch.no_grad()
def test_a_circular_flow_is_as_exact_as_zukos_at_the_ends_too():
    flow, pi = made("ncsf"), torch.tensor(math.pi)
    # at the ends of the interval and of its halves, and beyond
    ends = torch.stack((pi, -pi, 0 * pi, -0 * pi, 2 * pi, 3 * pi, *(pi.nextafter(s * pi) for s in (0, 2))))
    x = torch.cat((ends[:, None].expand(-1, 5), 3 * data(256, 5).float()))
    wide, single = x.double(), copy.deepcopy(flow).float()
    torch.testing.assert_close(fuse(flow)().log_prob(wide), flow().log_prob(wide), rtol=1e-12, atol=1e-12)
    for call in (lambda f, v: f().log_prob(v), lambda f, v: f().transform(v), lambda f, v: f().transform.inv(v)):
        with programs(1):
            got = call(fuse(single), x)
        own = call(single, x)
        # within roundings on either side of every end, which float64 has elsewhere
        torch.testing.assert_close(got[:8], own[:8], rtol=1e-5, atol=1e-5)
        exact = call(flow, wide)[8:]
        off, allowed = (got[8:] - exact).abs().max(), (own[8:] - exact).abs().max()
        assert off <= 4 * allowed + 2e-6 * exact.abs().max()


def test_additive_autoregressive_layers_are_undone_by_themselves():
    fused = assert_same_flow(randomised(flows.MAF(5, **ADDITIVE, **HIDDEN)), counts=(1, 0, 0))
    assert fused.explain().splitlines()[0].endswith("; its inverse left")


def test_layers_without_a_network():
    permutation = lazy.UnconditionalTransform(
        transforms.PermutationTransform, torch.tensor([3, 0, 4, 1, 2]), buffer=True
    )
    matrices = [
        lazy.UnconditionalTransform(kind, torch.randn(5, 5))
        for kind in (transforms.RotationTransform, transforms.LULinearTransform)
    ]
    flow = flow_of(permutation, coupling(), *matrices, coupling().inv, lazy.LazyComposedTransform(coupling()))
    first, _ = assert_same_flow(flow).explain().splitlines()
    kinds = "3 UnconditionalTransform, 2 GeneralCouplingTransform, 1 LazyInverse"
    assert first.endswith(f": fused, {kinds} as 3 Net, 3 Affine, 2 Linear")


@pytest.mark.parametrize("columns", [1, 4])
def test_elementwise_layers(columns):
    torch.manual_seed(1)
    flow, x, c = flows.MAF(1, 3, **SPLINE, **HIDDEN), data(16, columns).requires_grad_(), data(16, 3).requires_grad_()
    if columns > 1:
        flow = flows.MAF(columns, 3, **HIDDEN)
        flow.transform.transforms.insert(1, flows.ElementWiseTransform(columns, 3, **HIDDEN))
    fused, inputs = fuse(randomised(flow)), [x, c, *flow.parameters()]
    assert_same(lambda: fused(c).log_prob(x), lambda: flow(c).log_prob(x), inputs)
    assert_same(lambda: fused(c).transform.inv(x), lambda: flow(c).transform.inv(x), inputs)


def test_layers_without_an_instruction_run_between():
    clip = lazy.UnconditionalTransform(transforms.SoftclipTransform, bound=11.0)
    flow = flow_of(coupling(), clip, flows.ElementWiseTransform(5), coupling())
    given = flow_of(coupling(context=3), clip, coupling(context=3))
    assert_same_flow(given, data(3, seed=1), counts=(2, 2, 2))
    lines = assert_same_flow(flow, counts=(2, 2, 2)).explain().splitlines()
    assert lines[1:3] == [
        "flow.transform.transforms.1 (UnconditionalTransform): left, its zuko.transforms.SoftclipTransform has no "
        "instruction",
        "flow.transform.transforms.2 (ElementWiseTransform): left, it has no network",
    ]


@pytest.mark.parametrize("flow, reason", [
    (lambda: flows.NCSF(5, bins=40, **HIDDEN), "its 40 bins are not between 2 and 32"),
    (lambda: flows.NSF(5, bins=40, **HIDDEN), "its 40 bins are not between 2 and 32"),
    (lambda: flows.BPF(5, **HIDDEN), "its univariate BoundedBernsteinTransform has no instruction"),
    (lambda: flows.UNAF(5, **HIDDEN), "its univariate zuko.flows.neural.UMNN has no instruction"),
])  # fmt: skip
def test_flows_without_an_instruction(flow, reason):
    torch.manual_seed(1)
    flow = flow().double()
    fused, x = fuse(flow), data(4, 5)
    assert reason in fused.explain()
    with programs(0):
        assert fused().log_prob(x).equal(flow().log_prob(x))


class Wrapped(nn.Module):
    """A module around a layer, which is no LazyTransform."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, c=None):
        return self.layer(c)


def test_a_module_around_a_layer_runs_between():
    assert_same_flow(flow_of(coupling(), Wrapped(coupling()), coupling()), counts=(2, 2, 2))


def test_leading_dims_and_broadcast_contexts():
    flow = made("nsf", 3)
    fused = fuse(flow)
    for x, c in (((4, 2, 5), (3,)), ((5,), (3,)), ((5,), (6, 3)), ((4, 1, 5), (2, 3))):
        x, c = data(*x).requires_grad_(), data(*c, seed=1).requires_grad_()
        assert_same(lambda x=x, c=c: fused(c).log_prob(x), lambda x=x, c=c: flow(c).log_prob(x), [x, c])
        assert_same(
            lambda c=c: fused(c).rsample_and_log_prob((2, 3)), lambda c=c: flow(c).rsample_and_log_prob((2, 3)), [c]
        )
    c = data(4, 3)
    for call, rows in (
        (lambda d: d.sample((50,)), (200, 4)), (lambda d: d.log_prob(data(6, 4, 5)), (24, 4)),
        (lambda d: d.expand((2, 4)).sample((3,)), (24, 4)),
    ):  # fmt: skip
        with programs(1) as seen:
            call(fused(c))
        assert seen.rows == [rows]
    with programs(1) as seen:
        fused(c[:, None]).log_prob(data(4, 7, 5))
    assert seen.rows == [(28, 4)]
    # zuko takes no empty batches
    assert fused(data(3)).log_prob(data(0, 5)).shape == (0,)


def test_distributions_are_those_of_zuko():
    flow, c, x = made("maf", 3), data(4, 3), data(4, 5)
    fused, own = fuse(flow)(c), flow(c)
    assert isinstance(fused, distributions.NormalizingFlow) and str(fused) == str(own)
    assert fused.batch_shape == own.batch_shape and fused.event_shape == own.event_shape
    torch.manual_seed(5)
    got = fused.sample((2,))
    after = torch.rand(1)
    torch.manual_seed(5)
    torch.testing.assert_close(got, own.sample((2,)))
    assert not got.requires_grad and after == torch.rand(1)
    wide = fused.expand((2, 4))
    torch.testing.assert_close(wide.log_prob(x), own.expand((2, 4)).log_prob(x))
    assert wide.sample().shape == (2, 4, 5)
    z, ladj = fused.transform.call_and_ladj(x)
    torch.testing.assert_close((z, ladj), own.transform.call_and_ladj(x))
    torch.testing.assert_close(fused.transform(x), z)
    torch.testing.assert_close(fused.transform.inv(z), x)
    torch.testing.assert_close(fused.transform.log_abs_det_jacobian(x, z), ladj)
    assert len(fused.transform.transforms) == 3
    torch.testing.assert_close(copy.deepcopy(fused).log_prob(x), own.log_prob(x))


def test_a_base_or_transform_that_is_put_there_is_used():
    flow, x = made("maf"), data(8, 5)
    fused, base = fuse(flow), distributions.DiagNormal(torch.ones(5).double(), 2 * torch.ones(5).double())
    turned = lambda d: transforms.ComposedTransform(d.transform, transforms.RotationTransform(data(5, 5)))
    for change in (lambda d: setattr(d, "base", base), lambda d: setattr(d, "transform", turned(d))):
        found = []
        for each in (fused, flow):
            torch.manual_seed(2)
            changed = each()
            change(changed)
            found.append(changed.log_prob(x))
        torch.testing.assert_close(*found)
    # zuko takes the tensors of the base when the flow is called
    numbers = {f"flow.base.{LOC}": torch.ones(5).double()}
    got = torch.func.functional_call(fused, numbers, ()).log_prob(x)
    want = torch.func.functional_call(flow, {f"base.{LOC}": numbers[f"flow.base.{LOC}"]}, ()).log_prob(x)
    torch.testing.assert_close(got, want)


def test_a_base_that_requires_a_gradient_gets_one():
    flow, x = made("maf"), data(8, 5)
    fused = fuse(flow)
    with programs(1):
        fused().log_prob(x)
    loc = flow.base.get_buffer(LOC).requires_grad_()
    got, want = (torch.autograd.grad(f().log_prob(x).sum(), loc)[0] for f in (fused, flow))
    torch.testing.assert_close(got, want)
    assert f"flow.base (UnconditionalDistribution): left, its {LOC} requires a gradient" in fused.explain()


def test_other_base_distributions_run():
    flow = made("realnvp")
    flow.base = lazy.UnconditionalDistribution(distributions.DiagNormal, torch.zeros(5), 2 * torch.ones(5)).double()
    assert "left, its loc and scale are not vectors that are buffers" in assert_same_flow(flow).explain()
    for box in (box_of(buffer=False), box_of(lower=torch.tensor(-9.0), upper=torch.ones(5))):
        flow.base = box
        assert "left, its lower and upper are not vectors that are buffers" in assert_same_flow(flow).explain()
    flow.base = box_of()
    flow.base._0.requires_grad_()
    assert "left, its _0 and _1 are not constant tensors" in assert_same_flow(flow).explain()
    # their order is that of the class
    flow.base = box_of(upper=-torch.ones(5), lower=torch.ones(5))
    assert "left, its lower and upper are no ends of 5 sides of a box" in fuse(flow).explain()
    with programs(1):
        assert fuse(flow)().log_prob(data(4, 5)).isnan().all()
    flow.base = lazy.UnconditionalDistribution(distributions.GeneralizedNormal, torch.ones(5), buffer=True)
    assert "left, its zuko.distributions.GeneralizedNormal has no instruction" in fuse(flow).explain()


def box_of(*ends, buffer=True, **named):
    ends = () if named else ends or (-9 * torch.ones(5), 9 * torch.ones(5))
    return lazy.UnconditionalDistribution(distributions.BoxUniform, *ends, buffer=buffer, **named).double()


@pytest.mark.parametrize("base", [
    lambda: box_of(), lambda: box_of(upper=torch.linspace(0.5, 3, 5), lower=-torch.ones(5)),
    lambda: box_of(upper=torch.linspace(0.5, 3, 5), lower=-torch.ones(1)),
])  # fmt: skip
def test_uniform_base_distributions(base):
    flow = flow_of(coupling(), coupling(context=0))
    flow.base = base()
    fused, x = fuse(flow), data(64, 5).requires_grad_()
    assert fused.explain().endswith("flow.base: fused, 1 UnconditionalDistribution in log_prob")
    with programs(1):
        got = fused().log_prob(x)
    want = flow().log_prob(x)
    torch.testing.assert_close(got, want)
    # infinite densities stop no gradient
    for a, b in zip(*(torch.autograd.grad(v.sum(), [x, *flow.parameters()]) for v in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
    drawn = lambda f: f().rsample_and_log_prob((9,))
    assert_same(lambda: drawn(fused), lambda: drawn(flow), [*flow.parameters()])


@torch.no_grad()
def test_the_ends_of_a_box_are_those_of_zuko():
    flow = flow_of(coupling())
    # the second column is one that the layer keeps
    low, high = (s * torch.tensor([50, 1, 50, 50, 50]).float() for s in (-0.5, 1))
    flow.base = box_of(low, high)
    z = torch.tensor([-0.5, 1.0, 0.0]).double()
    z = torch.cat([z, z.nextafter(9 * z[1:2]), z.nextafter(-9 * z[1:2]), z * torch.nan])
    x = torch.zeros(len(z), 5).double().index_copy(1, torch.tensor([1]), z[:, None])
    got, want = fuse(flow)().log_prob(x), flow().log_prob(x)
    torch.testing.assert_close(got, want, equal_nan=True)
    assert got.isneginf().nonzero().flatten().tolist() == [1, 4, 6]


@torch.no_grad()
@pytest.mark.parametrize("value", [2.0, 1.0, -0.5, float("nan"), float("-inf")])
def test_outside_of_a_box_is_an_error_where_arguments_are_validated(value, validated):
    flow = flow_of(coupling())
    flow.base, x = box_of(torch.tensor([-50.0, -0.5, -50, -50, -50]), torch.tensor([50.0, 1, 50, 50, 50])), data(8, 5)
    x[:, 1] = 0
    torch.testing.assert_close(fuse(flow)().log_prob(x), flow().log_prob(x))
    x[3, 1] = value
    if value in (1.0, -0.5):
        torch.testing.assert_close(fuse(flow)().log_prob(x), flow().log_prob(x))
    else:
        assert "to be within the support" in texts(lambda: flow().log_prob(x))[1]
        assert texts(lambda: fuse(flow)().log_prob(x)) == texts(lambda: flow().log_prob(x))


def test_hooks_and_changes_are_seen():
    flow, x = made("maf"), data(8, 5)
    fused = fuse(flow)
    first, second, third = flow.transform.transforms
    changes = [
        lambda: second.hyper[0].mask.logical_not_(),
        lambda: setattr(second, "univariate", functools.partial(transforms.MonotonicAffineTransform, slope=0.5)),
        lambda: third.hyper[2].weight.data.mul_(2),
        lambda: setattr(first.hyper, "1", nn.Tanh()),
        lambda: flow.base.get_buffer(LOC).add_(1),
        lambda: setattr(flow, "base", box_of()),
        lambda: flow.base._0.sub_(1),
    ]
    for change in changes:
        before = fused().log_prob(x)
        change()
        with programs(1):
            got = fused().log_prob(x)
        torch.testing.assert_close(got, flow().log_prob(x))
        assert not got.allclose(before)
    second.hyper[2].register_forward_hook(lambda module, args, output: 2 * output)
    assert "flow.transform.transforms.1.hyper.2 (MaskedLinear): it has hooks" in fused.explain()
    with programs(2):
        got = fused().log_prob(x)
    torch.testing.assert_close(got, flow().log_prob(x))
    flow.register_forward_hook(lambda module, args, output: None)
    with programs(0):
        assert fused().log_prob(x).equal(flow().log_prob(x))


def test_fewer_passes_are_no_inverse():
    flow, z = made("maf"), data(8, 5)
    flow.transform.transforms[1].passes = 2
    with programs(0):
        assert fuse(flow)().transform.inv(z).equal(flow().transform.inv(z))


def test_wrong_arguments_have_the_texts_of_zuko():
    flow, given, x, c = made("realnvp"), made("maf", 3), data(8, 5), data(8, 3)
    for own, call in (
        (flow, lambda f: f().log_prob(x[:, :4])),
        (flow, lambda f: f().log_prob(x.float())),
        (flow, lambda f: f(c).log_prob(x)),
        (given, lambda f: f().log_prob(x)),
        (given, lambda f: f(c[:3]).log_prob(x)),
        (given, lambda f: f(c[:, :2]).sample((2,))),
    ):
        assert texts(lambda call=call, own=own: call(fuse(own))) == texts(lambda call=call, own=own: call(own))


@pytest.fixture
def validated():
    """zuko turns this off."""
    torch.distributions.Distribution.set_default_validate_args(True)
    yield
    torch.distributions.Distribution.set_default_validate_args(False)


@torch.no_grad()
def test_nan_is_an_error_where_arguments_are_validated(request):
    flow, x = made("realnvp"), data(8, 5)
    x[3, 2] = float("nan")
    assert fuse(flow)().log_prob(x).isnan().sum() == 1
    request.getfixturevalue("validated")
    assert texts(lambda: fuse(flow)().log_prob(x)) == texts(lambda: flow().log_prob(x))


def test_frozen_and_other_backends():
    flow, x = made("nsf"), data(8, 5)
    frozen = fuse(flow, frozen=True)
    for _ in range(2):
        with programs(1):
            torch.testing.assert_close(frozen().log_prob(x), flow().log_prob(x))
    with pyflow.backend("reference"), programs(0):
        assert fuse(flow)().log_prob(x).equal(flow().log_prob(x))


def test_masks_follow_the_dtype_and_serve_training_after_inference():
    flow = made("maf")
    fused, parameters = fuse(flow), [*flow.parameters()]
    with torch.inference_mode(), programs(1):
        fused().log_prob(data(16, 5))
    for dtype in (torch.float64, torch.float32, torch.float64):
        flow.to(dtype)
        x = data(16, 5).to(dtype)
        with programs(1):
            found = torch.autograd.grad(fused().log_prob(x).sum(), parameters)
        for a, b in zip(found, torch.autograd.grad(flow().log_prob(x).sum(), parameters), strict=True):
            within = 1e-4 if dtype == torch.float32 else 1e-9
            torch.testing.assert_close(a, b, rtol=within, atol=within * float(1 + b.abs().max()))
