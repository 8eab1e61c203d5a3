"""Autoregressive layers in one call: programs both ways against the layers, what they notice, and what is left."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.utils import parametrizations

import pyflow
from pyflow import _backend
from pyflow.flows import IAF, MAF, NSF, fuse
from pyflow.nn import ActNorm, MaskedAutoregressive

from .ours import data, perturbed
from .peers import programs

pytestmark = pytest.mark.skipif(bool(_backend.cpu_missing), reason="programs need compiled kernels")


def outcome(flow, x, given):
    """Both directions and all gradients through them."""
    results = []
    for run in (flow.forward, flow.inverse):
        leaves = [v.detach().requires_grad_() for v in (x, *given)]
        out = run(*leaves)
        loss = out[0].square().sum() + out[1].sin().sum()
        grads = torch.autograd.grad(loss, [*leaves, *flow.parameters()], materialize_grads=True)
        results += [*out, *grads]
    return results


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("order", [None, [3, 1, 2, 0, 4], [0, 0, 1, 1, 0], [7] * 5])
def test_layers(order, context, residual):
    torch.manual_seed(0)
    for i, (hidden, activation) in enumerate([((9,), "relu"), ((8, 8), "silu"), ((8, 5, 5), "elu"), ((6, 6), "gelu")]):
        options = {"order": order, "residual": residual, "context_features": context, "activation": activation}
        options |= {"transform": "rq_spline", "bins": 5, "bound": 2.0} if i % 2 else {}
        x, given = data(7, 5), (data(7, context),) if context else ()
        flow = perturbed(fuse([ActNorm(5), MaskedAutoregressive(5, hidden, **options)]), x, *given)
        with programs(2):
            got = outcome(flow, x, given)
        with pyflow.backend("reference"), programs(0):
            want = outcome(flow, x, given)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("make", [MAF, IAF, functools.partial(NSF, autoregressive=True)])
def test_leading_dims(make):
    torch.manual_seed(0)
    flow = perturbed(make(3, layers=2, hidden=(8,), context_features=2), data(9, 3), data(9, 2))
    x, context = data(4, 1, 3), data(5, 2)
    with programs(3):
        got = [flow.log_prob(x[:, 0], context[:4]), *flow(x, context), *flow.inverse(x, context)]
    with pyflow.backend("reference"):
        want = [flow.log_prob(x[:, 0], context[:4]), *flow(x, context), *flow.inverse(x, context)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    with programs(1):
        assert flow.sample(6, data(5, 2)).shape == (6, 5, 3)


def test_a_loaded_order_is_noticed():
    torch.manual_seed(0)
    layers = [MaskedAutoregressive(4, (8,), order=order) for order in ([0, 1, 2, 3], [3, 1, 0, 2])]
    flow = perturbed(fuse([layers[0]]), x := data(5, 4))
    before = flow.inverse(x)[0]
    flow.load_state_dict(perturbed(fuse([layers[1]]), x).state_dict())
    for run in (flow.forward, flow.inverse):
        with programs(1):
            got = run(x)
        with pyflow.backend("reference"):
            torch.testing.assert_close(got, run(x))
    assert not got[0].allclose(before)


def test_masks_have_no_gradient_and_move_with_the_layer():
    flow = fuse([MaskedAutoregressive(3, (8,))])
    assert not any("mask" in name for name in dict(flow.named_parameters())) and len(flow.state_dict()) == 5
    for kind in (torch.float64, torch.float32):
        with programs(1):
            assert flow.to(kind).inverse(torch.zeros(2, 3, dtype=kind))[0].dtype == kind


def test_what_is_left():
    layer = MaskedAutoregressive(3, (8,), context_features=2)
    explained = lambda: fuse([layer]).explain()
    assert explained() == "flow.layers.0: fused, 1 MaskedAutoregressive as 1 Net, 1 Affine"
    hook = layer.net.layers[1].register_forward_hook(lambda *args: None)
    assert "net.layers.1 (MaskedLinear): it has hooks" in explained()
    hook.remove()
    parametrizations.weight_norm(layer.net.layers[0].context)
    assert "net.layers.0.context" in explained() and "it has parametrizations" in explained()

    class Mine(MaskedAutoregressive):
        pass

    assert "its class has no instruction" in fuse([Mine(3, (8,))]).explain()
    # the wrong size, and no context: the layer says so
    flow = fuse([MaskedAutoregressive(3, (8,), context_features=2)])
    for x, given in [(torch.zeros(2, 4), (torch.zeros(2, 2),)), (torch.zeros(2, 3), ())]:
        with pytest.raises(ValueError, match="MaskedAutoregressive: "):
            flow(x, *given)
        with pytest.raises(ValueError, match="MaskedAutoregressive: "):
            flow.inverse(x, *given)


def test_training_through_the_inverse():
    torch.manual_seed(0)
    flow, target = IAF(2, layers=2, hidden=(8,)), torch.tensor([[2.0, 0.5]])
    x = target * torch.randn(256, 2) + 1
    optimizer = torch.optim.Adam(flow.parameters(), 0.05)
    with programs(40):
        losses = []
        for _ in range(40):
            # IAF's log_prob inverts
            loss = -flow.log_prob(x).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    exact = -torch.distributions.Normal(1.0, target).log_prob(x).sum(1).mean()
    assert losses[0] > exact + 1 and losses[-1] < exact + 0.1


@pytest.mark.parametrize(
    "made",
    [
        lambda: pytest.importorskip("normflows").flows.AutoregressiveRationalQuadraticSpline(4, 1, 16),
        lambda: pytest.importorskip("nflows.transforms").MaskedAffineAutoregressiveTransform(4, 16),
    ],
)
def test_a_lone_layer_knows_its_columns(made):
    layer = made()
    assert "1 Autoregressive" in fuse(layer).explain() or "1 Net" in fuse(layer).explain()
    for name in ("forward", "inverse"):
        messages = []
        for each in (layer, fuse(layer)):
            with pytest.raises(RuntimeError) as raised:
                getattr(each, name)(torch.zeros(3, 5))
            messages.append(str(raised.value))
        assert messages[0] == messages[1]
