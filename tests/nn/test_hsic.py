"""nHSIC against its formula, the loss, and training layer by layer."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import pyflow
from pyflow.nn import HSICBottleneck, HSICLoss
from pyflow.ops import hsic, nhsic


def data(n=20, dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(n, 3, dtype=dtype)
    return x, x[:, :1] ** 2 + 0.1 * torch.randn(n, 1, dtype=dtype)


def formula(k, m, epsilon):
    n = len(k)
    h = torch.eye(n, dtype=k.dtype) - 1 / n
    ridge = epsilon * n * torch.eye(n, dtype=k.dtype)
    first, second = (h @ g @ h @ torch.linalg.inv(h @ g @ h + ridge) for g in (k, m))
    return torch.trace(first @ second)


def rbf(x, sigma):
    return (-torch.cdist(x, x).square() / (2 * sigma**2)).exp()


@pytest.mark.parametrize("epsilon", [1e-5, 1e-2])
@pytest.mark.parametrize("sigma", [0.7, 20.0])
def test_nhsic_equals_its_formula(epsilon, sigma):
    x, y = data()
    expected = formula(rbf(x, sigma), rbf(y, 1.1), epsilon)
    value = nhsic(x, y, epsilon=epsilon, bandwidth=sigma, bandwidth_y=1.1)
    torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-8)
    single = nhsic(x.float(), y.float(), epsilon=epsilon, bandwidth=sigma, bandwidth_y=1.1)
    assert single.dtype == torch.float32 and single.item() == pytest.approx(expected.item(), rel=1e-3)
    batch = nhsic(torch.stack((x, 2 * x)), y, epsilon=epsilon, bandwidth=sigma, bandwidth_y=1.1)
    torch.testing.assert_close(batch[0], value)


def test_nhsic_of_other_kernels():
    x, y = data()
    torch.testing.assert_close(
        nhsic(x, y, kernel="linear", epsilon=1e-3), formula(x @ x.T, y @ y.T, 1e-3), rtol=1e-9, atol=1e-9
    )
    k = (x @ x.T / 3 + 1) ** 3
    labels = torch.arange(20) % 4
    same = (labels[:, None] == labels).double()
    torch.testing.assert_close(
        nhsic(x, labels, kernel="polynomial", kernel_y="delta"), formula(k, same, 1e-5), rtol=1e-7, atol=1e-7
    )


def test_nhsic_counts_shared_directions():
    x, y = data()
    own = nhsic(x, x)
    assert 0 < nhsic(x, y) < own <= len(x) - 1
    assert nhsic(x, torch.ones(20, 1, dtype=x.dtype)).abs() < 1e-9
    # four labels: three directions
    labels = torch.arange(20) % 4
    assert nhsic(labels, labels, kernel="delta").item() == pytest.approx(3, abs=1e-3)


def test_nhsic_gradients():
    x, y = data(8)
    sigma = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    inputs = (x.requires_grad_(), y.requires_grad_(), sigma)
    function = lambda x, y, s: nhsic(x, y, epsilon=0.1, bandwidth=s)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_nhsic_wrong_arguments():
    x, y = data()
    for error, text, arguments, options in (
        (ValueError, "nhsic: epsilon must be positive and finite, got 0", (x, y), {"epsilon": 0}),
        (ValueError, "nhsic: all inputs must have the same number of rows, got 20 and 5", (x, y[:5]), {}),
        (ValueError, "nhsic: the biased estimator needs at least 2 rows, got 1", (x[:1], y[:1]), {}),
        (ValueError, "nhsic: bandwidth must be positive and finite, got -1", (x, y), {"bandwidth": -1}),
        (TypeError, "nhsic: x must be a tensor, got list", ([1.0], y), {}),
        (ValueError, "nhsic: x must be finite, got NaN or infinity", (x / 0, y), {}),
    ):
        with pytest.raises(error) as raised:
            nhsic(*arguments, **options)
        assert str(raised.value) == text


def test_loss_is_hsic_of_flattened_batches():
    x, y = data()
    images = x.reshape(20, 1, 3).expand(20, 2, 3)
    loss = HSICLoss(estimator="unbiased", normalize=True, kernel_y="linear")
    expected = hsic(images.flatten(1), y, estimator="unbiased", normalize=True, kernel_y="linear")
    assert loss(images, y[:, 0]).equal(expected)
    assert "estimator='unbiased'" in repr(loss)
    with pytest.raises(ValueError, match="HSICLoss: estimator must be one of biased, biased_n2, unbiased, got 'v'"):
        HSICLoss(estimator="v")


def test_loss_with_a_learned_bandwidth():
    x, y = data()
    loss = HSICLoss(bandwidth=nn.Parameter(torch.tensor(1.0)), bandwidth_y=1.0)
    assert [*dict(loss.named_parameters())] == ["bandwidth"] and [*loss.state_dict()] == ["bandwidth"]
    loss(x.float(), y.float()).backward()
    assert loss.bandwidth.grad.abs() > 0


def test_minimising_the_loss_gives_independence():
    torch.manual_seed(0)
    x = torch.randn(200, 2)
    nuisance = x[:, :1] + 0.1 * torch.randn(200, 1)
    layer = nn.Linear(2, 1)
    loss, optimizer = HSICLoss(normalize=True), torch.optim.Adam(layer.parameters(), lr=0.05)
    before = loss(layer(x), nuisance).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss(layer(x), nuisance).backward()
        optimizer.step()
    assert loss(layer(x), nuisance).item() < 0.1 * before
    # the layer reads the other column only
    assert layer.weight[0, 1].abs() > 10 * layer.weight[0, 0].abs()


def blocks(*widths):
    return [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(widths)]


def test_no_gradient_between_layers():
    torch.manual_seed(0)
    x, y = torch.randn(16, 4), torch.arange(16) % 3
    model = HSICBottleneck(blocks(4, 6, 5), nn.Linear(5, 3), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    model.update(x, y)
    z = x
    for layer in model.layers:
        weight = layer[0].weight
        expected = torch.autograd.grad(model.objective(layer(z), x, y), weight)[0]
        torch.testing.assert_close(weight.grad, expected)
        z = layer(z).detach()
    expected = torch.autograd.grad(nn.functional.cross_entropy(model.head(z), y), model.head.weight)[0]
    torch.testing.assert_close(model.head.weight.grad, expected)


def test_objective_equals_the_papers_formula():
    torch.manual_seed(0)
    x, y, z = torch.randn(16, 4).double(), torch.arange(16) % 3, torch.randn(16, 5).double()
    model = HSICBottleneck(blocks(4, 5), beta=7.0, sigma=2.0, epsilon=1e-3)
    kz, kx = rbf(z, 2 * math.sqrt(5)), rbf(x, 2 * math.sqrt(4))
    ky = (y[:, None] == y).double()
    torch.testing.assert_close(model.objective(z, x, y), formula(kz, kx, 1e-3) - 7 * formula(kz, ky, 1e-3))
    target = torch.randn(16, 2).double()
    kt = rbf(target, 2 * math.sqrt(2))
    torch.testing.assert_close(model.objective(z, x, target), formula(kz, kx, 1e-3) - 7 * formula(kz, kt, 1e-3))


def test_bottleneck_learns():
    torch.manual_seed(0)
    x = torch.randn(128, 2)
    y = (x[:, 0] * x[:, 1] > 0).long()  # not linearly separable
    optimizer = lambda p: torch.optim.Adam(p, lr=5e-3)
    model = HSICBottleneck(blocks(2, 32, 32), nn.Linear(32, 2), optimizer=optimizer)
    losses = [model.update(x, y) for _ in range(100)]
    assert losses[0].shape == (3,) and not losses[0].requires_grad
    assert (losses[-1] < losses[0]).all()
    assert (model(x).argmax(1) == y).float().mean() > 0.9


def test_layers_without_parameters_and_without_a_head():
    model = HSICBottleneck([nn.Flatten(), *blocks(4, 5), nn.Dropout(0.0)])
    x = torch.randn(16, 2, 2)
    before = model.layers[1][0].weight.clone()
    assert model.update(x, torch.randn(16)).shape == (3,)
    assert not model.layers[1][0].weight.equal(before)
    assert model(x).shape == (16, 5)
    assert [*HSICBottleneck(blocks(4, 5)).state_dict()] == ["layers.0.0.weight", "layers.0.0.bias"]


def test_bottleneck_wrong_arguments():
    with pytest.raises(ValueError, match="HSICBottleneck: layers must not be empty"):
        HSICBottleneck([])
    for name in ("beta", "sigma", "epsilon"):
        with pytest.raises(ValueError, match=f"HSICBottleneck: {name} must be positive and finite, got 0"):
            HSICBottleneck(blocks(2, 2), **{name: 0})
    with pytest.raises(TypeError, match=r"^HSICBottleneck: layers must be a list of modules, got Linear$"):
        HSICBottleneck(nn.Linear(2, 2))
    for name in ("optimizer", "criterion"):
        with pytest.raises(TypeError, match=f"^HSICBottleneck: {name} must be callable, got int$"):
            HSICBottleneck(blocks(2, 2), **{name: 3})


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int8, torch.int64])
def test_labels_of_every_integer_dtype_train_the_head(dtype):
    torch.manual_seed(0)
    model = HSICBottleneck([nn.Linear(4, 8)], nn.Linear(8, 3))
    assert model.update(torch.randn(16, 4), (torch.arange(16) % 3).to(dtype)).isfinite().all()


@pytest.mark.parametrize("head", [nn.Linear(8, 3), nn.Sequential(nn.Tanh(), nn.Linear(8, 3))])
def test_bottleneck_refuses_labels_without_an_output_before_a_step(head):
    model = HSICBottleneck([nn.Linear(4, 8)], head)
    before = [p.clone() for p in model.parameters()]
    for label in (7, -1):
        with pytest.raises(ValueError, match=f"^HSICBottleneck: y must hold labels from 0 to 2, got {label}$"):
            model.update(torch.randn(16, 4), torch.full((16,), label))
    assert all(map(torch.equal, before, model.parameters()))
    assert model.update(torch.randn(4, 4), torch.tensor([0, 1, 2, -100])).isfinite().all()


def test_reference_and_kernels_agree():
    x, y = (v.float() for v in data(100))
    with pyflow.backend("reference"):
        expected = HSICLoss(normalize=True)(x, y)
    torch.testing.assert_close(HSICLoss(normalize=True)(x, y), expected, rtol=1e-5, atol=1e-6)


def test_replaced_parameters_raise():
    x, y = data()
    with torch.device("meta"):
        model = HSICBottleneck([nn.Linear(3, 4)], nn.Linear(4, 1))
    model.to_empty(device="cpu").load_state_dict(HSICBottleneck([nn.Linear(3, 4)], nn.Linear(4, 1)).state_dict())
    text = "HSICBottleneck: parameters must be those its optimisers were made for, got others"
    with pytest.raises(RuntimeError, match=text):
        model.double().update(x, y)


def test_inputs_without_rows_raise():
    for value, error, text in (
        ([1.0], TypeError, "a tensor, got list"),
        (torch.ones(()), ValueError, r"\(n,\) or .*, got a scalar"),
    ):
        with pytest.raises(error, match=f"^HSICLoss: x must be {text}$"):
            HSICLoss()(value, torch.ones(4))
        with pytest.raises(error, match=f"^HSICBottleneck: y must be {text}$"):
            HSICBottleneck([nn.Linear(2, 2)]).update(torch.ones(4, 2), value)
    with pytest.raises(ValueError, match=r"^HSICLoss: kernel_y must be one of .*, got 'gauss'$"):
        HSICLoss(kernel_y="gauss")
