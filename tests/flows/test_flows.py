"""NICE, RealNVP and Glow: inverses, densities, sampling, gradients, compilation."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pyflow
from pyflow.flows import IAF, MAF, NICE, NSF, Glow, RealNVP, bits_per_dim, dequantize
from pyflow.flows.multiscale import Squeeze
from pyflow.nn import AffineCoupling, Scale

MODELS = {
    "nice": (lambda: NICE(6, hidden=(16,)), (6,)),
    "nice_odd": (lambda: NICE(7, couplings=5, hidden=(16, 8), prior="gaussian", split="half", data_init=True), (7,)),
    "nice_odd_interleave": (lambda: NICE(5, couplings=3, hidden=(16,), split="interleave"), (5,)),
    "realnvp_vector": (lambda: RealNVP(5, couplings=3, hidden=(16,)), (5,)),
    "realnvp_images": (lambda: RealNVP((1, 4, 4), levels=2, hidden=6, prior="logistic"), (1, 4, 4)),
    "realnvp_one_level": (lambda: RealNVP((2, 3, 4), levels=1, hidden=6), (2, 3, 4)),
    "glow": (lambda: Glow((1, 4, 4), steps=2, levels=2, hidden=6), (1, 4, 4)),
    "glow_reversible": (lambda: Glow((2, 4, 4), steps=2, levels=1, hidden=6, reversible=True), (2, 4, 4)),
    "realnvp_reversible": (lambda: RealNVP((1, 4, 4), levels=2, hidden=6, reversible=True), (1, 4, 4)),
}
COMPILABLE = [name for name in MODELS if "reversible" not in name]


@pytest.fixture(params=MODELS)
def model(request):
    """(initialised flow in float64 with perturbed parameters, so that no network is 0; data)."""
    torch.manual_seed(0)
    return started(request.param)


def started(name, batch=4):
    make, shape = MODELS[name]
    flow, x = make().double(), torch.randn(batch, *shape, dtype=torch.float64)
    flow.log_prob(x)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return flow, x


def test_inverse(model):
    flow, x = model
    z, logdet = flow(x)
    back, minus = flow.inverse(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -logdet)
    assert z.shape == (4, x[0].numel()) and logdet.shape == (4,)


def test_logdet_matches_the_jacobian(model):
    flow, x = model
    for row in x[:2]:
        jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0].flatten(), row)
        expected = torch.linalg.slogdet(jacobian.reshape(row.numel(), -1))[1]
        torch.testing.assert_close(flow(row[None])[1][0], expected)


def test_log_prob_is_prior_plus_logdet(model):
    flow, x = model
    z, logdet = flow(x)
    if flow.prior == "gaussian":
        prior = torch.distributions.Normal(torch.zeros_like(z), 1).log_prob(z)
    else:
        prior = -nn.functional.softplus(z) - nn.functional.softplus(-z)
    torch.testing.assert_close(flow.log_prob(x), prior.sum(1) + logdet)


def test_every_parameter_gets_a_gradient(model):
    flow, x = model
    (-flow.log_prob(x).mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())
    silent = [name for name, p in flow.named_parameters() if not p.grad.any()]
    assert not [name for name in silent if not name.endswith(("upper", "lower"))], silent


def test_gradcheck_of_log_prob_in_the_input(model):
    flow, x = model
    assert torch.autograd.gradcheck(flow.log_prob, (x[:2].requires_grad_(),))


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_roundtrip(name):
    flow, x = started(name)
    fresh = MODELS[name][0]().double()
    fresh.load_state_dict(flow.state_dict())
    assert fresh.log_prob(x).equal(flow.log_prob(x))


def test_sampling(model):
    flow, x = model
    once, again = flow.sample(3, seed=5), flow.sample(3, seed=5)
    assert once.equal(again) and once.shape == (3, *x.shape[1:]) and not once.requires_grad
    assert not once.equal(flow.sample(3, seed=6))
    torch.manual_seed(1)
    free = flow.sample(3)
    torch.manual_seed(1)
    assert free.equal(flow.sample(3)) and not free.equal(flow.sample(3))
    torch.testing.assert_close(flow(flow.sample(3, temperature=0.5, seed=5))[0], 0.5 * flow(once)[0])
    assert flow.sample(2, temperature=0.0).diff(dim=0).abs().max() == 0
    assert flow.sample(0).shape == (0, *x.shape[1:])


def test_a_seed_draws_the_same_latents_in_every_dtype(model):
    flow, _ = model
    double = flow.draw_latent(4, seed=0)
    torch.testing.assert_close(flow.float().draw_latent(4, seed=0), double.float())


@pytest.mark.parametrize(("prior", "variance"), [("gaussian", 1.0), ("logistic", math.pi**2 / 3)])
def test_latents_have_the_priors_moments(prior, variance):
    z = NICE(10, hidden=(1,), prior=prior).draw_latent(20_000, seed=0)
    assert z.isfinite().all()
    assert abs(z.mean()) < 0.02 and abs(z.var() / variance - 1) < 0.02


@pytest.mark.parametrize("make", [lambda: NICE(2, hidden=(16,)), lambda: RealNVP(2, couplings=4, hidden=(16,))])
def test_density_integrates_to_one(make):
    torch.manual_seed(0)
    flow = make().double()
    flow.log_prob(torch.randn(64, 2, dtype=torch.float64))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        axis = torch.linspace(-40, 40, 1001, dtype=torch.float64)
        grid = torch.cartesian_prod(axis, axis)
        total = flow.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(total - 1) < 1e-3


class PermutingNICE(nn.Module):
    """NICE as in the paper: the same coupling every time, with the whole vector permuted between couplings."""

    def __init__(self, nets, permute):
        super().__init__()
        self.nets, self.permute = nets, permute

    def forward(self, x):
        half = x.shape[1] // 2
        for i, net in enumerate(self.nets):
            if i:
                x = self.permute(x)
            x = torch.cat((x[:, :half], x[:, half:] + net(x[:, :half])), 1)
        return x


def flip_weights(net, inputs, outputs):
    """Return a copy of the net with the elements of its input, its output or both in reverse order."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        if inputs:
            net[0].weight.copy_(net[0].weight.flip(1))
        if outputs:
            net[-1].weight.copy_(net[-1].weight.flip(0))
            net[-1].bias.copy_(net[-1].bias.flip(0))
    return net


