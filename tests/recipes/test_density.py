"""A short run of the density demo, its splits, its Gaussian, its peers and its calibration."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from pyflow.recipes import _peers, _tabular, density
from pyflow.recipes._density_picture import GAUSSIAN, GRID, Report

CPU = torch.device("cpu")


def run(*argv):
    parser = argparse.ArgumentParser()
    density.add_arguments(parser)
    return density.run(parser.parse_args([*map(str, argv)]))


def test_short_run(tmp_path, capsys):
    out = tmp_path / "pictures" / "density.png"
    threads = torch.get_num_threads()
    assert run("--quick", "--epochs", 2, "--seed", 3, "--out", out, "--device", "cpu") == 0
    assert torch.get_num_threads() == threads
    from matplotlib.image import imread

    picture = imread(out)
    assert picture.shape[0] > 500 and picture.shape[1] > 500 and picture.std() > 0.1
    metrics = json.loads(out.with_suffix(".json").read_text())
    assert metrics["data"] == ["diabetes", "wine"] and metrics["seed"] == 3
    names = ["Gaussian", *(f"{kind} {library}" for kind in ("NSF", "MAF") for library in metrics["libraries"])]
    printed = capsys.readouterr()
    # fitted in closed form on fixed splits, in the units of the data
    for table, gaussian in (("diabetes", -5.43), ("wine", -19.4)):
        found = metrics["tables"][table]["densities"]
        assert [*found] == names
        assert found["Gaussian"]["mean"] == pytest.approx(gaussian, abs=0.4)
        for name in names[1:]:
            # flows start as the Gaussian and have hardly moved
            assert found[name]["mean"] == pytest.approx(found["Gaussian"]["mean"], abs=0.3)
            assert len(found[name]["nats"]) == 2 and found[name]["epoch_seconds"] > 0 < found[name]["sample_seconds"]
        for name in names:
            assert name in printed.out
    assert "442 patients" in printed.out and "178 wines" in printed.out and str(out) in printed.out


def test_a_seed_repeats_the_run_without_peers(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "nflows", None)
    monkeypatch.setitem(sys.modules, "zuko", None)
    found = []
    for name in ("a.png", "b.png"):
        assert run("--quick", "--data", "wine", "--epochs", 2, "--out", tmp_path / name, "--device", "cpu") == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "is left out" in line]
        assert [line.partition(" ")[0] for line in lines] == ["nflows", "zuko"]
        metrics = json.loads((tmp_path / name).with_suffix(".json").read_text())
        assert metrics["libraries"] == ["pyflow"]
        found.append([each["nats"] for each in metrics["tables"]["wine"]["densities"].values()])
    assert found[0] == found[1] and len(found[0]) == 3


@pytest.mark.parametrize("name", _tabular.NAMES)
def test_every_row_is_held_out_once_and_training_rows_set_the_scale(name):
    table = _tabular.load(name)
    splits = _tabular.splits(table)
    assert torch.cat([split.test.rows for split in splits]).sort().values.equal(torch.arange(len(table.x)))
    for split in splits:
        rows = torch.cat([part.rows for part in (split.train, split.validation, split.test)])
        assert rows.sort().values.equal(torch.arange(len(table.x)))
        assert 0.19 < len(split.test.rows) / len(rows) < 0.21 and len(split.validation.rows) * 9 < len(rows) * 0.8
        for part in (split.train, split.validation, split.test):
            torch.testing.assert_close(part.x * split.scale + split.mean, table.x[part.rows])
        for values in (split.train.x, split.train.context):
            if values is not None:
                assert values.mean(0).abs().max() < 1e-10 and (values.std(0) - 1).abs().max() < 1e-10
    assert splits[0].test.x.equal(_tabular.splits(table, 1)[0].test.x)


def test_the_joint_gaussian_matches_torch():
    split = _tabular.splits(_tabular.load("wine"), 1)[0]
    gaussian = _tabular.Gaussian.fit(split)
    other = torch.distributions.MultivariateNormal(gaussian.mean, scale_tril=gaussian.factor)
    torch.testing.assert_close(gaussian.log_prob(split.test.x, None), other.log_prob(split.test.x))
    plain = torch.distributions.MultivariateNormal(split.train.x.mean(0), torch.cov(split.train.x.mT))
    score = gaussian.log_prob(split.validation.x, None).mean()
    assert score > plain.log_prob(split.validation.x).mean()


def test_the_conditional_gaussian_is_ridge_regression():
    split = _tabular.splits(_tabular.load("diabetes"), 1)[0]
    x, context = split.train.all()
    plain = _tabular._regressions(split.train)[0]
    solution = torch.linalg.lstsq(context, x)
    torch.testing.assert_close(plain.weights, solution.solution)
    variance = (x - context @ solution.solution).square().sum() / (len(x) - 11)
    torch.testing.assert_close(plain.factor.square().squeeze(), variance)
    gaussian, (x, context) = _tabular.Gaussian.fit(split), split.test.all()
    assert gaussian.log_prob(*split.validation.all()).mean() >= plain.log_prob(*split.validation.all()).mean()
    expected = torch.distributions.Normal(gaussian.mean + context @ gaussian.weights, gaussian.factor.squeeze())
    torch.testing.assert_close(gaussian.log_prob(x, context), expected.log_prob(x).squeeze(1))


@pytest.mark.parametrize("name", _tabular.NAMES)
def test_whitened_rows_score_as_the_gaussian_does_in_raw_units(name):
    table = _tabular.load(name)
    data = _tabular.Whitened.of(_tabular.splits(table, 1)[0], CPU)
    split, (z, context) = data.split, data.test.all()
    standard = torch.distributions.Normal(0, 1).log_prob(z.double()).sum(1) - data.volume
    mean = split.mean + split.scale * data.gaussian.mean
    if context is not None:
        mean = mean + split.scale * (split.test.context @ data.gaussian.weights)
    raw = torch.distributions.MultivariateNormal(mean, scale_tril=split.scale[:, None] * data.gaussian.factor)
    torch.testing.assert_close(standard, raw.log_prob(table.x[split.test.rows]), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(data.raw(z, context), table.x[split.test.rows], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(data.white(table.x[split.test.rows], split.test.context), z)


def shaken(library, kind, dim, context, seed=0):
    """A flow of random weights; its ActNorms are the identity."""
    if library != "pyflow":
        pytest.importorskip(library)
    torch.manual_seed(seed)
    flow = _peers.build(library, kind, dim, context, 3, (16, 16)).double()
    part = _tabular.Part(torch.zeros(1, dim).double(), torch.zeros(1, context).double() if context else None, None)
    density.start(flow, argparse.Namespace(train=part))
    z = torch.randn(5, dim).double()
    given = torch.randn(5, context).double() if context else None
    # the order of features may be reversed
    torch.testing.assert_close(flow.latent(z, given).sort(1).values, z.sort(1).values, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.15 * torch.randn_like(p))
    return flow


def single(flow):
    # nflows samples in float32 alone
    return copy.deepcopy(flow).float()


@pytest.mark.parametrize("kind", _peers.KINDS)
@pytest.mark.parametrize("library", ["pyflow", *_peers.PEERS])
def test_every_library_gives_a_density_its_latents_and_samples(library, kind):
    flow = shaken(library, kind, 1, 4)
    y = torch.linspace(-60, 60, 60_001).double()[:, None]
    context = torch.randn(4).double()
    given = context.expand(len(y), 4)
    with torch.no_grad():
        mass = flow.log_prob(y, given).exp().squeeze()
        u = torch.special.ndtr(flow.latent(y, given).squeeze())
        # the probability integral transform is the integral of the density
        total = torch.cumulative_trapezoid(mass, y.squeeze())
        torch.testing.assert_close(total, u[1:] - u[0], rtol=1e-3, atol=1e-3)
        assert abs(total[-1] - 1) < 1e-3
        samples = single(flow).sample(4000, context.float()).double()
        assert samples.shape == (4000, 1)
        off = _tabular.deviation(flow.latent(samples, context.expand(4000, 4)), GRID).abs()
        assert (off < 2 * _tabular.band(4000, GRID)).all()


@pytest.mark.parametrize("kind", _peers.KINDS)
@pytest.mark.parametrize("library", ["pyflow", *_peers.PEERS])
def test_joint_densities_of_every_library(library, kind):
    flow, x = shaken(library, kind, 5, 0), torch.randn(6, 5).double()
    jacobian = torch.stack([torch.func.jacrev(lambda row: flow.latent(row[None], None)[0])(row) for row in x])
    prior = torch.distributions.Normal(0, 1).log_prob(flow.latent(x, None)).sum(1)
    expected = prior + torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(flow.log_prob(x, None), expected)
    with torch.no_grad():
        assert single(flow).sample(7, None).shape == (7, 5)


@pytest.mark.parametrize("dim", [5, 6])
def test_splines_of_nflows_are_those_of_pyflow(dim):
    ours, theirs = shaken("pyflow", "NSF", dim, 0), shaken("nflows", "NSF", dim, 0, seed=1)
    with torch.no_grad():
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert p.shape == q.shape
            if p.dim() > 1 or len(p) != dim:
                q.copy_(p)
            else:
                # ActNorms: their conventions differ
                p.zero_(), q.zero_()
    x = torch.randn(50, dim).double()
    torch.testing.assert_close(ours.log_prob(x, None), theirs.log_prob(x, None))


def test_calibration():
    z = torch.special.ndtri((torch.arange(1000).double() + 0.5) / 1000)
    assert _tabular.deviation(z, GRID).abs().max() < 1e-3
    # z half as wide as claimed
    expected = torch.special.ndtr(2 * torch.special.ndtri(GRID)) - GRID
    torch.testing.assert_close(_tabular.deviation(z / 2, GRID), expected, rtol=0, atol=2e-3)
    generator = torch.Generator().manual_seed(1)
    inside, width = 0, _tabular.band(200, GRID)
    for _ in range(400):
        inside += (_tabular.deviation(torch.randn(200, generator=generator), GRID).abs() <= width).all().item()
    # four standard errors of 400 draws
    assert abs(inside / 400 - 0.95) < 0.044


def test_training_stops_early_and_keeps_the_best_weights():
    table = _tabular.load("wine")
    data = _tabular.Whitened.of(_tabular.splits(table, 1)[0], CPU)
    settings = replace(density.SETTINGS["wine"], epochs=30, patience=2, rate=0.3, decay=0.0, average=0.5)
    torch.manual_seed(0)
    flow = density.build(("MAF", "pyflow"), table, settings)

    class Bar:
        total = 0

        def update(self, n=1):
            self.total += n

    bar = Bar()
    best = density.fit(flow, data, settings, 0, bar)
    assert bar.total == 30
    assert density.mean_log_prob(best, data.validation) > density.mean_log_prob(flow, data.validation)


def test_verdicts_are_of_differences_on_the_same_splits():
    table = _tabular.load("wine")
    nats = {
        GAUSSIAN: [-3.0, -1.0, -2.0],
        ("NSF", "pyflow"): [-2.0, 0.0, -1.0],
        ("NSF", "nflows"): [-2.1, 0.1, -1.0],
        ("NSF", "zuko"): [-2.5, -0.49, -1.51],
    }
    report = Report(
        table, None, {}, nats, {key: torch.randn(9) for key in nats}, {key: (1, 1) for key in nats if key[1]}
    )
    lines = {line[:12].strip(): line for line in density.text(report).splitlines()}
    assert "+1.000 ± 0.000" in lines["NSF pyflow"] and "-2.000 ± 0.577" in lines["Gaussian"]
    assert "equal within noise" in lines["NSF nflows"] and "+0.000 ± 0.058" in lines["NSF nflows"]
    assert "different" in lines["NSF zuko"] and "+0.500 ± 0.006" in lines["NSF zuko"]
    entry = density.metrics(report)["densities"]["NSF zuko"]
    assert entry["pyflow_minus_it"][0] == pytest.approx(0.5)


def test_wrong_arguments(capsys, tmp_path):
    for argv, why in ((("--epochs", 0), "must be at least 1, got 0"), (("--data", "iris"), "invalid choice: 'iris'")):
        with pytest.raises(SystemExit):
            run(*argv)
        assert why in capsys.readouterr().err
    assert run("--backend", "vulkan", "--out", tmp_path / "x.png") == 1
    assert "backend: name must be one of" in capsys.readouterr().err
