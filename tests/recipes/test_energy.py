"""Short runs of the energy demo, and its parts: chains, counted modes, data."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest
import torch

for package in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package)

from pyflow.recipes import _energy_picture, _sample_scores, energy

SHORT = {"steps": 8, "batch": 32, "width": 16, "samples": 500, "chain_steps": 5}
CENTRES = torch.cartesian_prod(*(torch.tensor(energy.PLACES),) * 2)


def run(*argv):
    parser = argparse.ArgumentParser()
    energy.add_arguments(parser)
    return energy.run(parser.parse_args([*map(str, argv)]))


def test_a_seed_repeats_the_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(energy, "QUICK", SHORT)
    metrics = []
    for name in ("a.png", "b.png"):
        out = tmp_path / "pictures" / name
        assert run("--quick", "--seed", 3, "--held-out", "4,0", "--device", "cpu", "--out", out) == 0
        metrics.append(json.loads(out.with_suffix(".json").read_text()))
    printed = capsys.readouterr().out
    got = metrics[0]
    assert got["grid"]["data"]["modes"] == 25 and got["grid"]["data"]["near"] > 0.99
    assert got["held_out"] == [4, 0] and len(got["auprc"]) == 2 and all(0 < x < 1 for x in got["auprc"][0].values())
    for name, mean in got["auprc_mean"].items():
        assert name in printed and f"{mean:.3f}" in printed
        assert mean == pytest.approx(sum(row[name] for row in got["auprc"]) / 2)
    assert 0 <= got["grid_acceptance"] <= 1 and 0 <= got["digits_acceptance"] <= 1
    assert set(got["digits"]) == {"generator", "after MALA", "held-out"} == set(got["digits_energy"])
    # eight steps draw nothing that looks like a digit
    assert got["digits"]["generator"]["recall"] < 0.1 < 0.8 < got["digits"]["held-out"]["recall"]
    assert got["digits"]["held-out"]["nearest"] == pytest.approx(2.07, abs=0.02)
    from matplotlib.image import imread

    assert imread(out).std() > 0.1
    for run_metrics in metrics:
        run_metrics.pop("total_seconds")
    assert metrics[0] == metrics[1]


def test_an_unknown_backend_gives_one_sentence(tmp_path, capsys):
    assert run("--backend", "none", "--out", tmp_path / "a.png") == 1
    assert capsys.readouterr().err.startswith("demo energy: backend: name must be one of")


def test_held_out_is_a_list_or_all(capsys):
    assert energy._held_out("all") == tuple(range(10)) and energy._held_out("3,1") == (3, 1)
    for text in ("", "12", "1,", "none"):
        with pytest.raises(SystemExit):
            run("--held-out", text)
        assert f"must be digits as 1,5 or all, got {text!r}" in capsys.readouterr().err


def test_training_fits_a_single_gaussian():
    torch.manual_seed(0)
    settings = replace(energy.GRID, steps=300, width=32, noise=(1.0, 0.5), of_x=None, of_z=None, average=0.98)
    trained = energy.fit(energy.MEG(2, settings), lambda count: 2 + torch.randn(count, 2), settings, "one")
    x = trained.draw(2000)
    assert (x.mean(0) - 2).abs().max() < 0.5 and 0.5 < x.std() < 1.6
    assert trained.energy_of(torch.full((1, 2), 2.0)) < trained.energy_of(torch.full((1, 2), 5.0))


def test_chains_tune_their_step_size_to_the_acceptance_rate():
    chains = energy.run_chains(lambda z: z.square().sum(1) / 2, torch.zeros(500, 2), 50, 0)
    assert abs(chains.acceptance.mean() - energy.ACCEPTANCE) < 0.1 and abs(chains.z.var() - 1) < 0.2


def test_modes_are_counted():
    assert energy.modes(CENTRES.repeat(20, 1), CENTRES) == (25, 1.0)
    assert energy.modes(CENTRES[:3].repeat(20, 1), CENTRES) == (3, 1.0)
    assert energy.modes(CENTRES + 0.5, CENTRES) == (0, 0.0)


def test_digits_are_split_and_scaled():
    train, labels, held_out, held_labels = energy.digits(torch.device("cpu"))
    assert len(train) == len(labels) == 1438 and len(held_out) == len(held_labels) == 359
    assert train.shape[1] == 64 and train.min() == -1 and train.max() == 1
    assert torch.cdist(held_out, train).min() > 0 and torch.bincount(held_labels).min() > 25
    rows = energy.picked(train[:3])(50)
    assert rows.shape == (50, 64) and torch.cdist(rows, train[:3]).amin(1).max() == 0


def test_scores_of_samples():
    torch.manual_seed(0)
    # three classes on a line, told apart by where they are
    centres = torch.tensor([[0.0], [10.0], [20.0]])
    classifier = lambda x: -((x - centres.T) ** 2)
    train, held_out = (centres.repeat(40, 1) + torch.rand(120, 1) for _ in range(2))
    real = _sample_scores.scores(centres.repeat(40, 1) + torch.rand(120, 1), classifier, train, held_out)
    assert real.sure == 1 and real.classes == 3 and real.precision > 0.8 and real.recall > 0.8 and real.nearest < 0.1
    copies = _sample_scores.scores(train, classifier, train, held_out)
    assert copies.nearest == 0
    one_class = _sample_scores.scores(torch.rand(120, 1), classifier, train, held_out)
    assert one_class.classes == 1 and one_class.precision > 0.8 and 0.2 < one_class.recall < 0.4
    between = _sample_scores.scores(torch.full((120, 1), 5.0), classifier, train, held_out)
    assert between.sure == 0 and between.classes == 0 and between.precision == 0 and between.recall == 0


def test_images_are_tiled_in_reading_order():
    images = torch.arange(20.0)[:, None].expand(20, 64)
    picture = _energy_picture.tiled(images)
    assert picture.shape == (20, 100) and picture[5, 15] == 1 and picture[15, 5] == 10 and picture[0, 5] == -1
