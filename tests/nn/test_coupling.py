"""Coupling modules: splits, inverses, log-determinants, conditioning and masks."""

import pytest
import torch
from torch import nn

from pyflow.nn import AdditiveCoupling, AffineCoupling
from pyflow.nn._split import SPLITS, divide, join

SHAPES = {"half": (3, 6), "interleave": (3, 6), "channel": (3, 4, 3), "checkerboard": (3, 2, 4, 3)}


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
        return torch.tanh(y.movedim(-1, 1))


def layer_for(kind, split, shape, swap=False, context=0, **options):
    size = shape[1]
    first = size - size // 2
    kept, changed = (size, size) if split == "checkerboard" else (first, size - first)
    if swap:
        kept, changed = changed, kept
    net = Net(kept, changed * (1 if kind is AdditiveCoupling else 2), context)
    return kind(net, split=split, swap=swap, **options)


def jacobian_logdet(layer, x, **options):
    def alone(v):
        return layer(v[None], **options)[0].flatten()

    return torch.stack(
        [torch.linalg.slogdet(torch.autograd.functional.jacobian(alone, row).reshape(row.numel(), -1))[1] for row in x]
    )


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", [AdditiveCoupling, AffineCoupling])
def test_inverse_and_logdet(kind, split, swap):
    torch.manual_seed(0)
    shape = SHAPES[split]
    layer, x = layer_for(kind, split, shape, swap), torch.randn(shape, dtype=torch.float64)
    y, logdet = layer(x)
    back, minus = layer.inverse(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -logdet)
    torch.testing.assert_close(logdet, jacobian_logdet(layer, x))
    assert logdet.shape == (3,) and logdet.dtype == torch.float64
    assert (kind is AdditiveCoupling) == (logdet == 0).all()


@pytest.mark.parametrize("split", ["half", "interleave", "channel"])
@pytest.mark.parametrize("swap", [False, True])
def test_odd_length(split, swap):
    torch.manual_seed(0)
    shape = (4, 5, 2) if split == "channel" else (4, 5)
    layer, x = layer_for(AffineCoupling, split, shape, swap), torch.randn(shape, dtype=torch.float64)
    kept, changed, _ = divide("test", x, split, swap, None)
    assert (kept.shape[1], changed.shape[1]) == ((2, 3) if swap else (3, 2))
    assert join(kept, changed, split, swap).equal(x)
    y, logdet = layer(x)
    torch.testing.assert_close(layer.inverse(y)[0], x)
    torch.testing.assert_close(logdet, jacobian_logdet(layer, x))


