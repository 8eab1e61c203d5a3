"""Short runs of the energy demo, and its parts: chains, counted modes, data."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest
import torch

for package in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package)

from pyflow.recipes import energy

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


def test_held_out_digits_are_not_trained_on():
    train, test, anomalous = energy.digits(7, torch.device("cpu"))
    assert len(test) == 359 and len(train) + 359 < 1797 and 20 < anomalous.sum() < 60
    assert train.shape[1] == 64 and train.min() == -1 and train.max() == 1
