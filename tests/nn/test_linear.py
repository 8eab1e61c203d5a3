"""ActNorm, Scale and the 1x1 convolution."""

import copy
import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyflow.nn import ActNorm, Invertible1x1Conv, Scale

SHAPES = [(5, 3), (5, 3, 4), (5, 3, 4, 2)]


def jacobian_logdet(layer, x):
    rows = [torch.autograd.functional.jacobian(lambda v: layer(v[None])[0].flatten(), row) for row in x]
    return torch.stack([torch.linalg.slogdet(j.reshape(x[0].numel(), -1))[1] for j in rows])


def perturbed(layer):
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def layers(shape):
    return [ActNorm(shape[1]), Invertible1x1Conv(shape[1]), Scale(shape[1:])]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", range(3))
def test_inverse_logdet_and_gradients(shape, kind):
    torch.manual_seed(0)
    layer = layers(shape)[kind].eval()
    layer, x = perturbed(layer), torch.randn(shape, dtype=torch.float64)
    y, logdet = layer(x)
    back, minus = layer.inverse(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -logdet)
    torch.testing.assert_close(logdet, jacobian_logdet(layer, x))
    assert logdet.shape == shape[:1] and logdet.dtype == torch.float64
    assert torch.autograd.gradcheck(lambda v, *_: layer(v), (x.requires_grad_(), *layer.parameters()))
    assert torch.autograd.gradcheck(lambda v, *_: layer.inverse(v), (x, *layer.parameters()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", range(3))
def test_masked_elements_pass_through(shape, kind):
    torch.manual_seed(0)
    layer = layers(shape)[kind].eval()
    layer, x = perturbed(layer), torch.randn(shape, dtype=torch.float64)
    mask = torch.zeros(shape[0], 1, *shape[2:], dtype=torch.bool)
    mask[0, ..., -1:] = True
    y, logdet = layer(x, mask=mask)
    assert y[mask.expand_as(y)].equal(x[mask.expand_as(x)])
    torch.testing.assert_close(logdet[0], jacobian_logdet(lambda v: layer(v, mask=mask[:1]), x[:1])[0])
    torch.testing.assert_close(y[1:], layer(x[1:])[0])
    torch.testing.assert_close(layer.inverse(y, mask=mask)[0], x)


@pytest.mark.parametrize("shape", SHAPES)
def test_actnorm_standardises_its_first_batch(shape):
    torch.manual_seed(0)
    layer, x = ActNorm(3), torch.randn(shape) * 7 + 3
    dims = [d for d in range(len(shape)) if d != 1]
    y, _ = layer(x)
    torch.testing.assert_close(y.mean(dims), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(dims, correction=0), torch.ones(3))
    before = copy.deepcopy(layer.state_dict())
    layer(x * 2)
    assert all(before[key].equal(value) for key, value in layer.state_dict().items())


def test_initialisation_ignores_masked_elements():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6)
    padding = torch.arange(6) >= torch.tensor([6, 4, 2, 1])[:, None, None]
    layer, other = ActNorm(3), ActNorm(3)
    y, _ = layer(torch.where(padding, torch.nan, x), mask=padding)
    other(torch.cat([x[i, :, : (~padding[i]).sum()] for i in range(4)], 1)[None])
    torch.testing.assert_close(layer.shift, other.shift)
    torch.testing.assert_close(layer.log_scale, other.log_scale)
    assert not y[~padding.expand_as(y)].isnan().any()


@pytest.mark.parametrize("make", [lambda: ActNorm(3), lambda: Scale(3, data_init=True)])
def test_initialisation_needs_training_data_and_is_kept_by_the_state_dict(make):
    layer, x = make(), 5 * torch.randn(8, 3)
    assert layer.eval()(x)[0].equal(x)
    layer.train()(x[:0])
    assert not layer.initialized
    layer(x)
    assert layer.initialized
    copied = make()
    copied.load_state_dict(layer.state_dict())
    assert copied(10 * x)[0].equal(layer(10 * x)[0])
    untouched = make()
    copied.load_state_dict(untouched.state_dict())
    copied(x)
    torch.testing.assert_close(copied.log_scale, layer.log_scale)


@pytest.mark.parametrize("make", [lambda: ActNorm(3), lambda: Scale(3, data_init=True)])
def test_flag_written_in_place_is_noticed(make):
    torch.manual_seed(0)
    layer, x = make(), 5 * torch.randn(64, 3) + 2
    other, moved = copy.deepcopy(layer), copy.deepcopy(layer)
    layer(x)
    with torch.no_grad():
        for mine, theirs in zip(
            [*other.parameters(), *other.buffers()], [*layer.parameters(), *layer.buffers()], strict=True
        ):
            mine.copy_(theirs)
    assert not other.awaits_data and other(x[:4])[0].equal(layer(x[:4])[0])
    assert moved.awaits_data and not moved.eval().awaits_data
    # functional_call replaces the layer's tensors
    swapped = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    assert torch.func.functional_call(moved.train(), swapped, (x[:4],))[0].equal(layer(x[:4])[0])
    moved(x)
    torch.testing.assert_close(moved.log_scale, layer.log_scale)


@pytest.mark.parametrize("make", [lambda: ActNorm(3), lambda: Scale(3, data_init=True)])
@pytest.mark.parametrize("keep", [slice(0, 0), slice(None)])
def test_empty_or_fully_masked_batch_initialises_nothing(make, keep):
    layer, x = make(), torch.randn(8, 3)[keep]
    layer(x, mask=torch.ones(x.shape, dtype=torch.bool))
    assert layer.awaits_data and not layer.log_scale.any()
    layer.initialize(x, torch.ones(x.shape, dtype=torch.bool))
    assert layer.awaits_data and not layer.log_scale.any()


def test_a_channel_without_data_keeps_its_parameters():
    torch.manual_seed(0)
    layer, x = ActNorm(3), 5 * torch.randn(8, 3, 4) + 2
    y, logdet = layer(x, mask=torch.tensor([False, True, False])[:, None])
    assert layer.initialized and layer.shift[1] == layer.log_scale[1] == 0 and logdet.isfinite().all()
    torch.testing.assert_close(y[:, [0, 2]].std((0, 2), correction=0), torch.ones(2))


class Reads(TorchDispatchMode):
    """Counts the operators that make the host wait for a value."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mask", [None, torch.zeros(8, 1, dtype=torch.bool)])
def test_host_reads_the_flag_only_until_initialised(mask):
    layer, x = ActNorm(3), torch.randn(8, 3)
    layer.load_state_dict(copy.deepcopy(layer).state_dict())
    with Reads() as reads:
        layer.eval()(x, mask=mask)
    assert not reads.count
    with Reads() as reads:
        layer.train()(x, mask=mask)
        layer(x, mask=mask)
        layer(x, mask=mask)
    assert reads.count == 1


@pytest.mark.parametrize("make", [lambda: ActNorm(3), lambda: Scale(3, data_init=True)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bad", ["one sample", "nan", "inf"])
def test_unusable_batch_initialises_nothing(make, masked, bad):
    torch.manual_seed(0)
    layer, x = make(), 5 * torch.randn(8, 3) + 2
    mask = torch.zeros(8, 1, dtype=torch.bool) if masked else None
    if bad == "one sample":
        first = x[:1]
    else:
        first = x.clone()
        first[3, 1] = float(bad)
    layer(first, mask=None if mask is None else mask[: len(first)])
    assert layer.awaits_data and layer.may_start and not any(p.any() for p in layer.parameters())
    y, _ = layer(x, mask=mask)
    assert not layer.awaits_data
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(3))


@pytest.mark.parametrize("masked", [False, True])
def test_large_values_initialise_without_overflow(masked):
    torch.manual_seed(0)
    x = torch.randn(64, 3) * torch.tensor([1e20, 1e30, 1.0])
    y, logdet = ActNorm(3)(x, mask=torch.zeros(64, 1, dtype=torch.bool) if masked else None)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(3))
    assert logdet.isfinite().all()


def test_a_look_without_data_starts_nothing():
    layer = ActNorm(3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.randn(8, 3))[0].shape == (8, 3)
    assert layer.awaits_data and layer.may_start


@pytest.mark.parametrize("kind", range(4))
def test_from_meta_by_reset_parameters(kind):
    torch.manual_seed(0)
    shape, make = (5, 3, 4), lambda: [*layers((5, 3, 4)), Scale((3, 4), data_init=True)][kind]
    with torch.device("meta"):
        layer = make()
    layer.to_empty(device="cpu")
    for tensor in [*layer.parameters(), *layer.buffers()]:
        tensor.detach().fill_(torch.nan)
    layer.reset_parameters()
    x, plain = 5 * torch.randn(shape), make()
    assert plain.state_dict().keys() == layer.state_dict().keys()
    y, logdet = layer(x)
    torch.testing.assert_close(layer.inverse(y)[0], x, atol=1e-5, rtol=1e-5)
    if kind != 1:
        assert y.equal(plain(x)[0]) and logdet.equal(plain(x)[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("inverse", [False, True])
def test_masked_values_reach_no_parameter(shape, kind, inverse):
    torch.manual_seed(0)
    layer = layers(shape)[kind].eval()
    mask = torch.zeros(shape[0], 1, *shape[2:], dtype=torch.bool)
    mask[0, ..., -1:] = True
    found = []
    for padding in (0.0, torch.nan, torch.inf):
        x = torch.where(mask, padding, torch.linspace(-1, 1, math.prod(shape)).view(shape))
        y, logdet = (layer.inverse if inverse else layer)(x, mask=mask)
        found.append(torch.autograd.grad(torch.where(mask, 0, y).square().sum() + logdet.sum(), layer.parameters()))
    for zeros, *others in zip(*found, strict=True):
        assert zeros.isfinite().all() and all(other.equal(zeros) for other in others)


def test_logdet_is_writable():
    for layer in layers((5, 3, 4)):
        _, logdet = layer(torch.randn(5, 3, 4))
        logdet += 1


def test_initialised_layer_does_not_read_the_data():
    layer, x = ActNorm(3), torch.randn(8, 3)
    layer(x)
    layer.initialize = layer.start = None
    layer(x)


def test_ensembles_initialise_and_run_under_vmap():
    torch.manual_seed(0)
    layers, x = [ActNorm(3) for _ in range(4)], torch.randn(4, 16, 3) * torch.arange(1.0, 5)[:, None, None]
    stacked = torch.func.stack_module_state(layers)
    base = ActNorm(3).to("meta")
    one = lambda state, x: torch.func.functional_call(base, state, (x,))[0]
    got = torch.func.vmap(one)(stacked, x)
    for layer, part, y in zip(layers, x, got, strict=True):
        torch.testing.assert_close(y, layer(part)[0])
    assert stacked[1]["initialized"].tolist() == [1] * 4


def test_scale_starts_at_zero_or_from_data():
    torch.manual_seed(0)
    x = torch.randn(100, 4) * torch.tensor([0.0, 0.1, 1.0, 10.0])
    assert Scale(4)(x)[0].equal(x)
    y, logdet = Scale(4, data_init=True, std=2.0, eps=0.01)(x)
    torch.testing.assert_close(y.std(0, correction=0)[1:], torch.full((3,), 2.0))
    assert logdet.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", range(3))
def test_storage_dtype_and_autocast(kind, dtype):
    layer, x = layers((5, 3, 4, 2))[kind], torch.randn(5, 3, 4, 2).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, logdet = layer(x)
        back, _ = layer.inverse(y)
    assert y.dtype == dtype and logdet.dtype == torch.float32
    torch.testing.assert_close(back, x, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0)


def test_convolution_starts_as_a_rotation():
    torch.manual_seed(0)
    layer = Invertible1x1Conv(16)
    weight = layer.weight()
    torch.testing.assert_close(weight @ weight.mT, torch.eye(16), atol=1e-5, rtol=0)
    x = torch.randn(2, 16, 3, 3)
    torch.testing.assert_close(layer(x)[0], torch.nn.functional.conv2d(x, weight[:, :, None, None]), atol=1e-5, rtol=0)
    torch.testing.assert_close(layer(x)[1], 9 * torch.linalg.slogdet(weight)[1].expand(2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", range(3))
def test_compiles_without_graph_breaks(kind):
    torch.manual_seed(0)
    layer, x = layers((5, 3, 4, 2))[kind], torch.randn(5, 3, 4, 2, requires_grad=True)
    plain = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for got, expected in zip(compiled(x), plain(x), strict=True):
            torch.testing.assert_close(got, expected)
    sum(v.sum() for v in compiled(x)).backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", range(3))
def test_state_dict_roundtrip(kind):
    first, second = layers((5, 3, 4))[kind], layers((5, 3, 4))[kind]
    x = torch.randn(5, 3, 4)
    first(x)
    second.load_state_dict(first.state_dict())
    assert first(x)[0].equal(second(x)[0])


@pytest.mark.parametrize("kind", range(3))
def test_empty_batch(kind):
    y, logdet = layers((5, 3, 4))[kind](torch.empty(0, 3, 4))
    assert y.shape == (0, 3, 4) and logdet.shape == (0,)


def test_wrong_inputs():
    with pytest.raises(ValueError, match=r"ActNorm: x must have the shape \(B, 3, ...\), got \(5, 4\)"):
        ActNorm(3)(torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"Scale: x must have the shape \(B, 3, 2\), got \(5, 3\)"):
        Scale((3, 2))(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"Invertible1x1Conv: x must have the shape \(B, 3, ...\), got \(5, 4\)"):
        Invertible1x1Conv(3)(torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"mask must have size 1 along dim 1, got shape \(5, 3, 2\)"):
        Invertible1x1Conv(3)(torch.zeros(5, 3, 2), mask=torch.zeros(5, 3, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match="Invertible1x1Conv: mask must be a tensor, got bool"):
        Invertible1x1Conv(3)(torch.zeros(5, 3), mask=True)
    with pytest.raises(TypeError, match="ActNorm: x must be float32, float64, bfloat16 or float16, got int64"):
        ActNorm(3)(torch.zeros(5, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="ActNorm: features must be at least 1, got 0"):
        ActNorm(0)
    with pytest.raises(TypeError, match="Invertible1x1Conv: channels must be an integer, got float"):
        Invertible1x1Conv(2.0)
    with pytest.raises(ValueError, match="Scale: std must be positive and finite, got 0"):
        Scale(3, std=0)


def test_backward_under_autocast_is_not_cast():
    torch.manual_seed(0)
    layer, x = Invertible1x1Conv(8), torch.randn(4, 8, requires_grad=True)
    leaves = [x, *layer.parameters()]

    def run():
        y, logdet = layer(x)
        return torch.autograd.grad(y.cos().sum() + logdet.sum(), leaves)

    want = run()
    with torch.autocast("cpu", torch.bfloat16):
        got = run()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