@pytest.mark.parametrize("split", ["half", "interleave", "channel"])
def test_parts_are_views(split):
    x = torch.randn(2, 6, 3)
    kept, changed, _ = divide("test", x, split, False, None)
    assert kept._base is not None and kept.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert changed.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_kept_elements_do_not_change(split, swap):
    shape = SHAPES[split]
    layer, x = layer_for(AffineCoupling, split, shape, swap), torch.randn(shape, dtype=torch.float64)
    same = layer(x)[0] == x
    if split == "checkerboard":
        row, column = torch.arange(4)[:, None], torch.arange(3)
        expected = ((row + column) % 2 == int(swap)).expand(shape)
    else:
        kept = [0, 2, 4] if split == "interleave" else list(range(shape[1] // 2))
        expected = torch.zeros(shape, dtype=torch.bool)
        expected[:, [i for i in range(shape[1]) if (i in kept) != swap]] = True
    assert same.equal(expected)


@pytest.mark.parametrize("packing", ["shift_scale", "scale_shift", "interleaved"])
@pytest.mark.parametrize("scale_map", ["exp", "sigmoid", "tanh", "softsign"])
@pytest.mark.parametrize("shift_first", [False, True])
def test_options_reach_the_op(packing, scale_map, shift_first):
    x = torch.randn(3, 6, dtype=torch.float64)
    layer = layer_for(AffineCoupling, "half", x.shape, packing=packing, scale_map=scale_map, shift_first=shift_first)
    y, logdet = layer(x)
    torch.testing.assert_close(layer.inverse(y)[0], x)
    torch.testing.assert_close(logdet, jacobian_logdet(layer, x))
    for part in (packing, scale_map, "half"):
        assert part in repr(layer)


def test_context_reaches_the_net_positionally_and_by_name():
    x, context = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    layer = layer_for(AffineCoupling, "half", x.shape, context=2)
    y, _logdet = layer(x, context)
    assert y.equal(layer(x, context=context)[0])
    assert not y.equal(layer(x)[0])
    torch.testing.assert_close(layer.inverse(y, context=context)[0], x)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", [AdditiveCoupling, AffineCoupling])
def test_masked_elements_pass_through(kind, split):
    shape = SHAPES[split]
    layer, x = layer_for(kind, split, shape), torch.randn(shape, dtype=torch.float64)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[1:, -1] = True
    mask[2] = True
    y, logdet = layer(x, mask=mask)
    assert y[mask].equal(x[mask]) and logdet[2] == 0
    torch.testing.assert_close(y[0], layer(x)[0][0])
    torch.testing.assert_close(layer.inverse(y, mask=mask)[0], x)
    torch.testing.assert_close(logdet[1:2], jacobian_logdet(layer, x[1:2], mask=mask[1:2]))


def test_padding_mask_of_sequences():
    layer, x = layer_for(AffineCoupling, "channel", (3, 4, 5)), torch.randn(3, 4, 5, dtype=torch.float64)
    lengths = torch.tensor([5, 3, 0])
    padding = (torch.arange(5) >= lengths[:, None])[:, None]  # (B, 1, T)
    y, logdet = layer(x, mask=padding)
    torch.testing.assert_close(logdet[1], layer(x[1:2, :, :3])[1][0])
    assert logdet[2] == 0 and y[2].equal(x[2])


@pytest.mark.parametrize("split", SPLITS)
def test_gradients(split):
    shape = SHAPES[split]
    layer, x = layer_for(AffineCoupling, split, shape), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, *_: layer(v), (x, *layer.parameters()))
    assert torch.autograd.gradcheck(lambda v: layer.inverse(v), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_storage_dtype(dtype):
    layer = AffineCoupling(nn.Linear(2, 4, dtype=dtype))
    y, logdet = layer(torch.randn(3, 4, dtype=dtype))
    assert y.dtype == dtype and logdet.dtype == torch.float32
    y, logdet = AdditiveCoupling(nn.Linear(2, 2, dtype=dtype))(torch.randn(3, 4, dtype=dtype))
    assert y.dtype == dtype and logdet.dtype == torch.float32


def test_empty_batch():
    for split, shape in SHAPES.items():
        layer, x = layer_for(AffineCoupling, split, shape), torch.empty(0, *shape[1:], dtype=torch.float64)
        y, logdet = layer(x)
        assert y.shape == x.shape and logdet.shape == (0,)


@pytest.mark.parametrize("split", SPLITS)
def test_compiles_without_graph_breaks(split):
    shape = SHAPES[split]
    layer, x = layer_for(AffineCoupling, split, shape), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(x), layer(x), strict=True):
        torch.testing.assert_close(got, expected)
    sum(v.sum() for v in compiled(x)).backward()


def test_state_dict_roundtrip():
    first, second = (layer_for(AffineCoupling, "half", (3, 6)) for _ in range(2))
    x = torch.randn(3, 6, dtype=torch.float64)
    second.load_state_dict(first.state_dict())
    assert first(x)[0].equal(second(x)[0])
    assert set(first.state_dict()) == {"net.mix.weight", "net.mix.bias"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"split": "thirds"}, "split must be one of half, interleave, checkerboard, channel, got 'thirds'"),
        ({"packing": "both"}, "packing must be one of shift_scale, scale_shift, interleaved, got 'both'"),
        ({"scale_map": "relu"}, "scale_map must be one of exp, .*, got 'relu'"),
        ({"clamp": 0}, "clamp must be positive and finite, got 0"),
        ({"slope": 1.0}, r"slope must be in \(0, 1\), got 1.0"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(ValueError, match=f"AffineCoupling: {text}"):
        AffineCoupling(nn.Identity(), **options)


@pytest.mark.parametrize(
    ("split", "shape", "text"),
    [
        ("half", (3, 1), r"split half needs a shape \(B, D, ...\) with at least 2 elements along dim 1, got \(3, 1\)"),
        ("channel", (3, 4), r"split channel needs a shape \(B, C, ...\) .* got \(3, 4\)"),
        ("checkerboard", (3, 4, 4), r"split checkerboard needs images \(B, C, H, W\), got shape \(3, 4, 4\)"),
    ],
)
def test_wrong_inputs(split, shape, text):
    with pytest.raises(ValueError, match=f"AdditiveCoupling: {text}"):
        AdditiveCoupling(nn.Identity(), split=split)(torch.zeros(shape))
    with pytest.raises(TypeError, match="AdditiveCoupling: x must be a tensor, got list"):
        AdditiveCoupling(nn.Identity(), split=split)([1.0])


def test_wrong_net_output():
    with pytest.raises(ValueError, match="params must have the shape of x doubled along dim"):
        AffineCoupling(nn.Linear(2, 2))(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="mask must broadcast to the shape of x"):
        AffineCoupling(nn.Linear(2, 4))(torch.zeros(3, 4), mask=torch.zeros(3, 5, dtype=torch.bool))


@pytest.mark.parametrize("split", ["half", "interleave", "channel", "checkerboard"])
@pytest.mark.parametrize("inverse", [False, True])
def test_nonfinite_padding_does_not_reach_the_weights(split, inverse):
    torch.manual_seed(0)
    net = torch.nn.Conv2d(*((4, 8) if split == "checkerboard" else (2, 4)), 1)
    layer = AffineCoupling(net, split=split, scale_map="tanh")
    mask = (torch.arange(6) >= 4).expand(3, 1, 5, 6)
    found = []
    for padding in (0.0, torch.nan, torch.inf):
        x = torch.where(mask, padding, torch.linspace(-1, 1, 360).view(3, 4, 5, 6))
        y, logdet = (layer.inverse if inverse else layer)(x, mask=mask)
        assert torch.where(mask, y, 0).nan_to_num(1).equal(torch.where(mask, x, 0).nan_to_num(1))
        found.append(torch.autograd.grad(torch.where(mask, 0, y).square().sum() + logdet.sum(), net.parameters()))
    for zeros, *others in zip(*found, strict=True):
        assert zeros.isfinite().all() and all(other.equal(zeros) for other in others)


@pytest.mark.parametrize("split", ["half", "interleave", "checkerboard"])
@pytest.mark.parametrize("method", ["forward", "inverse"])
def test_net_that_changes_its_input(split, method):
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(*((2, 4) if split == "checkerboard" else (1, 2)), 1))
    layer = AffineCoupling(net, split=split)
    x = torch.randn(3, 2, 4, 4)
    with torch.no_grad():
        if split != "checkerboard":
            with pytest.raises(RuntimeError, match=r"^AffineCoupling: net must not change its input in place"):
                getattr(layer, method)(x)
            return
        # its net gets a copy
        before = x.clone()
        getattr(layer, method)(x)
        assert torch.equal(x, before)