@pytest.mark.parametrize("couplings", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fixed_halves_equal_permuted_coordinates(couplings, dtype):
    torch.manual_seed(0)
    flow = NICE(8, couplings=couplings, hidden=(32, 32), split="half").to(dtype)
    x = torch.randn(16, 8, dtype=dtype)
    # layer by layer, with torch's matrix products as below; the scale starts at 0
    with pyflow.backend("reference"):
        h, _ = flow(x)
    # exchanging the halves changes no arithmetic, so the bits are equal
    exchanged = PermutingNICE(flow.nets, lambda v: v.roll(4, 1))(x)
    assert h.equal(exchanged if couplings % 2 else exchanged.roll(4, 1))
    # reversing the vector exchanges and reverses the halves: every second net sees and returns reversed halves, so
    # its GEMMs sum in another order
    nets = nn.ModuleList(flip_weights(net, i % 2 == 1, i % 2 == 1) for i, net in enumerate(flow.nets))
    reversed_ = PermutingNICE(nets, lambda v: v.flip(1))(x)
    torch.testing.assert_close(h, reversed_ if couplings % 2 else reversed_.flip(1))


def test_interleaved_split_is_a_permutation_of_the_input():
    torch.manual_seed(0)
    even = NICE(8, hidden=(16,), split="interleave")
    half = NICE(8, hidden=(16,), split="half")
    half.load_state_dict(even.state_dict())
    x = torch.randn(4, 8)
    parted = torch.cat((x[:, 0::2], x[:, 1::2]), 1)
    torch.testing.assert_close(even(x)[0], half(parted)[0])
    torch.testing.assert_close(even.log_prob(x), half.log_prob(parted))


def test_data_initialised_scale_matches_the_prior():
    torch.manual_seed(0)
    x = torch.randn(500, 6) * torch.tensor([0.01, 0.1, 1.0, 3.0, 10.0, 0.5])
    for prior, std in (("gaussian", 1.0), ("logistic", math.pi / math.sqrt(3))):
        flow = NICE(6, hidden=(8,), prior=prior, data_init=True)
        flow.log_prob(x)
        torch.testing.assert_close(flow(x)[0].std(0, correction=0), torch.full((6,), std))
    assert not NICE(6, hidden=(8,)).scale.log_scale.any()


def test_initialised_glow_whitens_the_data():
    torch.manual_seed(0)
    flow, x = Glow((1, 8, 8), steps=3, levels=2, hidden=8), 5 + 3 * torch.randn(64, 1, 8, 8)
    flow.log_prob(x)
    z, _ = flow(x)
    # zero-initialised couplings scale half of the channels by sigmoid(2) = 0.88 a step
    assert 0.5 < z.std() < 1.1


def test_reversible_gives_the_same_gradients():
    torch.manual_seed(0)
    for make in (
        lambda r: Glow((1, 4, 4), steps=2, levels=2, hidden=6, reversible=r),
        lambda r: RealNVP((1, 4, 4), levels=2, hidden=6, reversible=r),
        lambda r: RealNVP(4, couplings=4, hidden=(8,), reversible=r),
    ):
        plain, rebuilt = make(False).double(), make(True).double()
        x = torch.randn(6, *plain.shape, dtype=torch.float64)
        plain.log_prob(x)
        rebuilt.load_state_dict(plain.state_dict())
        for flow in (plain, rebuilt):
            (-flow.log_prob(x).mean()).backward()
        for a, b in zip(plain.parameters(), rebuilt.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", COMPILABLE)
def test_compiles_without_graph_breaks(name):
    torch.manual_seed(0)
    flow, x = started(name)
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), flow.log_prob(x))
    (-compiled(x).mean()).backward()
    assert all(p.grad is not None for p in flow.parameters())
    torch.testing.assert_close(torch.compile(flow.inverse, fullgraph=True, backend="aot_eager")(flow(x)[0])[0], x)


