"""NICE, RealNVP and Glow on a GPU: same results as the same weights on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

import pyflow
from pyflow import testing
from pyflow.flows import NICE, Glow, RealNVP, bits_per_dim, dequantize

from .common import DEVICE, INTERPRETED, assert_near, check_compiled, compare_module, draw

MODELS = {
    "nice": (lambda: NICE(6, hidden=(16,)), (6,)),
    "nice_odd": (lambda: NICE(7, couplings=5, hidden=(16, 8), prior="gaussian", split="half", data_init=True), (7,)),
    "realnvp_vector": (lambda: RealNVP(5, couplings=3, hidden=(16,)), (5,)),
    "realnvp_images": (lambda: RealNVP((1, 4, 4), levels=2, hidden=6, prior="logistic"), (1, 4, 4)),
    "realnvp_reversible": (lambda: RealNVP((1, 4, 4), levels=2, hidden=6, reversible=True), (1, 4, 4)),
    "glow": (lambda: Glow((1, 8, 8), steps=2, levels=2, hidden=6), (1, 8, 8)),
    "glow_reversible": (lambda: Glow((2, 4, 4), steps=2, levels=1, hidden=6, reversible=True), (2, 4, 4)),
}
# gradients go through exp of sums that CPU and GPU order differently
ERROR = 2e-4

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture(params=MODELS)
def model(request):
    """(initialised flow with perturbed parameters, so that no network is 0; data), on the CPU."""
    return started(request.param)


def started(name, batch=8):
    make, shape = MODELS[name]
    torch.manual_seed(0)
    flow, x = make(), draw((batch, *shape))
    with pyflow.backend("auto"), torch.no_grad():
        flow.log_prob(x)
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return flow, x


@pytest.mark.parametrize("method", ["log_prob", "forward"])
def test_matches_the_cpu(model, method):
    flow, x = model
    compare_module(flow, [x], ERROR, method)


def test_inverse(model):
    flow, x = model
    compare_module(flow, [draw((4, x[0].numel()), seed=3)], ERROR, "inverse")
    flow, x = flow.to(DEVICE), x.to(DEVICE)
    z, logdet = flow(x)
    back, minus = flow.inverse(z)
    assert_near(back, x, 1e-4)
    assert_near(minus, -logdet, 1e-4)


def test_samples_match_the_cpu(model):
    flow, _ = model
    with pyflow.backend("auto"):
        want = flow.sample(3, seed=5)
    flow = flow.to(DEVICE)
    got = flow.sample(3, seed=5)
    assert got.device.type == DEVICE
    assert_near(got, want, 1e-3)
    testing.assert_same_bits(flow.draw_latent(3, seed=5), flow.draw_latent(3, seed=5))
    assert not torch.equal(got, flow.sample(3, seed=6))


@pytest.mark.parametrize("name", ["nice_odd", "realnvp_vector", "glow"])
def test_data_initialisation_matches_the_cpu(name):
    make, shape = MODELS[name]
    torch.manual_seed(0)
    flow, x = make(), 3 * draw((32, *shape)) + 1
    there = copy.deepcopy(flow).to(DEVICE)
    with pyflow.backend("auto"):
        want = flow.log_prob(x)
    assert_near(there.log_prob(x.to(DEVICE)), want, 1e-4)
    for (key, a), b in zip(there.state_dict().items(), flow.state_dict().values(), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", ["nice", "realnvp_images", "glow_reversible"])
def test_training_matches_the_cpu(name):
    flow, x = started(name)
    losses = []
    for backend, device in ((pyflow._backend.current(), DEVICE), ("auto", "cpu")):
        with pyflow.backend(backend):
            losses.append(train(copy.deepcopy(flow).to(device), x.to(device)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0][-1] < losses[0][0]


def train(flow, x, steps=3, rate=1e-2):
    optimizer, losses = torch.optim.Adam(flow.parameters(), rate), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -flow.log_prob(x).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["nice", "realnvp_vector", "glow", "glow_reversible"])
def test_training_under_autocast(name):
    flow, x = started(name)
    flow, x = flow.to(DEVICE), x.to(DEVICE)
    want = -flow.log_prob(x).mean()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = -flow.log_prob(x).mean()
    loss.backward()
    assert loss.item() == pytest.approx(want.item(), rel=0.05, abs=0.1)
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in flow.parameters())


def test_state_moves_between_devices(model):
    flow, x = model
    there = copy.deepcopy(flow).to(DEVICE)
    with torch.no_grad():
        for parameter in there.parameters():
            parameter.mul_(0.5)
    flow.load_state_dict(there.state_dict())
    with pyflow.backend("auto"):
        want = flow.log_prob(x)
    assert_near(there.log_prob(x.to(DEVICE)), want, 1e-4)


def test_compiles_without_graph_breaks():
    flow, x = started("realnvp_vector")
    check_compiled(flow.to(DEVICE).log_prob, [x], 1e-4)


def test_dequantize_and_bits_per_dim():
    x = torch.randint(256, (4, 1, 4, 4), dtype=torch.uint8).to(DEVICE)
    y = dequantize(x, 256, torch.Generator(DEVICE).manual_seed(0))
    assert y.device.type == DEVICE and torch.equal((y * 256).floor(), x.float())
    assert bits_per_dim(torch.zeros(1, device=DEVICE), 784, 256).item() == 8


def test_a_larger_glow_trains():
    shape = (3, 8, 8) if INTERPRETED else (3, 32, 32)
    torch.manual_seed(0)
    flow = Glow(shape, steps=1 if INTERPRETED else 4, levels=2, hidden=16).to(DEVICE)
    losses = train(flow, 0.3 * draw((4 if INTERPRETED else 32, *shape)).to(DEVICE), rate=1e-3)
    assert losses[-1] < losses[0]
