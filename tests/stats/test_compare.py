"""CKA of all pairs of layers over minibatches."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn

import pyflow
from pyflow.stats import RepresentationComparison, compare_representations


def net(seed, width=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3))


def batches(count=3, n=32):
    torch.manual_seed(7)
    return [torch.randn(n, 5) for _ in range(count)]


def quietly(*args, **options):
    return compare_representations(*args, progress=False, **options)


@pytest.mark.parametrize("kernel", ["linear", "rbf", "laplacian", "polynomial"])
def test_one_batch_is_cka(kernel):
    first, second = net(0), net(1, 6)
    (x,) = batches(1)
    result = quietly(first, second, [x], kernel=kernel)
    assert result.layers1 == result.layers2 == ("0", "1", "2")
    for i in range(3):
        for j in range(3):
            a, b = first[: i + 1](x), second[: j + 1](x)
            expected = pyflow.ops.cka(a, b, kernel=kernel, estimator="unbiased").item()
            assert result.cka[i, j].item() == pytest.approx(expected, abs=1e-5)


def test_batches_of_arrays_and_tables():
    (x,) = batches(1)
    want = quietly(net(0), net(1), [x])
    given = [x.numpy(), x.double().numpy(), (x.numpy(), None)]
    if importlib.util.find_spec("pandas"):
        given.append(importlib.import_module("pandas").DataFrame(x.numpy(), columns=list("abcde")))
    for batch in given:
        assert quietly(net(0), net(1), [batch]) == want


def test_minibatches_average_hsic_not_cka():
    first, second, data = net(0), net(1), batches(4)
    result = quietly(first, second, data)
    options = {"kernel": "linear", "estimator": "unbiased"}

    def mean(f, g):
        return torch.stack([pyflow.ops.hsic(f(x).double(), g(x).double(), **options) for x in data]).mean()

    expected = mean(first, second) / (mean(first, first) * mean(second, second)).sqrt()
    torch.testing.assert_close(result.cka[2, 2], expected.detach(), rtol=1e-5, atol=1e-6)


def test_the_size_of_batches_does_not_matter_much():
    first, second = net(0), net(1)
    torch.manual_seed(0)
    x = torch.randn(2048, 5)
    small, large = (quietly(first, second, x.split(n)).cka for n in (16, 1024))
    assert (small - large).abs().max() < 0.05


def test_a_model_with_itself():
    model = net(0)
    result = quietly(model, model, [(x, None) for x in batches()])
    torch.testing.assert_close(result.cka.diagonal(), torch.ones(3).double())
    torch.testing.assert_close(result.cka, result.cka.T)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu, self.drop, self.gru = nn.ReLU(), nn.Dropout(0.5), nn.GRU(5, 4, batch_first=True)

    def forward(self, x):
        return self.gru(self.drop(self.relu(self.relu(x) - 0.1)).unsqueeze(1))[0]


def test_modules_that_run_twice_or_return_tuples_in_eval_mode():
    torch.manual_seed(0)
    model = Twice()
    model.gru.eval()
    result = quietly(model, net(0), batches(), layers2=["2", "0"])
    assert result.layers1 == ("relu", "relu:2", "drop", "gru") and result.layers2 == ("0", "2")
    # dropout does nothing in eval mode, and the modes come back
    assert result.cka[1].equal(result.cka[2]) and model.training and model.drop.training and not model.gru.training
    assert not model.relu._forward_hooks


def test_dead_layers_have_no_similarity():
    model = net(0)
    nn.init.zeros_(model[2].weight)
    result = quietly(model, net(1), batches())
    assert result.cka[2].abs().max() == 0 and result.cka.isfinite().all()


class Times(nn.Module):
    """Outputs in a unit that changes from batch to batch."""

    def __init__(self, unit):
        super().__init__()
        self.unit, self.layer, self.calls = unit, nn.Identity(), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x.double() * self.unit**self.calls)


@pytest.mark.parametrize("unit", [2.0**-250, 2.0**250])
def test_units_of_the_outputs(unit):
    result = quietly(Times(unit), net(0), batches(1), layers1=["layer"])
    torch.testing.assert_close(result.cka, quietly(Times(1.0), net(0), batches(1), layers1=["layer"]).cka)
    # HSIC of the batch with the largest unit outweighs that of the others
    x, ends = batches(), slice(-1, None) if unit > 1 else slice(1)
    many = quietly(Times(unit), Times(unit), x, layers1=["layer"], layers2=["layer"])
    assert many.cka.item() == pytest.approx(1)
    mixed = quietly(Times(unit), net(0), x, layers1=["layer"], layers2=["2"])
    single = quietly(Times(1.0), net(0), x[ends], layers1=["layer"], layers2=["2"])
    assert 0 < mixed.cka.item() < single.cka.item()


def test_results_compare_and_have_a_hash():
    one, same, other = (quietly(net(0), net(seed), batches()) for seed in (1, 1, 2))
    assert one == same and one != other and hash(one) == hash(same) and one != "cka"


def test_modules_with_a_train_of_their_own_return_to_their_state():
    class Merging(nn.Linear):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merging(5, 5), nn.Dropout(), Merging(5, 5).eval())
    model[1].training = False
    quietly(model, model, batches())
    assert [module.training for module in model.modules()] == [True, True, False, False]
    assert not model[0].merged


class Named(nn.Module):
    """Layers of which one returns a dict and one never runs."""

    def __init__(self):
        super().__init__()
        self.run, self.idle = nn.Linear(5, 3), nn.Linear(5, 3)
        self.table = nn.Module()
        self.table.forward = lambda x: {"out": x}

    def forward(self, x):
        return self.table(self.run(x))["out"]


class Total(nn.Module):
    def forward(self, x):
        return x.sum()


def test_heatmap(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    result = quietly(net(0), net(1), batches())
    path = result.plot(tmp_path / "new" / "cka.png", names=("one", "other"))
    from matplotlib import pyplot as plt
    from matplotlib.image import imread

    assert imread(path).std() > 0.1
    _, axes = plt.subplots()
    assert result.heatmap(axes) is axes and len(axes.texts) == 9
    wide = RepresentationComparison(torch.rand(13, 13), ("a",) * 13, ("b",) * 13)
    assert not wide.heatmap().texts
    plt.close("all")


def test_bar(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    from pyflow.stats import _inputs

    monkeypatch.setattr(_inputs, "PATIENCE", 0)
    compare_representations(net(0), net(1), batches())
    assert "3/3" in capsys.readouterr().err
    compare_representations(net(0), net(1), iter(batches()))
    assert "3batch" in capsys.readouterr().err


def test_small_batches_are_left_out():
    data = batches()
    assert quietly(net(0), net(1), [*data, data[0][:3]]).cka.equal(quietly(net(0), net(1), data).cka)


@pytest.mark.parametrize(
    "error, text, arguments, options",
    [
        (TypeError, "model1 must be a module, got function", (lambda x: x, net(0), batches()), {}),
        (ValueError, "layers2 must be names of submodules, got '7'", (net(0), net(0), batches()), {"layers2": ["7"]}),
        (ValueError, "layers1 must not be empty", (net(0), net(0), batches()), {"layers1": []}),
        (ValueError, "kernel must be one of linear, rbf, laplacian, polynomial, got 'delta'",
         (net(0), net(0), batches()), {"kernel": "delta"}),
        (ValueError, "bandwidth must be positive and finite, got 0", (net(0), net(0), batches()),
         {"kernel": "rbf", "bandwidth": 0}),
        (ValueError, "loader must have a batch of at least 4 samples, got none", (net(0), net(0), batches(2, 3)), {}),
        (TypeError, "loader must be of tensors or arrays, or tuples and lists that start with one, got dict",
         (net(0), net(0), [{"x": torch.randn(9, 5), "y": 1, "z": 2, "w": 3}]), {}),
        (TypeError, "loader must hold numbers, got <U1", (net(0), net(0), [np.full((9, 5), "a")]), {}),
        (TypeError, "loader must be of tensors or arrays, or tuples and lists that start with one, got list of str",
         (net(0), net(0), [["name", torch.randn(9, 5)]]), {}),
        (ValueError, "loader must be of dense tensors of samples, got shape ()", (net(0), net(0), torch.zeros(3)), {}),
        (ValueError, "x must be finite, got NaN or infinity", (net(0), net(0), [torch.full((4, 5), torch.nan)]), {}),
        (ValueError, "layer '0' must have the 32 samples of a batch in its first dim, got (96,); inputs are batches, one tensor is [x]",
         (nn.Sequential(nn.Flatten(0)), net(0), [torch.randn(32, 3)]), {}),
        (ValueError, "layer '1' must have the 32 samples of a batch in its first dim, got (); inputs are batches, one tensor is [x]",
         (nn.Sequential(nn.Linear(5, 3), Total()), net(0), batches()), {}),
        (TypeError, "loader must be an iterable of batches, got NoneType", (net(0), net(0), None), {}),
        (TypeError, "layers1 must be a list of names of submodules, got '10'",
         (nn.Sequential(*[nn.Linear(5, 5)] * 12), net(0), batches()), {"layers1": "10"}),
        (TypeError, "layers2 must be a list of names of submodules, got 3", (net(0), net(0), batches()), {"layers2": 3}),
        (ValueError, "layers1 must name every submodule once, got '1' again", (net(0), net(0), batches()),
         {"layers1": ["1", "0", "1"]}),
        (ValueError, "layers1 must run and return tensors of floats, got 'table', which does not",
         (Named(), net(0), batches()), {"layers1": ["run", "table"]}),
        (ValueError, "layers2 must run and return tensors of floats, got 'idle', which does not",
         (net(0), Named(), batches()), {"layers2": ["idle", "run"]}),
    ],
)  # fmt: skip
def test_wrong_arguments(error, text, arguments, options):
    with pytest.raises(error) as raised:
        quietly(*arguments, **options)
    assert str(raised.value) == f"compare_representations: {text}"
