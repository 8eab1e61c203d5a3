"""A short run of the density demo, its Gaussian and its split."""

from __future__ import annotations

import argparse
import json
import math

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from pyflow.recipes import _tables, density


def run(*argv):
    parser = argparse.ArgumentParser()
    density.add_arguments(parser)
    return density.run(parser.parse_args([*map(str, argv)]))


def test_short_run(tmp_path, capsys, monkeypatch):
    # the packages beside ours take most of the time
    ours = density.contenders(30, 200)
    monkeypatch.setattr(density, "contenders", lambda dim, samples: {k: v for k, v in ours.items() if "pyflow" in k})
    out = tmp_path / "pictures" / "density.png"
    threads = torch.get_num_threads()
    assert run("--quick", "--epochs", 2, "--seed", 3, "--out", out) == 0
    assert torch.get_num_threads() == threads
    from matplotlib.image import imread

    picture = imread(out)
    assert picture.shape[0] > 700 and picture.shape[1] > 1000 and picture.std() > 0.1
    metrics = json.loads(out.with_suffix(".json").read_text())
    assert metrics["seed"] == 3 and metrics["epochs"] == 2 and metrics["splits"] == 2
    # flows start as the Gaussian and are kept at the epoch that scores best
    for table, most in (("diabetes", 0.2), ("breast cancer", 20)):
        for model in ("NSF", "MAF"):
            assert abs(metrics[table][model]["gain"]) < most and metrics[table][model]["error"] > 0
    assert -1.3 < metrics["diabetes"]["Gaussian"]["nats"] < -0.9 and metrics["diabetes"]["Gaussian"]["gain"] == 0
    assert set(metrics["seconds"]) == {"MAF, pyflow", "NSF autoregressive, pyflow", "NSF coupling, pyflow"}
    assert all(t["epoch"] > 0 and t["samples"] > 0 for t in metrics["seconds"].values())
    printed = capsys.readouterr()
    for text in ("held-out nats per row", "over the Gaussian", "1,000 samples", str(out)):
        assert text in printed.out
    assert "breast cancer" in printed.err


def test_contenders_beside_ours():
    for package, names in (("nflows", ("MAF, nflows",)), ("zuko", ("MAF, zuko", "NSF autoregressive, zuko"))):
        pytest.importorskip(package)
        for name in names:
            make, loss, draw = density.contenders(3, 7)[name]
            model = make()
            loss(model, (torch.randn(5, 3),)).backward()
            assert draw(model).shape == (7, 3) and any(p.grad is not None for p in model.parameters())


def test_the_gaussian_is_that_of_torch():
    for table in _tables.load():
        order = torch.randperm(len(table.x), generator=torch.Generator().manual_seed(0))
        train, validation, test = _tables.standardised(table, order.tensor_split([300, 350]))
        torch.testing.assert_close(train[0].mean(0), torch.zeros(table.x.shape[1], dtype=torch.float64))
        gaussian = _tables.Gaussian.fit(train, validation)
        nats = gaussian.log_prob(*test)
        other = torch.distributions.MultivariateNormal(gaussian.center(test[1]), scale_tril=gaussian.factor)
        torch.testing.assert_close(nats, other.log_prob(test[0]))
        z = gaussian.whiten(*test)
        torch.testing.assert_close(gaussian.color(z, test[1]), test[0])
        white = torch.distributions.Normal(0, 1).log_prob(z).sum(1) - gaussian.logdet
        torch.testing.assert_close(white, nats)
        # knowing the features helps
        plain = 0.5 * math.log(2 * math.pi) + 0.5
        if table.context is not None:
            assert gaussian.log_prob(*validation).mean() > -plain + 0.15


def test_a_flow_that_has_learnt_nothing_is_the_gaussian():
    table = _tables.load()[0]
    order = torch.randperm(len(table.x), generator=torch.Generator().manual_seed(0))
    rows = _tables.standardised(table, order.tensor_split([300]))
    gaussian = _tables.Gaussian.fit(rows[0], rows[1])
    moved = density.moved(gaussian, rows[1], "cpu")
    for make in density.flows(*table.sizes).values():
        nats = make().eval().log_prob(*moved) - gaussian.logdet
        torch.testing.assert_close(nats.double(), gaussian.log_prob(*rows[1]), atol=1e-4, rtol=1e-4)