def test_inductor_gives_the_same_log_prob():
    torch.manual_seed(0)
    flow, x = NICE(8, hidden=(16,)), torch.randn(4, 8)
    torch.testing.assert_close(torch.compile(flow.log_prob, fullgraph=True)(x), flow.log_prob(x))


def test_backends_agree():
    torch.manual_seed(0)
    for name in MODELS:
        flow, x = started(name)
        with pyflow.backend("reference"):
            expected = flow.log_prob(x)
        torch.testing.assert_close(flow.log_prob(x), expected)


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    x = torch.randn(256, 2, dtype=torch.float64)
    x[:, 1] += x[:, 0] ** 2
    for flow in (NICE(2, hidden=(32, 32), prior="gaussian").double(), RealNVP(2, couplings=4).double()):
        optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
        losses = []
        for _ in range(60):
            loss = -flow.log_prob(x).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.2


def test_glow_on_meta():
    with torch.device("meta"):
        flow = Glow((1, 4, 4), steps=1, levels=1, hidden=4)
    x = torch.empty(3, 1, 4, 4, device="meta")
    for training in (True, False):
        z, logdet = flow.train(training)(x)
        assert z.shape == (3, 16) and logdet.shape == (3,) and flow.inverse(z)[0].shape == x.shape


def test_dequantize_and_bits():
    x = torch.arange(17).repeat(1000, 1)
    y = dequantize(x, 17, torch.Generator().manual_seed(0))
    assert y.min() >= 0 and y.max() <= 1 and y.dtype == torch.float32
    assert (y.double() * 17 - x).min() > -1e-5 and (y.double() * 17 - x).max() < 1 + 1e-5
    assert y.equal(dequantize(x, 17, torch.Generator().manual_seed(0)))
    assert dequantize(x.to(torch.uint8), 17, dtype=torch.float64).dtype == torch.float64
    for dtype in (torch.uint8, torch.uint16, torch.int32, torch.float16, torch.float64):
        assert (dequantize(x.to(dtype), 17).double() * 17).floor().sub(x).count_nonzero() <= 2
    assert dequantize(x > 8, 2).shape == x.shape and dequantize(x[:0], 17).shape == (0, 17)
    # a uniform density on [0, 1]^dim is log2(levels) bits
    assert bits_per_dim(torch.tensor(0.0), 64, 17).item() == pytest.approx(math.log2(17))
    # the paper's MNIST: 1980.50 nats of 784 dequantised pixels
    assert bits_per_dim(torch.tensor(1980.50), 784, 256).item() == pytest.approx(4.3555, abs=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_empty_batches(name):
    make, shape = MODELS[name]
    flow = make()
    x = torch.zeros(0, *shape, requires_grad=True)
    log_prob = flow.log_prob(x)
    log_prob.sum().backward()
    assert log_prob.shape == (0,) and x.grad.shape == x.shape
    assert flow.inverse(flow(x)[0])[0].shape == x.shape
    # the empty batch has initialised nothing: the next batch does
    flow.log_prob(torch.randn(8, *shape))
    fresh = make()
    fresh.load_state_dict(flow.state_dict())
    x = torch.randn(3, *shape)
    assert fresh.log_prob(x).equal(flow.log_prob(x))


def test_squeeze_is_pixel_unshuffle():
    squeeze = Squeeze()
    for shape in ((2, 3, 4, 6), (0, 1, 8, 8)):
        x = torch.randn(shape)
        y, logdet = squeeze(x)
        assert y.shape == (shape[0], 4 * shape[1], shape[2] // 2, shape[3] // 2) and not logdet.any()
        assert not shape[0] or y.equal(nn.functional.pixel_unshuffle(x, 2))
        assert squeeze.inverse(y)[0].equal(x)
        sliced = torch.randn(*shape[:2], 2 * shape[2], shape[3])[:, :, ::2].transpose(2, 3)
        assert squeeze.inverse(squeeze(sliced)[0])[0].equal(sliced)


@pytest.mark.parametrize("name", MODELS)
def test_default_device_does_not_affect_existing_modules(name):
    flow, x = started(name)
    expected = flow.log_prob(x), flow.sample(2, seed=0)
    torch.set_default_device("meta")
    try:
        got = flow.log_prob(x), flow.sample(2, seed=0)
        got[0].sum().backward()
        assert flow.sample(2).device == x.device
    finally:
        torch.set_default_device(None)
    for a, b in zip(got, expected, strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("name", MODELS)
def test_new_modules_have_the_default_dtype(name):
    make, shape = MODELS[name]
    torch.set_default_dtype(torch.float64)
    try:
        flow = make()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in flow.parameters()} == {torch.float64}
    assert flow.log_prob(torch.randn(4, *shape, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("name", MODELS)
def test_export_and_vmap_in_eval_mode(name):
    flow, x = started(name)
    flow.eval()
    program = torch.export.export(flow, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", max=64)}}).module()
    for batch in (x, x[:3]):
        for got, expected in zip(program(batch), flow(batch), strict=True):
            torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.func.vmap(lambda v: flow(v[None])[0][0])(x), flow(x)[0])


@pytest.mark.parametrize("name", MODELS)
def test_averaged_model_created_before_data_initialisation(name):
    make, shape = MODELS[name]
    torch.manual_seed(0)
    flow = make()
    mean = AveragedModel(flow, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    x = 3 * torch.randn(64, *shape) + 1
    for _ in range(3):
        flow.log_prob(x)
        mean.update_parameters(flow)
    y = torch.randn(5, *shape)
    torch.testing.assert_close(mean.module.log_prob(y), flow.log_prob(y))


def test_seeds_of_any_integer_type():
    flow = NICE(4, hidden=(8,))
    assert flow.draw_latent(2, seed=np.int64(7)).equal(flow.draw_latent(np.int32(2), seed=7))
    assert flow.draw_latent(2, seed=torch.tensor(7)).equal(flow.draw_latent(2, seed=7))
    # a seed for each sample: the draws of its own batch of one
    seeds = torch.tensor([7, 8])
    assert flow.draw_latent(2, seed=seeds)[1:].equal(flow.draw_latent(1, seed=seeds[1:]))
    for seed, kind in ((1.0, "float"), (True, "bool")):
        with pytest.raises(TypeError, match=f"NICE: seed must be an integer or an int64 tensor, got {kind}"):
            flow.sample(1, seed=seed)
    with pytest.raises(TypeError, match="NICE: seed must be int64, got int32"):
        flow.sample(1, seed=torch.tensor(1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"NICE: seed must have the shape \(\) or \(3,\), got \(2,\)"):
        flow.sample(3, seed=seeds)
    with pytest.raises(ValueError, match="NICE: seed must fit 64 bits"):
        flow.sample(1, seed=2**64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: NICE(4, hidden=(8,), data_init=True), lambda: RealNVP(4, couplings=2, hidden=(8,)),
        lambda: RealNVP((1, 4, 4), hidden=4), lambda: Glow((1, 4, 4), steps=1, levels=1, hidden=4),
        lambda: MAF(4, hidden=(8,)), lambda: IAF(4, hidden=(8,)), lambda: NSF(4, hidden=(8,)),
    ],
)  # fmt: skip
def test_another_dtype_is_refused_before_a_layer_initialises_itself(make, dtype):
    flow = make()
    before = copy.deepcopy(flow.state_dict())
    x = torch.randn(16, *getattr(flow, "shape", flow.latent_shape))
    name = f"^{type(flow).__name__}"
    for call, label in ((flow, "x"), (flow.log_prob, "x"), (flow.inverse, "z")):
        text = f"{name}: {label} must have the dtype of the parameters, float32, got {str(dtype)[6:]}$"
        with pytest.raises(TypeError, match=text):
            call((x.flatten(1) if label == "z" else x).to(dtype))
    torch.testing.assert_close(flow.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: MAF(4, reversible="no"), "MAF: reversible must be true or false, got str"),
        (lambda: AffineCoupling(nn.Linear(2, 4), swap="no"), "AffineCoupling: swap must be true or false, got str"),
        (lambda: Scale(4, data_init="no"), "Scale: data_init must be true or false, got str"),
        (lambda: NICE(4, hidden=8), "NICE: hidden must be a tuple of widths for vectors, got int"),
        (lambda: RealNVP(4, hidden=8), "RealNVP: hidden must be a tuple of widths for vectors, got int"),
        (lambda: RealNVP((1, 4, 4), hidden=(8, 8)), "RealNVP: hidden must be an integer, got tuple"),
        (lambda: RealNVP(4.0), "RealNVP: shape must be an integer or a tuple of integers, got float"),
        (lambda: RealNVP((4.0,)), "RealNVP: shape must be an integer, got float"),
        (lambda: RealNVP(4, couplings=2.0), "RealNVP: couplings must be an integer, got float"),
        (lambda: Glow("8"), "Glow: shape must be an integer or a tuple of integers, got str"),
        (lambda: Glow((1, 8, 8), steps=None), "Glow: steps must be an integer, got NoneType"),
        (lambda: NICE("4"), "NICE: dim must be an integer, got str"),
        (lambda: NICE(4, couplings=1.5), "NICE: couplings must be an integer, got float"),
        (lambda: Scale(4.0), "Scale: shape must be an integer or a tuple of integers, got float"),
        (lambda: AffineCoupling(None), "AffineCoupling: net must be a module, got NoneType"),
        (lambda: NICE(4).sample(2.0), "NICE: n must be an integer, got float"),
        (lambda: dequantize(torch.zeros(1), 2.5), "dequantize: levels must be an integer, got float"),
        (lambda: dequantize(torch.zeros(1, dtype=torch.complex64), 2), "dequantize: x must be integers, got complex64"),
        (lambda: dequantize(torch.zeros(1), 2, dtype=torch.int64), "dequantize: dtype must be float32, .* got int64"),
    ],
)
def test_wrong_types(call, text):
    with pytest.raises(TypeError, match=text):
        call()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: NICE(1), "NICE: dim must be at least 2, got 1"),
        (lambda: NICE(4, prior="cauchy"), "NICE: prior must be one of gaussian, logistic, got 'cauchy'"),
        (lambda: NICE(4, split="channel"), "NICE: split must be one of half, interleave, got 'channel'"),
        (lambda: NICE(4)(torch.zeros(2, 5)), r"NICE: x must have the shape \(B, 4\), got \(2, 5\)"),
        (lambda: NICE(4).sample(-1), "NICE: n must be at least 0, got -1"),
        (lambda: NICE(4).sample(1, temperature=-0.5), "NICE: temperature must be at least 0, got -0.5"),
        (lambda: NICE(4).sample(1, temperature=math.nan), "NICE: temperature must be at least 0, got nan"),
        (lambda: NICE(4).sample(1, temperature=math.inf), "NICE: temperature must be finite, got inf"),
        (lambda: bits_per_dim(torch.zeros(1), 0), "bits_per_dim: dim must be at least 1, got 0"),
        (lambda: RealNVP(1), "RealNVP: a vector must have at least 2 elements, got 1"),
        (lambda: RealNVP(4, couplings=0), "RealNVP: couplings must be at least 1, got 0"),
        (lambda: RealNVP((1, 3, 4)), r"RealNVP: shape must be \(C, H, W\) .* divisible by 2, got \(1, 3, 4\)"),
        (lambda: RealNVP(4, scale_map="relu"), "AffineCoupling: scale_map must be one of exp"),
        (lambda: Glow((1, 4, 4)), r"Glow: shape must be \(C, H, W\) with H and W divisible by 8, got \(1, 4, 4\)"),
        (lambda: Glow(8), r"Glow: shape must be \(C, H, W\) with H and W divisible by 8, got \(8,\)"),
        (lambda: Glow((1, 8, 8), steps=0), "Glow: steps must be at least 1, got 0"),
        (lambda: Glow((1, 8, 8), hidden=0), "Glow: hidden must be at least 1, got 0"),
        (lambda: Glow((1, 8, 8))(torch.zeros(2, 8, 8)), r"Glow: x must have the shape \(B, 1, 8, 8\), got \(2, 8, 8\)"),
        (lambda: Glow((1, 8, 8)).inverse(torch.zeros(2, 8)), r"Glow: z must have the shape \(B, 64\), got \(2, 8\)"),
        (lambda: dequantize(torch.zeros(1), 0), "dequantize: levels must be at least 1, got 0"),
        (lambda: dequantize(torch.rand(4) / 2 + 0.25, 256), r"dequantize: x must be integers in \[0, 256\), got 0\."),
        (lambda: dequantize(torch.tensor([0, 256]), 256), r"dequantize: x must be integers in \[0, 256\), got 256"),
        (lambda: dequantize(torch.tensor([-1]), 256), r"dequantize: x must be integers in \[0, 256\), got -1"),
        (lambda: dequantize(torch.tensor([math.nan]), 256), r"dequantize: x must be integers in \[0, 256\), got nan"),
        (
            lambda: dequantize(torch.zeros(1), 256, dtype=torch.float16),
            "dequantize: levels must be at most 8 for float16, got 256",
        ),
        (lambda: bits_per_dim(torch.zeros(1), 1, 0), "bits_per_dim: levels must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_dequantize_of_uint8_with_256_levels():
    x = torch.tensor([0, 184, 255], dtype=torch.uint8)
    assert (dequantize(x, 256) * 256).floor().tolist() == [0, 184, 255]
    with pytest.raises(ValueError, match=r"^dequantize: x must be integers in \[0, 17\), got 184$"):
        dequantize(x, 17)


@pytest.mark.parametrize(("levels", "dtype"), [(256, torch.float32), (17, torch.float32), (8, torch.float16)])
def test_noise_is_never_rounded_up_to_the_next_integer(levels, dtype):
    x = torch.full((2_000_000,), levels - 1)
    y = dequantize(x, levels, torch.Generator().manual_seed(0), dtype)
    # 1 would be an infinite logit
    assert y.max() < 1 and y.double().mul(levels).sub(levels - 1).mean() == pytest.approx(0.5, abs=3e-3)
    if levels != 17:
        assert (y * levels).floor().eq(x).all()


@pytest.mark.parametrize("name", MODELS)
def test_hooks_run_in_log_prob(name):
    make, shape = MODELS[name]
    torch.manual_seed(0)
    flow, x = make().eval(), torch.rand(4, *shape)
    want, seen = flow.log_prob(x), []
    flow.register_forward_pre_hook(lambda flow, args: seen.append("before"))
    flow.register_forward_hook(lambda flow, args, output: seen.append("after"))
    torch.testing.assert_close(flow.log_prob(x), want)
    assert seen == ["before", "after"]


def test_dequantize_under_vmap_draws_for_every_sample():
    x = torch.zeros(3, 1000, dtype=torch.uint8).t()
    y = torch.vmap(lambda row: dequantize(row, 256), in_dims=1, randomness="different")(x)
    assert y.shape == (3, 1000) and y.unique().numel() > 2900
    # the strides of x do not matter
    draws = [dequantize(x, 256, torch.Generator().manual_seed(0)) for x in (x, x.contiguous())]
    assert torch.equal(*draws)
