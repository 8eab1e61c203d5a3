"""NSF, MAF and IAF: densities, leading dims, peers, compilation, data types, state."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pyflow
from pyflow.flows import IAF, MAF, NSF
from pyflow.nn import ActNorm, MaskedAutoregressive, SplineCoupling

MAKERS = {
    "maf": lambda **o: MAF(4, layers=3, hidden=(16, 16), **o),
    "iaf": lambda **o: IAF(4, layers=2, hidden=(16,), **o),
    "nsf": lambda **o: NSF(4, layers=4, hidden=(16,), bins=5, **o),
    "nsf_autoregressive": lambda **o: NSF(4, layers=2, hidden=(12, 12), bins=4, autoregressive=True, **o),
    "nsf_two": lambda **o: NSF(2, layers=3, hidden=(16,), bound=5.0, **o),
    "nsf_one": lambda **o: NSF(1, layers=2, hidden=(8,), **o),
    "maf_one": lambda **o: MAF(1, layers=2, hidden=(8,), **o),
}


def started(name, spread=0.15, **options):
    """(flow in float64 with random weights after its data-dependent initialisation, x)"""
    torch.manual_seed(0)
    flow = MAKERS[name](**options).double()
    x = 2 * torch.randn(6, flow.dim, dtype=torch.float64) + 1
    flow.log_prob(x)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return flow, x


@pytest.mark.parametrize("name", MAKERS)
def test_inverse_jacobian_and_prior(name):
    flow, x = started(name)
    z, logdet = flow(x)
    back, minus = flow.inverse(z)
    torch.testing.assert_close(back, x, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(minus, -logdet, atol=1e-8, rtol=1e-8)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v)[0], x[0])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], logdet[0])
    prior = torch.distributions.Normal(torch.zeros_like(z), 1).log_prob(z).sum(1)
    torch.testing.assert_close(flow.log_prob(x), prior + logdet)
    with pyflow.backend("reference"):
        torch.testing.assert_close(flow.log_prob(x), prior + logdet)


@pytest.mark.parametrize("name", MAKERS)
def test_every_parameter_gets_a_gradient(name):
    flow, x = started(name, spread=0.2)
    (-flow.log_prob(x).mean()).backward()
    # a masked network of one feature or of the first in the order uses its biases alone
    silent = {n.rpartition(".")[2] for n, p in flow.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent <= ({"weight"} if flow.dim == 1 else set()), silent
    assert torch.autograd.gradcheck(flow.log_prob, (x[:2].requires_grad_(),))


@pytest.mark.parametrize("name", MAKERS)
def test_any_leading_dims(name):
    flow, x = started(name)
    nats = flow.log_prob(x)
    torch.testing.assert_close(flow.log_prob(x.view(2, 3, -1)), nats.view(2, 3))
    torch.testing.assert_close(flow.log_prob(x[0]), nats[0])
    z, logdet = flow(x.view(3, 1, 2, -1))
    assert z.shape == (3, 1, 2, flow.dim) and logdet.shape == (3, 1, 2)
    torch.testing.assert_close(flow.inverse(z)[0], x.view(3, 1, 2, -1), atol=1e-8, rtol=1e-8)
    for shape in ((0,), (2, 0, 3)):
        empty = torch.zeros(*shape, flow.dim, dtype=torch.float64, requires_grad=True)
        assert flow.log_prob(empty).shape == shape and flow.inverse(empty)[1].shape == shape
        flow.log_prob(empty).sum().backward()
        assert empty.grad.shape == empty.shape


def test_density_of_samples_for_contexts():
    torch.manual_seed(0)
    for make in (MAF, IAF, NSF):
        flow = make(3, layers=2, hidden=(8,), context_features=2).double()
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        context = torch.randn(4, 2, dtype=torch.float64)
        x, nats = flow.eval().sample_and_log_prob(5, context, seed=0)
        assert x.shape == (5, 4, 3) and nats.shape == (5, 4)
        torch.testing.assert_close(flow.log_prob(x, context), nats)
        # one x under several contexts
        torch.testing.assert_close(flow.log_prob(x[0, 0], context)[0], nats[0, 0])
        assert flow.log_prob(x[0, 0], context).shape == (4,)


@pytest.mark.parametrize("name", ["nsf_two", "nsf_one", "maf_one"])
def test_density_integrates_to_one(name):
    flow, _ = started(name)
    axis = torch.linspace(-30, 30, 1201, dtype=torch.float64)
    grid = axis[:, None] if flow.dim == 1 else torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        total = flow.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** flow.dim
    assert abs(total - 1) < 2e-3


@pytest.mark.parametrize("name", MAKERS)
def test_a_new_flow_is_the_prior(name):
    flow = MAKERS[name]().eval()
    x = 3 * torch.randn(50, flow.dim)
    torch.testing.assert_close(
        flow.log_prob(x), torch.distributions.Normal(0, 1).log_prob(x).sum(1), atol=1e-4, rtol=1e-5
    )
    if name != "iaf":
        flow.train().log_prob(7 + 10 * torch.randn(400, flow.dim))
        # the first training batch standardised the data
        assert abs(flow.sample(2000, seed=0).mean() - 7) < 2


def test_maf_is_that_of_zuko():
    zuko = pytest.importorskip("zuko")
    torch.manual_seed(0)
    for context in (0, 2):
        theirs = zuko.flows.MAF(5, context, transforms=3, hidden_features=(11, 13)).double()
        ours = MAF(5, layers=3, hidden=(11, 13), context_features=context).double().eval()
        made = [layer for layer in ours.modules() if isinstance(layer, MaskedAutoregressive)]
        for layer, peer in zip(made, theirs.transform.transforms, strict=True):
            for linear, other in zip(layer.net.layers, list(peer.hyper)[::2], strict=True):
                inputs = linear.in_features
                state = {"weight": other.weight[:, :inputs], "bias": other.bias}
                if linear.context is not None:
                    state["context.weight"] = other.weight[:, inputs:]
                linear.load_state_dict(state)
        x = torch.randn(7, 5, dtype=torch.float64)
        c = torch.randn(7, context, dtype=torch.float64) if context else None
        torch.testing.assert_close(ours.log_prob(x, c), theirs(c).log_prob(x))
        torch.testing.assert_close(ours.inverse(x, c)[0], theirs(c).transform.inv(x))


def test_iaf_is_the_inverse_of_maf():
    torch.manual_seed(0)
    maf, iaf = MAF(4, layers=1, hidden=(8,)).double().eval(), IAF(4, layers=1, hidden=(8,)).double()
    layer = maf.stack[1]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    iaf.stack[0].layer.load_state_dict(layer.state_dict())
    x = torch.randn(5, 4, dtype=torch.float64)
    for a, b in ((maf(x), iaf.inverse(x)), (maf.inverse(x), iaf(x))):
        for got, want in zip(a, b, strict=True):
            torch.testing.assert_close(got, want)


def test_layers():
    def kinds(flow):
        return [type(layer) for layer in flow.stack.layers]

    assert kinds(NSF(4, layers=2)) == [ActNorm, SplineCoupling] * 2
    assert (
        kinds(NSF(4, layers=2, autoregressive=True)) == [ActNorm, MaskedAutoregressive] * 2 == kinds(MAF(4, layers=2))
    )
    assert not any(isinstance(layer, ActNorm) for layer in IAF(3).modules())
    splits = [(layer.split, layer.swap) for layer in NSF(4, layers=5).stack.layers if isinstance(layer, SplineCoupling)]
    assert splits == [("half", False), ("half", True), ("interleave", False), ("interleave", True), ("half", False)]
    orders = [
        layer.net.order.tolist() for layer in MAF(3, layers=3).modules() if isinstance(layer, MaskedAutoregressive)
    ]
    assert orders == [[0, 1, 2], [2, 1, 0], [0, 1, 2]]


@pytest.mark.parametrize(
    "name", [name if name in ("maf", "iaf", "nsf") else pytest.param(name, marks=pytest.mark.slow) for name in MAKERS]
)
def test_compiles_without_graph_breaks(name):
    flow, x = started(name)
    torch.compiler.reset()
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), flow.log_prob(x))
    (-compiled(x).mean()).backward()
    sampled = torch.compile(flow.inverse, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(sampled(x)[0], flow.inverse(x)[0])


@pytest.mark.parametrize("name", ["maf", "iaf", "nsf", "nsf_autoregressive"])
def test_reversible_gives_the_same_gradients(name):
    plain, x = started(name)
    rebuilt = MAKERS[name](reversible=True).double()
    rebuilt.load_state_dict(plain.state_dict())
    for flow in (plain, rebuilt):
        (-flow.log_prob(x).mean()).backward()
    for a, b in zip(plain.parameters(), rebuilt.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-8, rtol=1e-7)


@pytest.mark.parametrize("name", MAKERS)
def test_copies_states_and_dtypes(name):
    flow, x = started(name, spread=0.05)
    fresh = MAKERS[name]().double()
    fresh.load_state_dict(flow.state_dict())
    mean = AveragedModel(flow, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(2):
        mean.update_parameters(flow)
    want = flow.log_prob(x)
    assert copy.deepcopy(flow).log_prob(x).equal(want) and fresh.log_prob(x).equal(want)
    torch.testing.assert_close(mean.module.log_prob(x), want)
    assert fresh.sample(3, seed=0).equal(flow.sample(3, seed=0))
    half = copy.deepcopy(flow).bfloat16()
    nats = half.log_prob(x.bfloat16())
    assert nats.dtype == torch.float32 and half.sample(3, seed=0).dtype == torch.bfloat16
    torch.testing.assert_close(nats.double(), want, atol=0.5, rtol=0.05)


@pytest.mark.parametrize("make", [MAF, IAF, lambda *a, **o: NSF(*a, bins=6, **o)])
def test_training_lowers_the_loss(make):
    torch.manual_seed(0)
    x = torch.randn(256, 2)
    x[:, 1] = x[:, 1] / 4 + x[:, 0] ** 2
    flow = make(2, layers=4, hidden=(32, 32))
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = -flow.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # the entropy is log(2 pi) + 1 - log 4 = 1.45
    assert losses[-1] < losses[0] - 0.5 and losses[-1] < 2.0


def test_variational_inference_with_iaf():
    torch.manual_seed(0)
    flow = IAF(2, layers=3, hidden=(32,))
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    mean, spread = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])
    for _ in range(150):
        x, nats = flow.rsample_and_log_prob(128)
        target = torch.distributions.Normal(mean, spread).log_prob(x).sum(-1)
        optimizer.zero_grad()
        (nats - target).mean().backward()
        optimizer.step()
    x, nats = flow.sample_and_log_prob(4000, seed=0)
    target = torch.distributions.Normal(mean, spread).log_prob(x).sum(-1)
    assert abs((nats - target).mean()) < 0.05
    torch.testing.assert_close(x.mean(0), mean, atol=0.2, rtol=0)


def test_vmap_and_export():
    flow, x = started("maf")
    flow.eval()
    torch.testing.assert_close(torch.func.vmap(flow.log_prob)(x), flow.log_prob(x))
    program = torch.export.export(flow, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", max=64)}}).module()
    torch.testing.assert_close(program(x[:3])[0], flow(x[:3])[0])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: NSF(0), ValueError, "NSF: dim must be at least 1, got 0"),
        (lambda: NSF(2, layers=0), ValueError, "NSF: layers must be at least 1, got 0"),
        (lambda: NSF(2, bins=1), ValueError, "NSF: bins must be at least 2, got 1"),
        (lambda: NSF(2, bound=-1.0), ValueError, "NSF: bound must be positive and finite, got -1.0"),
        (lambda: NSF(2, hidden=8), TypeError, "NSF: hidden must be a tuple of widths for vectors, got int"),
        (lambda: NSF(2, autoregressive="x"), TypeError, "NSF: autoregressive must be true or false, got str"),
        (lambda: MAF(2.0), TypeError, "MAF: dim must be an integer, got float"),
        (lambda: IAF(2, context_features=-1), ValueError, "IAF: context_features must be at least 0, got -1"),
        (lambda: MAF(3)(torch.zeros(2, 4)), ValueError, r"MAF: x must have the shape \(..., 3\), got \(2, 4\)"),
        (lambda: MAF(3).inverse(torch.tensor(0.0)), ValueError, r"MAF: z must have the shape \(..., 3\), got \(\)"),
        (lambda: NSF(3)([1.0]), TypeError, "NSF: x must be a tensor, got list"),
        (lambda: IAF(3).sample(-1), ValueError, "IAF: n must be at least 0, got -1"),
        (lambda: IAF(3).sample(1, 0.7), ValueError, "IAF: context must be None with context_features=0, got float"),
    ],
)
def test_wrong_arguments(call, error, text):
    with pytest.raises(error, match=f"^{text}$"):
        call()


def test_entropy_of_the_prior():
    nats = MAF(3, layers=1).sample_and_log_prob(20_000, seed=0)[1]
    assert abs(nats.mean() + 1.5 * (1 + math.log(2 * math.pi))) < 0.05
    assert isinstance(MAF(3, layers=1).stack[0], nn.Module)
