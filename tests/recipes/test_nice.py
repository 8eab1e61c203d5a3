"""Short runs of the NICE demo, its baseline and its training loop."""

from __future__ import annotations

import argparse
import json
import math
import sys

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from pyflow.flows import NICE
from pyflow.recipes import _data, _nice_peers, nice


def run(*argv):
    parser = argparse.ArgumentParser()
    nice.add_arguments(parser)
    return nice.run(parser.parse_args([*map(str, argv)]))


def test_short_run(tmp_path, capsys):
    out = tmp_path / "pictures" / "nice.png"
    threads = torch.get_num_threads()
    assert run("--quick", "--epochs", 20, "--seed", 3, "--out", out, "--device", "cpu") == 0
    assert torch.get_num_threads() == threads
    from matplotlib.image import imread

    picture = imread(out)
    assert picture.shape[0] > 500 and picture.shape[1] > 500 and picture.std() > 0.1
    metrics = json.loads(out.with_suffix(".json").read_text())
    assert metrics["epochs"] == 20 and metrics["seed"] == 3
    # the Gaussian is fitted in closed form on a fixed split
    assert 48 < metrics["gaussian_nats"] < 54
    assert 30 < metrics["nats"] < 75
    assert metrics["bits_per_dim"] == pytest.approx(math.log2(17) - metrics["nats"] / (64 * math.log(2)), abs=1e-4)
    assert abs(metrics["nats"] - metrics["reference_nats"]) < 1e-4
    assert metrics["reconstruction_error"] < 1e-4
    assert metrics["epoch_seconds"] > 0 and metrics["reference_epoch_seconds"] > 0
    printed = capsys.readouterr()
    for text in ("held out", "Gaussian, full covariance", "time per epoch", "largest error", "1,000 samples", str(out)):
        assert text in printed.out
    assert "bits/dim" in printed.err and "nats" in printed.err


def test_a_seed_repeats_the_run(tmp_path):
    nats = []
    for name in ("a.png", "b.png"):
        assert run("--quick", "--epochs", 2, "--prior", "gaussian", "--out", tmp_path / name, "--device", "cpu") == 0
        nats.append(json.loads((tmp_path / name).with_suffix(".json").read_text())["nats"])
    assert nats[0] == nats[1]


def test_the_split_is_fixed_and_disjoint(tmp_path):
    images, again = (_data.load("digits", tmp_path) for _ in range(2))
    assert (len(images.train), len(images.validation), len(images.test)) == (1257, 180, 360)
    assert images.test.equal(again.test) and images.dim == 64 and images.levels == 17
    assert images.train.max() == 16


def test_the_gaussian_baseline_matches_torch(tmp_path):
    images = _data.load("digits", tmp_path)
    validation = _data.noisy(images.validation, 17, torch.device("cpu"), 1)
    gaussian = _data.Gaussian.fit(images.train, validation, 17)
    other = torch.distributions.MultivariateNormal(gaussian.mean, scale_tril=gaussian.factor)
    torch.testing.assert_close(gaussian.log_prob(validation), other.log_prob(validation.double()))
    # shrinkage helps: the plain training covariance scores no better on the validation images
    x = images.train.double() / 17
    covariance = torch.cov(x.mT) + torch.eye(64, dtype=torch.float64) / (12 * 17**2)
    plain = torch.distributions.MultivariateNormal(gaussian.mean, covariance)
    assert gaussian.log_prob(validation).mean() >= plain.log_prob(validation.double()).mean()


def test_training_stops_early_and_keeps_the_best_weights(tmp_path):
    torch.manual_seed(0)
    images = _data.load("digits", tmp_path)
    validation = _data.noisy(images.validation[:50], 17, torch.device("cpu"), 1)
    flow = NICE(64, hidden=(8,), data_init=True)
    flow.log_prob(validation)
    before = nice.mean_log_prob(flow, validation)
    # with such a large learning rate the best weights are early ones
    settings = nice.Settings(hidden=(8,), epochs=40, patience=2, rate=0.5, average=0.5)
    best, epochs = nice.fit(flow, images.train, validation, 17, settings)
    assert epochs < 40
    assert nice.mean_log_prob(best, validation) >= min(before, nice.mean_log_prob(flow, validation))


def test_missing_data_and_backends_give_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert run("--data", "mnist", "--out", tmp_path / "x.png") == 1
    error = capsys.readouterr().err
    assert "demo nice: --data mnist is read through torchvision, which does not import here" in error
    assert run("--backend", "vulkan", "--out", tmp_path / "x.png") == 1
    assert "backend: name must be one of auto, cpu, triton, cuda, reference, got 'vulkan'" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


def test_mnist_and_cifar10_shapes(tmp_path, monkeypatch):
    """Random pixels of these shapes pass through the loader and the picture."""
    for name, shape in (("mnist", (28, 28)), ("cifar10", (32, 32, 3))):
        pixels = torch.randint(0, 256, (5020, *shape), dtype=torch.uint8)
        monkeypatch.setattr(_data, "_torchvision", lambda *_, pixels=pixels: (pixels, pixels[:40]))
        monkeypatch.setitem(nice.SETTINGS, name, nice.Settings(hidden=(4,), epochs=1, batch=10))
        monkeypatch.setattr(_data, "DRAWS", 1)
        unit = _data.Gaussian(torch.zeros(math.prod(shape)).double(), torch.eye(math.prod(shape)).double())
        monkeypatch.setattr(_data.Gaussian, "fit", lambda *_, unit=unit: unit)
        images = _data.load(name, tmp_path)
        assert images.shape == shape and len(images.train) == 20 and images.levels == 256
        assert run("--data", name, "--quick", "--epochs", 1, "--out", tmp_path / f"{name}.png", "--device", "cpu") == 0
        assert (tmp_path / f"{name}.png").exists()


def test_the_libraries_are_compared_and_a_missing_one_leaves_its_row(capsys, monkeypatch):
    for name in _nice_peers.PEERS:
        pytest.importorskip(name)
    flow, x = NICE(6, hidden=(5, 4)), torch.randn(7, 6)
    built = {name: _nice_peers.build(name, flow) for name in ("pyflow", *_nice_peers.PEERS)}
    # the networks and 6 log-scales; nflows' ActNorm also has shifts
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, (module, *_) in built.items()}
    own = sum(p.numel() for p in flow.parameters())
    assert sizes == {"pyflow": own, "normflows": own, "nflows": own + 6, "zuko": own + 6}
    for module, log_prob, sample in built.values():
        # zuko starts its scales at random, nflows by the first batch
        for parameter in module.parameters():
            if parameter.numel() == 6:
                parameter.data.zero_()
        module.eval()
        assert log_prob(x).shape == (7,) and log_prob(x).isfinite().all()
        assert sample(3).shape == (3, 6)
    torch.testing.assert_close(built["pyflow"][1](x), built["nflows"][1](x))
    torch.testing.assert_close(built["pyflow"][1](x), built["zuko"][1](x))
    monkeypatch.setitem(sys.modules, "zuko", None)
    found = nice.compare(flow, x, steps=9, rounds=1)
    assert list(found) == ["pyflow", "normflows", "nflows"]
    assert all(min(times.values()) > 0 and times["epoch"] == 9 * times["step"] for times in found.values())
    printed = capsys.readouterr().out
    assert "log_prob of 7" in printed and "zuko is left out, it does not import here" in printed


def test_wrong_arguments(capsys):
    with pytest.raises(SystemExit):
        run("--epochs", 0)
    assert "must be at least 1, got 0" in capsys.readouterr().err
