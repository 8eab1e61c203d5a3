"""MaskedAutoregressive: masks against nflows and zuko, the schedule of the inverse against D passes, gradients, state."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

from pyflow.nn import MaskedAutoregressive, ReversibleSequential
from pyflow.nn._made import ACTIVATIONS

CONFIGS = {
    "one feature": (1, (6, 6), {}),
    "one feature, context": (1, (6,), {"context_features": 2, "transform": "rq_spline"}),
    "one feature, residual": (1, (5,), {"residual": True, "context_features": 1}),
    "two": (2, (8, 8), {"transform": "rq_spline"}),
    "three, one layer": (3, (5,), {}),
    "three, unreachable": (3, (1, 7), {"activation": "tanh"}),
    "eight": (8, (16, 16), {"transform": "rq_spline", "bins": 4}),
    "eight, unequal": (8, (9, 20, 5), {"context_features": 3}),
    "eight, narrow": (8, (3, 12, 2), {"order": [7, 6, 5, 4, 3, 2, 1, 0]}),
    "eight, permuted": (8, (16, 16), {"order": [3, 0, 7, 1, 6, 2, 5, 4], "transform": "rq_spline"}),
    "eight, residual": (8, (16, 16), {"residual": True, "order": [3, 0, 7, 1, 6, 2, 5, 4]}),
    "residual, unequal": (8, (3, 20, 20, 5), {"residual": True, "context_features": 2, "activation": "elu"}),
    "coupling": (5, (8, 8), {"order": [0, 0, 0, 1, 1], "transform": "rq_spline"}),
    "passes": (8, (11, 6), {"order": [0, 1, 1, 0, 2, 2, 1, 0], "context_features": 2, "residual": True}),
    "no order": (4, (6,), {"order": [5, 5, 5, 5]}),
    "no order, context": (4, (6,), {"order": [0, 0, 0, 0], "context_features": 1}),
    "wide": (32, (40, 64), {"transform": "rq_spline", "bins": 3}),
    "wide, residual": (32, (64, 64), {"residual": True, "context_features": 4, "activation": "silu"}),
}


def made(features, hidden, spread=0.4, **options):
    """A layer in float64 with random weights, so that every number depends on all that it may."""
    layer = MaskedAutoregressive(features, hidden, **options).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(spread * torch.randn_like(p) / max(1, p.shape[-1]) ** 0.5)
    return layer


@pytest.fixture(params=CONFIGS)
def case(request):
    """(layer, x, context)"""
    torch.manual_seed(0)
    features, hidden, options = CONFIGS[request.param]
    size = options.get("context_features", 0)
    context = torch.randn(6, size, dtype=torch.float64) if size else None
    return made(features, hidden, **options), 1.5 * torch.randn(6, features, dtype=torch.float64), context


def by_passes(layer, y, context):
    """Invert with as many passes of the whole net as there are features."""
    x = torch.zeros_like(y)
    for _ in range(layer.features):
        params = layer.net(x, context).unflatten(-1, (layer.features, -1))
        if layer.transform == "affine":
            shift, scale = params.unbind(-1)
            log_scale = scale / (1 + scale.abs() / -torch.tensor(1e-3, dtype=y.dtype).log())
            x = (y - shift) * (-log_scale).exp()
            logdet = -log_scale.sum(-1)
        else:
            x, logdet = layer._spline(y, params, True, 1)
    return x, logdet


def test_inverse_is_that_of_many_passes(case):
    layer, x, context = case
    y, logdet = layer(x, context)
    assert y.shape == x.shape and logdet.shape == (6,) and not y.allclose(x)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            back, minus = layer.inverse(y, context)
        torch.testing.assert_close(back, x, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(minus, -logdet, atol=1e-8, rtol=1e-8)
        assert back.is_contiguous()
    # of a y that no x was mapped to by this rounding
    y = torch.randn_like(x)
    for got, want in zip(layer.inverse(y, context), by_passes(layer, y, context), strict=True):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


def test_features_depend_on_those_before_them(case):
    layer, x, context = case
    jacobian = torch.autograd.functional.jacobian(lambda v: layer(v[None], None if context is None else context[:1])[0],
                                                  x[0])[0]  # fmt: skip
    order = layer.net.order
    before = order[:, None] > order
    diagonal = torch.eye(layer.features, dtype=torch.bool)
    assert not jacobian[~before & ~diagonal].any() and jacobian.diagonal().gt(0).all()
    logdet = layer(x[:1], None if context is None else context[:1])[1][0]
    torch.testing.assert_close(jacobian.diagonal().log().sum(), logdet)


@pytest.mark.parametrize("name", ["eight", "eight, permuted", "eight, residual", "coupling", "wide"])
def test_features_depend_on_all_of_those_before_them(name):
    torch.manual_seed(0)
    features, hidden, options = CONFIGS[name]
    layer = made(features, hidden, activation="tanh", **options)
    jacobian = torch.autograd.functional.jacobian(layer.net, torch.randn(features, dtype=torch.float64))
    seen = jacobian.view(features, -1, features).abs().amax(1) > 0
    order = layer.net.order
    assert seen.equal(order[:, None] > order)


def test_context_reaches_every_feature():
    torch.manual_seed(0)
    for residual in (False, True):
        layer = made(4, (8, 8), context_features=2, residual=residual, activation="tanh")
        x = torch.zeros(4, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda c: layer(x, c)[0], torch.ones(2, dtype=torch.float64))
        assert (jacobian != 0).all()


@pytest.mark.parametrize("name", [name for name in CONFIGS if CONFIGS[name][2].get("context_features")])
def test_one_context_for_all_rows(name):
    torch.manual_seed(0)
    features, hidden, options = CONFIGS[name]
    layer, y = made(features, hidden, **options), torch.randn(7, features, dtype=torch.float64)
    one = torch.randn(options["context_features"], dtype=torch.float64, requires_grad=True)
    for function in (layer, layer.inverse):
        results = []
        for context in (one.expand(7, -1), one.repeat(7, 1)):
            outputs = function(y, context)
            gradients = torch.autograd.grad([o.sum() for o in outputs], [one, *layer.parameters()])
            with torch.no_grad():
                in_place = function(y, context)
            results.append([*outputs, *gradients, *in_place])
        torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)
    # the units that see the context alone are evaluated for one row
    with FlopCounterMode(display=False) as shared, torch.no_grad():
        layer.inverse(y, one.expand(7, -1))
    with FlopCounterMode(display=False) as own, torch.no_grad():
        layer.inverse(y, one.repeat(7, 1))
    most = own.get_total_flops() / 7 if features == 1 else own.get_total_flops() - 1
    assert shared.get_total_flops() <= most


def test_first_call_is_the_identity():
    torch.manual_seed(0)
    for transform in ("affine", "rq_spline"):
        for residual in (False, True):
            layer = MaskedAutoregressive(5, (8, 8), transform=transform, residual=residual)
            x = 2 * torch.randn(7, 5)
            y, logdet = layer(x)
            torch.testing.assert_close(y, x, atol=2e-6, rtol=2e-6)
            torch.testing.assert_close(logdet, torch.zeros(7), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("hidden", "residual", "scheduled", "one_pass"),
    [((64, 64, 64), False, 5453, 9728), ((64, 64), True, 10135, 17920)],
)
def test_multiply_adds_of_the_inverse(hidden, residual, scheduled, one_pass):
    layer, rows = MaskedAutoregressive(8, hidden, residual=residual), 3
    with torch.no_grad():
        for call, want in ((layer, one_pass), (layer.inverse, scheduled)):
            with FlopCounterMode(display=False) as counter:
                call(torch.randn(rows, 8))
            assert counter.get_total_flops() == 2 * rows * want


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("features", [1, 2, 3, 8])
def test_masks_are_those_of_nflows(features, residual):
    nflows = pytest.importorskip("nflows.transforms.made")
    torch.manual_seed(0)
    theirs = nflows.MADE(
        features, 12, num_blocks=2, output_multiplier=2, use_residual_blocks=residual, activation=F.elu
    ).double()
    hidden = (12,) * (2 if residual else 3)
    ours = MaskedAutoregressive(features, hidden, residual=residual, activation="elu").double()
    linears = [m for m in theirs.modules() if isinstance(m, nflows.MaskedLinear)]
    for layer, peer in zip(ours.net.layers, linears, strict=True):
        assert layer.mask.equal(peer.mask)
        layer.load_state_dict({"weight": peer.weight, "bias": peer.bias})
    x = torch.randn(5, features, dtype=torch.float64)
    torch.testing.assert_close(ours.net(x), theirs(x))


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 4, 3], [0, 0, 0, 1, 1, 1]])
def test_nets_are_those_of_zuko(order, context):
    zuko = pytest.importorskip("zuko")
    torch.manual_seed(0)
    # zuko divides the places by ceil(features / passes) = 1
    theirs = zuko.flows.MaskedAutoregressiveTransform(6, context, order=order, hidden_features=(13, 9)).double()
    ours = MaskedAutoregressive(6, (13, 9), order=order, context_features=context).double()
    for layer, peer in zip(ours.net.layers, list(theirs.hyper)[::2], strict=True):
        assert layer.mask.equal(peer.mask[:, : layer.in_features].double())
        state = {"weight": peer.weight[:, : layer.in_features], "bias": peer.bias}
        if layer.context is not None:
            state["context.weight"] = peer.weight[:, layer.in_features :]
        layer.load_state_dict(state)
    x = torch.randn(5, 6, dtype=torch.float64)
    c = torch.randn(5, context, dtype=torch.float64) if context else None
    y, logdet = theirs(c).call_and_ladj(x)
    for got, want in zip(ours(x, c), (y, logdet), strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(ours.inverse(y, c)[0], theirs(c).inv(y))


@pytest.mark.parametrize("transform", ["affine", "rq_spline"])
@pytest.mark.parametrize("residual", [False, True])
def test_gradients(transform, residual):
    torch.manual_seed(0)
    layer = made(3, (4, 4), transform=transform, residual=residual, context_features=1, activation="tanh", bins=3)
    x, context = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 1, dtype=torch.float64)
    inputs = (x.requires_grad_(), context.requires_grad_(), *layer.parameters())
    assert torch.autograd.gradcheck(lambda v, c, *_: layer(v, c), inputs)
    assert torch.autograd.gradcheck(lambda v, c, *_: layer.inverse(v, c), inputs)
    assert torch.autograd.gradgradcheck(lambda v: layer.inverse(v, context.detach()), (x,))


def test_gradients_of_the_inverse_are_those_of_many_passes():
    torch.manual_seed(0)
    layer = made(6, (10, 10), context_features=2)
    y, context = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    found = []
    for call in (layer.inverse, lambda y, c: by_passes(layer, y, c)):
        x, logdet = call(y, context)
        found.append(torch.autograd.grad(x.square().sum() + logdet.sum(), layer.parameters()))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_leading_dims_and_broadcast_context():
    torch.manual_seed(0)
    layer = made(3, (8,), context_features=2)
    x, context = torch.randn(4, 5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    y, logdet = layer(x, context)
    assert logdet.shape == (4, 5)
    for i in range(4):
        torch.testing.assert_close(layer(x[i], context)[0], y[i])
    for got, want in zip(layer.inverse(y, context), (x, -logdet), strict=True):
        torch.testing.assert_close(got, want)
    one, row = layer(x[0, 0], context)
    assert one.shape == (5, 3) and row.shape == (5,)
    torch.testing.assert_close(layer.inverse(x[0, 0], context)[0][2], layer.inverse(x[0, 0], context[2])[0])
    assert layer.inverse(x[0, 0], context[2])[1].shape == ()
    empty = x[:0]
    assert layer(empty, context)[1].shape == (0, 5) and layer.inverse(empty, context)[0].shape == (0, 5, 3)
    strided = torch.randn(3, 6, dtype=torch.float64).t()[::2]
    torch.testing.assert_close(layer.inverse(layer(strided, context[:3])[0], context[:3])[0], strided)


def test_transforms_and_compilation():
    torch.manual_seed(0)
    layer = made(4, (6, 6), transform="rq_spline", residual=True)
    x = torch.randn(5, 4, dtype=torch.float64)
    y, _ = layer(x)
    for call, v in ((layer, x), (layer.inverse, y)):
        want = call(v)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        for got, expected in zip(compiled(v), want, strict=True):
            torch.testing.assert_close(got, expected)
        with torch.no_grad():
            torch.testing.assert_close(compiled(v)[0], want[0])
            torch.testing.assert_close(torch.func.vmap(lambda row: call(row)[0])(v), want[0])
        jacobian = torch.func.jacrev(lambda row: call(row)[0])(v[0])
        torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(lambda row: call(row)[0], v[0]))
        torch.testing.assert_close(jacobian, torch.func.jacfwd(lambda row: call(row)[0])(v[0]))


def test_reversible_stack_gives_the_same_gradients():
    torch.manual_seed(0)
    layers = [made(4, (6, 6), order=range(4)[:: (-1) ** i], context_features=1) for i in range(3)]
    x, context = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    stacks = [ReversibleSequential(*copy.deepcopy(layers), recompute=recompute) for recompute in (False, True)]
    for stack in stacks:
        y, logdet = stack(x, context)
        (y.square().sum() + logdet.sum()).backward()
    for a, b in zip(stacks[0].parameters(), stacks[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_storage_dtype(dtype):
    torch.manual_seed(0)
    for transform in ("affine", "rq_spline"):
        layer = made(6, (8, 8), transform=transform, spread=0.1).to(dtype)
        x = torch.randn(5, 6).to(dtype)
        y, logdet = layer(x)
        back, minus = layer.inverse(y)
        assert y.dtype == back.dtype == dtype and logdet.dtype == minus.dtype == torch.float32
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(back, x, atol=tolerance, rtol=tolerance)
        # the order of 300 units does not survive a cast to bfloat16
        wide = MaskedAutoregressive(3, (300,)).to(dtype).double()
        x = torch.randn(5, 3, dtype=torch.float64)
        torch.testing.assert_close(wide.inverse(wide(x)[0])[0], x)


def test_state_dict_brings_the_order():
    torch.manual_seed(0)
    first = made(5, (9, 9), order=[4, 2, 0, 1, 3], residual=True)
    x = torch.randn(3, 5, dtype=torch.float64)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    assert not [name for name in state if "mask" in name or "sorting" in name]
    for order in (None, [4, 2, 0, 1, 3], [0, 0, 0, 1, 1]):
        second = MaskedAutoregressive(5, (9, 9), order=order, residual=True).double()
        second.load_state_dict(state)
        assert second(x)[0].equal(first(x)[0])
        torch.testing.assert_close(second.inverse(second(x)[0])[0], x)
    with torch.device("meta"):
        third = MaskedAutoregressive(5, (9, 9), residual=True).double()
    assert third(x.to("meta"))[0].is_meta and third.inverse(x.to("meta"))[0].shape == x.shape
    third.to_empty(device="cpu").load_state_dict(state)
    assert third(x)[0].equal(first(x)[0])
    third.reset_parameters()
    torch.testing.assert_close(third.inverse(x)[0], x)
    assert third.net.order.tolist() == [0, 1, 2, 3, 4]
    copied = copy.deepcopy(first)
    assert copied.inverse(x)[0].equal(first.inverse(x)[0])


def test_averaged_model():
    torch.manual_seed(0)
    layer, x = made(4, (6, 6), order=[2, 0, 3, 1]), torch.randn(3, 4, dtype=torch.float64)
    mean = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        mean.update_parameters(layer)
    torch.testing.assert_close(mean.module.inverse(x)[0], layer.inverse(x)[0])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    torch.manual_seed(0)
    layer, x = made(4, (8, 8), activation=name), torch.randn(3, 4, dtype=torch.float64)
    module = {"leaky_relu": nn.LeakyReLU, "relu": nn.ReLU, "elu": nn.ELU, "gelu": nn.GELU, "silu": nn.SiLU}.get(
        name, {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid}.get(name)
    )()
    v = x
    for i, linear in enumerate(layer.net.layers):
        v = F.linear(module(v) if i else v, linear.weight * linear.mask, linear.bias)
    torch.testing.assert_close(layer.net(x), v)
    torch.testing.assert_close(layer.inverse(layer(x)[0])[0], x)


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: MaskedAutoregressive(0, (4,)), ValueError, "features must be at least 1, got 0"),
        (lambda: MaskedAutoregressive(3, 4), TypeError, "hidden must be a tuple of widths, got int"),
        (lambda: MaskedAutoregressive(3, ()), ValueError, "hidden must have at least one width, got none"),
        (lambda: MaskedAutoregressive(3, (0,)), ValueError, "hidden must be at least 1, got 0"),
        (
            lambda: MaskedAutoregressive(3, (4,), transform="cubic"),
            ValueError,
            "transform must be one of affine, rq_spline, got 'cubic'",
        ),
        (
            lambda: MaskedAutoregressive(3, (4,), activation="sin"),
            ValueError,
            "activation must be one of relu, .*'sin'",
        ),
        (
            lambda: MaskedAutoregressive(3, (4,), order=[0]),
            ValueError,
            "order must have one place per feature, 3, got 1",
        ),
        (lambda: MaskedAutoregressive(3, (4,), order=2), TypeError, "order must be a sequence of integers, got int"),
        (lambda: MaskedAutoregressive(3, (4,), order=[0, 1, 1.5]), TypeError, "order must be an integer, got float"),
        (lambda: MaskedAutoregressive(3, (4,), residual="yes"), TypeError, "residual must be true or false, got str"),
        (lambda: MaskedAutoregressive(3, (4,), bins=1), ValueError, "bins must be at least 2, got 1"),
        (lambda: MaskedAutoregressive(4, (4,))(X), ValueError, r"x must have the shape \(..., 4\), got \(2, 3\)"),
        (
            lambda: MaskedAutoregressive(4, (4,)).inverse(X),
            ValueError,
            r"y must have the shape \(..., 4\), got \(2, 3\)",
        ),
        (
            lambda: MaskedAutoregressive(3, (4,))(X, X),
            ValueError,
            "context must be None with context_features=0, got Tensor",
        ),
        (
            lambda: MaskedAutoregressive(3, (4,), context_features=2)(X),
            ValueError,
            r"context must be a tensor \(..., 2\), got None",
        ),
        (
            lambda: MaskedAutoregressive(3, (4,), context_features=2).inverse(X, X),
            ValueError,
            r"context must have the shape \(..., 2\), got \(2, 3\)",
        ),
        (
            lambda: MaskedAutoregressive(3, (4,), context_features=3)(X, torch.zeros(5, 3)),
            ValueError,
            r"context must have leading dims that broadcast with those of the input, \(2,\), got \(5,\)",
        ),
    ],
)
def test_wrong_arguments(call, error, text):
    with pytest.raises(error, match=f"^MaskedAutoregressive: {text}"):
        call()
