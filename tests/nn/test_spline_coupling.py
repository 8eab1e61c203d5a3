"""SplineCoupling: inverses, log-determinants, layout of the parameters, conditioning, masks, memory-free stacks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pyflow.nn import ReversibleSequential, SplineCoupling
from pyflow.nn._split import SPLITS, divide, join

SHAPES = {"half": (3, 6), "interleave": (3, 5), "channel": (3, 4, 3), "checkerboard": (3, 2, 4, 3)}


class Net(nn.Module):
    """Maps any number of features in dim 1, plus optional context, to `outputs` features."""

    def __init__(self, inputs, outputs, context=0):
        super().__init__()
        self.mix = nn.Linear(inputs, outputs, dtype=torch.float64)
        self.context = nn.Linear(context, outputs, dtype=torch.float64) if context else None

    def forward(self, x, context=None):
        y = self.mix(x.movedim(1, -1))
        if context is not None:
            y = y + self.context(context)
        return 3 * torch.tanh(y.movedim(-1, 1))


def count_of(bins, tails):
    return 2 * bins + {"linear": bins - 1, "circular": bins}.get(tails, bins + 1)


def layer_for(split, swap=False, bins=4, tails="linear", context=0, **options):
    size = SHAPES[split][1]
    first = size - size // 2
    kept, changed = (size, size) if split == "checkerboard" else (first, size - first)[:: -1 if swap else 1]
    net = Net(kept, changed * count_of(bins, tails), context)
    return SplineCoupling(net, split=split, swap=swap, bins=bins, tails=tails, **options)


def data(split, tails="linear", seed=0):
    torch.manual_seed(seed)
    shape = SHAPES[split]
    return torch.rand(shape, dtype=torch.float64) if tails is None else 2 * torch.randn(shape, dtype=torch.float64)


def jacobian_logdet(layer, x, **options):
    def alone(v):
        return layer(v[None], **options)[0].flatten()

    return torch.stack(
        [torch.linalg.slogdet(torch.autograd.functional.jacobian(alone, row).reshape(row.numel(), -1))[1] for row in x]
    )


@pytest.mark.parametrize("tails", ["linear", "circular", None])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_inverse_and_logdet(split, swap, tails):
    layer, x = layer_for(split, swap, tails=tails), data(split, tails)
    y, logdet = layer(x)
    back, minus = layer.inverse(y)
    torch.testing.assert_close(back, x, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(minus, -logdet, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(logdet, jacobian_logdet(layer, x))
    assert logdet.shape == (3,) and logdet.dtype == torch.float64 and (logdet != 0).all()


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_kept_elements_do_not_change(split, swap):
    layer, x = layer_for(split, swap), data(split).clamp(-2.9, 2.9)
    same = layer(x)[0] == x
    if split == "checkerboard":
        row, column = torch.arange(4)[:, None], torch.arange(3)
        expected = ((row + column) % 2 == int(swap)).expand(x.shape)
    else:
        kept = torch.ones_like(divide("test", x, split, swap, None)[0], dtype=torch.bool)
        changed = torch.zeros_like(divide("test", x, split, swap, None)[1], dtype=torch.bool)
        expected = join(kept, changed, split, swap)
    assert same.equal(expected)


def test_parameters_of_a_feature_are_next_to_each_other():
    layer, x = layer_for("half"), data("half").clamp(-2.9, 2.9)
    before = layer(x)[0]
    with torch.no_grad():
        layer.net.mix.bias[11:22] += 1
    changed = (layer(x)[0] != before).any(0)
    assert changed.tolist() == [False] * 4 + [True, False]


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 2, 3)], ids=["vectors", "images"])
def test_equals_nflows(shape):
    nflows = pytest.importorskip("nflows.transforms.coupling")
    torch.manual_seed(0)
    conv = len(shape) == 4
    make = (lambda a, b: nn.Conv2d(a, b, 1)) if conv else nn.Linear
    net = make(3, 3 * 23).double()

    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, context=None):
            return self.net(x).clone()

    theirs = nflows.PiecewiseRationalQuadraticCouplingTransform(
        [-1, -1, -1, 1, 1, 1], lambda a, b: Theirs(), num_bins=8, tails="linear", tail_bound=3.0
    ).double()
    ours, x = SplineCoupling(net), 2 * torch.randn(shape, dtype=torch.float64)
    for got, want in zip(ours(x), theirs(x), strict=True):
        torch.testing.assert_close(got, want)


def test_list_of_tails_and_variants():
    x = data("half")
    layer = layer_for("half", tails=None)
    listed = SplineCoupling(layer.net, bins=4, tails=["linear", "circular", "linear"])
    y, logdet = listed(x)
    torch.testing.assert_close(listed.inverse(y)[0], x, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(logdet, jacobian_logdet(listed, x))
    found = [layer_for("half", variant=name) for name in ("nflows", "zuko")]
    found[1].load_state_dict(found[0].state_dict())
    assert not found[0](x)[0].allclose(found[1](x)[0])
    for part in ("bins=4", "bound=3.0", "tails='linear'", "variant='zuko'", "split='half'"):
        assert part in repr(found[1])


def test_context_reaches_the_net_positionally_and_by_name():
    layer, x, context = layer_for("half", context=2), data("half"), torch.randn(3, 2, dtype=torch.float64)
    y, _ = layer(x, context)
    assert y.equal(layer(x, context=context)[0]) and not y.equal(layer(x)[0])
    torch.testing.assert_close(layer.inverse(y, context=context)[0], x)


@pytest.mark.parametrize("split", SPLITS)
def test_masked_elements_pass_through(split):
    layer, x = layer_for(split), data(split)
    mask = torch.zeros(x.shape, dtype=torch.bool)
    mask[1:, -1] = True
    mask[2] = True
    y, logdet = layer(x, mask=mask)
    assert y[mask].equal(x[mask]) and logdet[2] == 0
    torch.testing.assert_close(y[0], layer(x)[0][0])
    torch.testing.assert_close(layer.inverse(y, mask=mask)[0], x)
    torch.testing.assert_close(logdet[1:2], jacobian_logdet(layer, x[1:2], mask=mask[1:2]))
    x = torch.where(mask, torch.nan, x)
    y, logdet = layer(x, mask=mask)
    grads = torch.autograd.grad(y[~mask].sum() + logdet.sum(), layer.net.parameters())
    assert logdet.isfinite().all() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("split", SPLITS)
def test_gradients(split):
    layer, x = layer_for(split, bins=2), data(split).requires_grad_()
    assert torch.autograd.gradcheck(lambda v, *_: layer(v), (x, *layer.parameters()))
    assert torch.autograd.gradcheck(lambda v: layer.inverse(v), (x,))


def test_reversible_stack_gives_the_same_gradients():
    torch.manual_seed(0)
    layers = [SplineCoupling(Net(3, 33), bins=4, swap=i % 2 == 1, bound=5.0) for i in range(4)]
    plain = ReversibleSequential(*layers, recompute=False)
    rebuilt = ReversibleSequential(*copy.deepcopy(layers))
    x = data("half")
    for stack in (plain, rebuilt):
        y, logdet = stack(x)
        (y.square().sum() + logdet.sum()).backward()
    for a, b in zip(plain.parameters(), rebuilt.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_storage_dtype(dtype):
    layer = SplineCoupling(nn.Linear(2, 46, dtype=dtype))
    y, logdet = layer(torch.randn(3, 4, dtype=dtype))
    assert y.dtype == dtype and logdet.dtype == torch.float32


def test_empty_batch():
    for split in SPLITS:
        x = torch.empty(0, *SHAPES[split][1:], dtype=torch.float64)
        y, logdet = layer_for(split)(x)
        assert y.shape == x.shape and logdet.shape == (0,)


@pytest.mark.parametrize("split", SPLITS)
def test_compiles_without_graph_breaks(split):
    layer, x = layer_for(split), data(split).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(x), layer(x), strict=True):
        torch.testing.assert_close(got, expected)
    sum(v.sum() for v in compiled(x)).backward()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"split": "thirds"}, ValueError, "split must be one of half, interleave, checkerboard, channel, got 'thirds'"),
        ({"bins": 1}, ValueError, "bins must be at least 2, got 1"),
        ({"bins": 4.0}, TypeError, "bins must be an integer, got float"),
        ({"bound": 0.0}, ValueError, "bound must be positive and finite, got 0.0"),
        ({"tails": "round"}, ValueError, "tails must be one of linear, circular, got 'round'"),
        ({"variant": "pyro"}, ValueError, "variant must be one of nflows, normflows, zuko, got 'pyro'"),
    ],
)
def test_wrong_options(options, error, text):
    with pytest.raises(error, match=f"SplineCoupling: {text}"):
        SplineCoupling(nn.Identity(), **options)


def test_wrong_net_output():
    text = (
        r"SplineCoupling: net must return 23 numbers for each element that changes, the shape \(3, 46\), got \(3, 4\)"
    )
    with pytest.raises(ValueError, match=text):
        SplineCoupling(nn.Linear(2, 4))(torch.zeros(3, 4))
    with pytest.raises(TypeError, match="SplineCoupling: net must be a module, got NoneType"):
        SplineCoupling(None)
    with pytest.raises(ValueError, match="rq_spline: tails must name one per feature of x, 2, got 1"):
        SplineCoupling(nn.Linear(2, 50), tails=["linear"])(torch.zeros(3, 4))
