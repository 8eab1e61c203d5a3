"""Single layers of nflows, glasflow and normflows after `accelerate`, with networks and inputs that have no program."""

import copy
import math

import pytest
import torch
from torch import nn

import pyflow
from pyflow import _backend
from pyflow.integrations import _layers

nf = pytest.importorskip("normflows")
pytest.importorskip("nflows")

from nflows.transforms import autoregressive, coupling, nonlinearities
from normflows.flows import neural_spline

from ..flows.peers import data, programs, randomised, results

N = nf.flows
pytestmark = [
    pytest.mark.skipif(bool(_backend.cpu_missing), reason="compared with compiled kernels"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*deprecated"),
]
SHAPES = [(5, 4), (3, 4, 2, 6)]
MASK = torch.tensor([1, 0, 1, 0])
COUPLINGS = [coupling.PiecewiseRationalQuadraticCouplingTransform, neural_spline.coupling.PiecewiseRationalQuadraticCoupling]  # fmt: skip


@pytest.fixture(autouse=True)
def affine_ops(monkeypatch):
    """Let affine transforms run on their op on a CPU too, where it does not pay."""
    monkeypatch.setattr(_layers, "_pays", lambda x: True)


class Net(nn.Module):
    """A network that no rule knows, for vectors and images, with a context or without."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs)
        self.bias = nn.Parameter(torch.randn(outputs))
        self.drop = nn.Dropout(0.3)

    def forward(self, x, context=None):
        h = self.drop(torch.tanh(torch.tensordot(x, self.weight, ([1], [0])) + self.bias))
        if context is not None:
            h = h * context.mean()
        return 2 * h.movedim(-1, 1)


class Wide(Net):
    hidden_features = 9


class Channels(Net):
    hidden_channels = 4


def of_nflows(kind, net=Wide, **options):
    return lambda: kind(MASK, net, **options)


def spline(tails="linear", bound=1.5):
    return dict(num_bins=5, tails=tails, tail_bound=bound)


def glow_coupling(mode="channel", scale_map="exp", parts=(2, 2)):
    return lambda: N.AffineCouplingBlock(Net(parts[0], 2 * parts[1]), True, scale_map, mode)


def compared(make, x, context=None, fast=True, train=False):
    """Both directions and their gradients before and after; `fast`: whether ops run, and nothing falls back."""
    own = randomised(make()).train(train)
    layer = copy.deepcopy(own)
    report = pyflow.accelerate(layer)
    inputs = [each.detach().clone().requires_grad_() for each in (x, context) if each is not None]
    for name in ("forward", "inverse"):
        want = results(lambda name=name: getattr(own, name)(*inputs), [*inputs, *own.parameters()])
        with programs(0):
            got = results(lambda name=name: getattr(layer, name)(*inputs), [*inputs, *layer.parameters()])
        for found, wanted in zip(got, want, strict=True):
            for a, b in zip(found, wanted, strict=True):
                # a few hundred roundings of 1e-16, relative to the largest number
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * float(1 + b.abs().max() if b.numel() else 1))
    counts = report.calls()
    reasons = {reason for each in counts for reason in each.reasons}
    if fast:
        assert sum(each.fast for each in counts) >= 2 and reasons <= {"x is no matrix"}, report
    return reasons


TRANSFORMS = {
    "affine": of_nflows(coupling.AffineCouplingTransform),
    "additive": of_nflows(coupling.AdditiveCouplingTransform),
    "spline": of_nflows(COUPLINGS[0], **spline()),
    "spline, channels": of_nflows(COUPLINGS[0], Channels, **spline()),
    "spline, other constants": of_nflows(
        COUPLINGS[0], **spline(), min_bin_width=0.02, min_bin_height=0.02, min_derivative=0.1
    ),
    "normflows spline": of_nflows(COUPLINGS[1], **spline()),
    "normflows circular": of_nflows(COUPLINGS[1], Channels, **spline("circular")),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_couplings_with_any_network(name, shape):
    compared(TRANSFORMS[name], data(*shape), train=True)


@pytest.mark.parametrize("kind", COUPLINGS)
def test_couplings_with_another_transform_of_what_is_kept_and_a_context(kind):
    make = of_nflows(kind, **spline(), apply_unconditional_transform=True)
    compared(make, data(5, 4), data(5, 3))
    images = of_nflows(kind, **spline(), apply_unconditional_transform=True, img_shape=[2, 6])
    compared(images, data(3, 4, 2, 6))


def test_strided_and_empty_inputs():
    for make in (TRANSFORMS["spline"], TRANSFORMS["affine"], glow_coupling("checkerboard", parts=(4, 4))):
        compared(make, data(6, 2, 4, 3).transpose(1, 2)[::2, :, :, :2])
    compared(TRANSFORMS["spline"], data(4, 10).t()[::2])
    layer = randomised(TRANSFORMS["spline"]())
    pyflow.accelerate(layer)
    # the package cannot reshape no numbers
    assert [each.shape for each in layer(data(0, 4))] == [(0, 4), (0,)]
    compared(TRANSFORMS["affine"], data(0, 4))
    compared(glow_coupling(), data(0, 4, 2, 2))


@pytest.mark.parametrize("bound", [1.5, torch.tensor([1.0, 2.0, 1.5, 0.5])], ids=["one", "each"])
@pytest.mark.parametrize("tails", ["linear", ("linear", "circular", "circular", "linear")], ids=str)
def test_splines_whose_features_have_tails_and_bounds_of_their_own(tails, bound):
    options = spline(tails if isinstance(tails, str) else list(tails), bound)
    compared(of_nflows(COUPLINGS[1], **options), 1.5 * data(20, 4))
    compared(lambda: neural_spline.coupling.PiecewiseRationalQuadraticCDF([4], **options), 1.5 * data(20, 4))


@pytest.mark.parametrize("package", ["nflows", "normflows"])
def test_splines_of_columns_and_of_pixels(package):
    kind = {"nflows": nonlinearities, "normflows": neural_spline.coupling}[package].PiecewiseRationalQuadraticCDF
    compared(lambda: kind([4], **spline()), data(5, 4))
    compared(lambda: kind([4, 2, 6], **spline()), data(3, 4, 2, 6))


def test_splines_on_the_unit_interval_check_it():
    make = of_nflows(COUPLINGS[0], **spline(None))
    compared(make, data(5, 4).sigmoid())
    layer = randomised(make())
    report = pyflow.accelerate(layer)
    with pytest.raises(type(_raised(lambda: randomised(make())(data(5, 4))))):
        layer(data(5, 4))
    assert any("must lie in [0, 1]" in reason for reason in report.calls()[0].reasons)


def _raised(call):
    with pytest.raises(Exception) as error:
        call()
    return error.value


@pytest.mark.parametrize("kind", ["nflows", "normflows"])
def test_autoregressive_layers_in_training(kind):
    rational = {
        "nflows": autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
        "normflows": neural_spline.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive,
    }[kind]
    # dropout has no instruction
    options = dict(num_blocks=1, context_features=3, dropout_probability=0.3)
    compared(lambda: rational(4, 8, **spline(), **options), data(5, 4), data(5, 3), train=True)


@pytest.mark.parametrize("mode", ["channel", "channel_inv", "checkerboard", "checkerboard_inv"])
@pytest.mark.parametrize("scale_map", ["exp", "sigmoid", "sigmoid_inv"])
def test_couplings_of_normflows(scale_map, mode):
    # an odd number of channels has two unequal parts
    parts = {"channel": (2, 1), "channel_inv": (1, 2)}.get(mode, (3, 3))
    compared(glow_coupling(mode, scale_map, parts), data(2, 3, 4, 6))


@pytest.mark.parametrize("mode", ["checkerboard", "checkerboard_inv"])
@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 4), (2, 3, 5, 4), (2, 2, 3, 2, 4)], ids=str)
def test_checkerboards_have_the_same_bits(mode, shape):
    split, merge = N.Split(mode), N.Merge(mode)
    x = data(*shape)
    parts, joined = split(x)[0], split.inverse(split(x)[0])[0]
    pyflow.accelerate(split), pyflow.accelerate(merge)
    for got in (split(x), merge.inverse(x)):
        assert got[1] == 0 and all(torch.equal(a, b) for a, b in zip(got[0], parts, strict=True))
    for got in (split.inverse(parts), merge(parts)):
        assert got[1] == 0 and torch.equal(got[0], joined) and torch.equal(got[0], x)


def scaled(name):
    return lambda: pytest.importorskip("glasflow.transforms.coupling").AffineCouplingTransform(
        MASK, Net, scale_activation=name
    )


@pytest.mark.parametrize("name", ["nflows", "nflows_general", "wide", "log2"])
def test_scale_activations_of_glasflow(name):
    compared(scaled(name), data(3, 4, 2, 2))
    assert "its scale_activation is no scale map of affine_coupling" in compared(scaled("log3"), data(5, 4), fast=False)


def test_glasflow_carries_a_copy_of_nflows():
    kinds = pytest.importorskip("glasflow.nflows.transforms.coupling")
    compared(lambda: kinds.PiecewiseRationalQuadraticCouplingTransform(MASK, Wide, **spline()), data(5, 4))
    compared(lambda: kinds.AdditiveCouplingTransform(MASK, Wide), data(5, 4))
    layers = pytest.importorskip("glasflow.nflows.transforms.autoregressive")
    kind = layers.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
    compared(lambda: kind(4, 8, **spline(), dropout_probability=0.3, num_blocks=1), data(5, 4), train=True)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (of_nflows(COUPLINGS[0], **spline(), min_bin_width=0.01), "its min_bin_width and min_bin_height differ"),
        (of_nflows(COUPLINGS[0], **{**spline(), "num_bins": 33}), "it has more than 32 bins"),
        (of_nflows(COUPLINGS[0], **{**spline(), "num_bins": 1}), "rq_spline: bins must be at least 2, got 1"),
        (lambda: N.AffineCouplingBlock(Net(2, 2), scale=False), "it does not scale"),
        (lambda: N.AffineCouplingBlock(_Broadcast(2, 4)), "params must have the shape of x doubled along dim"),
    ],
)  # fmt: skip
def test_what_an_op_does_not_take_runs_as_in_the_package(make, reason):
    assert reason in " ".join(compared(make, data(3, 4, 2, 2), fast=False))


class _Broadcast(Net):
    def forward(self, x, context=None):
        return super().forward(x).mean((2, 3), keepdim=True)


def test_half_precision_runs_as_in_the_package():
    for make in (TRANSFORMS["affine"], TRANSFORMS["additive"], glow_coupling()):
        own = randomised(make()).bfloat16()
        layer = copy.deepcopy(own)
        report = pyflow.accelerate(layer)
        x = data(3, 4, 2, 2).bfloat16()
        for got, want in zip(layer(x), own(x), strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want)
        assert "x is bfloat16" in {reason for each in report.calls() for reason in each.reasons}


@pytest.mark.parametrize("name", ["affine", "spline"])
def test_float32_is_as_exact_as_in_the_package(name):
    own, x = randomised(TRANSFORMS[name]()), data(500, 4)
    layer = copy.deepcopy(own).float()
    pyflow.accelerate(layer)
    single = copy.deepcopy(own).float()
    for exact, got, want in zip(own(x), layer(x.float()), single(x.float()), strict=True):
        off, allowed = (got - exact).abs().max(), (want - exact).abs().max()
        assert off <= 4 * allowed + 2e-6 * exact.abs().max()


def test_affine_transforms_run_as_they_are_where_no_op_is_faster(monkeypatch):
    x = data(3, 4, 2, 2)
    for make in (TRANSFORMS["affine"], glow_coupling()):
        own = randomised(make())
        layer = copy.deepcopy(own)
        report = pyflow.accelerate(layer)
        with pyflow.backend("reference"):
            layer(x)
        monkeypatch.undo()
        assert all(torch.equal(got, want) for got, want in zip(layer(x), own(x), strict=True))
        counts = report.calls()
        assert sum(each.fast for each in counts) == 0 and counts[0].reasons.keys() <= {
            "x is no matrix", "cpu has no kernel with pyflow.backend 'reference'"
        }  # fmt: skip


def test_the_warning_of_unscaled_parameters_stays():
    layer = randomised(of_nflows(COUPLINGS[0], Net, **spline())())
    pyflow.accelerate(layer)
    with pytest.warns(UserWarning, match="not scaled down"):
        layer(data(5, 4))


def test_networks_are_called_once_with_their_hooks():
    layer = randomised(glow_coupling()())
    report = pyflow.accelerate(layer)
    seen = []
    layer.flows[1].param_map.register_forward_hook(lambda module, args, out: seen.append(1))
    layer(data(2, 4, 2, 2))
    other = randomised(N.AffineCouplingBlock(_Broadcast(2, 4)))
    pyflow.accelerate(other)
    other.flows[1].param_map.register_forward_hook(lambda module, args, out: seen.append(1))
    other(data(2, 4, 2, 2))
    assert len(seen) == 2 and report.calls()[2].fast == 1


def test_subclasses_and_own_methods_run_as_they_are():
    class Doubled(coupling.AffineCouplingTransform):
        def _scale_and_shift(self, params):
            scale, shift = super()._scale_and_shift(params)
            return 2 * scale, shift

    layer, x = randomised(Doubled(MASK, Net)), data(5, 4)
    want = layer(x)
    assert not pyflow.accelerate(layer).replaced
    torch.testing.assert_close(layer(x), want, rtol=0, atol=0)
    layer = randomised(TRANSFORMS["affine"]())
    layer._coupling_transform_forward = lambda inputs, transform_params: (inputs, inputs.sum(1))
    assert pyflow.accelerate(layer).left[0].reason == "it has its own _coupling_transform_forward"


def test_transforms_of_torch_func():
    for name in ("affine", "spline"):
        own, x = randomised(TRANSFORMS[name]()), data(2, 5, 4)
        layer = copy.deepcopy(own)
        pyflow.accelerate(layer)
        each = torch.stack([own(rows)[1] for rows in x])
        torch.testing.assert_close(torch.func.vmap(lambda rows, f=layer: f(rows)[1])(x), each)
        gradient = torch.func.grad(lambda rows, f=layer: f(rows)[1].sum())(x[0])
        rows = x[0].clone().requires_grad_()
        torch.testing.assert_close(gradient, torch.autograd.grad(own(rows)[1].sum(), rows)[0])


@pytest.mark.parametrize("name", ["affine", "spline", "glow"])
def test_it_compiles_without_graph_breaks(name):
    make = {**TRANSFORMS, "glow": glow_coupling("checkerboard", "sigmoid", (4, 4))}[name]
    layer, x = randomised(make()), data(3, 4, 2, 4)
    want = layer.inverse(x)
    pyflow.accelerate(layer)
    compiled = torch.compile(layer.inverse, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), want)


def glow(mode):
    """A flow of normflows' examples, small."""
    torch.manual_seed(0)
    bases, merges, layers = [], [], []
    for i in range(2):
        channels = 2 * 2 ** (3 - i)
        layers.append([*(N.GlowBlock(channels, 8, split_mode=mode) for _ in range(2)), N.Squeeze()])
        if i:
            merges.append(N.Merge())
        bases.append(nf.distributions.DiagGaussian((4, 4, 4) if i else (16, 2, 2), trainable=False))
    return nf.MultiscaleFlow(bases, layers, merges, class_cond=False).double()


@pytest.mark.parametrize("mode", ["channel", "checkerboard"])
def test_glow_trains_to_the_same_place(mode):
    x, models = data(8, 2, 8, 8), [glow(mode) for _ in range(2)]
    report = pyflow.accelerate(models[1])
    losses = []
    for model in models:
        optimiser = torch.optim.SGD(model.parameters(), 1e-3)
        losses.append([])
        for _ in range(50):
            optimiser.zero_grad()
            loss = model.forward_kld(x)
            loss.backward()
            optimiser.step()
            losses[-1].append(float(loss.detach()))
    first, last = losses[0][0], losses[0][-1]
    assert last < first - 1 and math.isfinite(last)
    # steps carry roundings of 1e-16 on, by a small factor each
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], value, rtol=1e-6, atol=1e-8)
    assert sum(each.fast for each in report.calls()) >= 100
    samples = []
    for model in models:
        torch.manual_seed(1)
        samples.append(model.sample(3))
    torch.testing.assert_close(samples[1], samples[0], rtol=1e-6, atol=1e-7)
