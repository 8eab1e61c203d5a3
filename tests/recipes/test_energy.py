"""The energy demo, run short, and what it counts."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

for package in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package)

from pyflow.recipes import energy

SETTINGS = energy.Settings(steps=8, batch=32, width=16, samples=500, chain_steps=5)
CENTRES = torch.cartesian_prod(*(torch.tensor(energy.PLACES),) * 2)


def run(*argv):
    parser = argparse.ArgumentParser()
    energy.add_arguments(parser)
    return energy.run(parser.parse_args([*map(str, argv)]))


def test_short_run_and_the_same_seed_repeats_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(energy, "QUICK", SETTINGS)
    metrics = []
    for name in ("a.png", "b.png"):
        out = tmp_path / "pictures" / name
        assert run("--quick", "--seed", 3, "--held-out", 4, "--device", "cpu", "--out", out) == 0
        metrics.append(json.loads(out.with_suffix(".json").read_text()))
    printed = capsys.readouterr().out
    got = metrics[0]
    assert got["grid"]["data"]["modes"] == 25 and got["grid"]["data"]["near"] > 0.99
    assert 0 < got["auprc"] < 1 and f"AUPRC {got['auprc']:.3f}" in printed and got["held_out"] == 4
    assert 0 <= got["grid_acceptance"] <= 1 and 0 <= got["digits_acceptance"] <= 1
    from matplotlib.image import imread

    assert imread(out).std() > 0.1
    for run_metrics in metrics:
        run_metrics.pop("total_seconds")
    assert metrics[0] == metrics[1]


def test_an_unknown_backend_is_one_sentence(tmp_path, capsys):
    assert run("--backend", "none", "--out", tmp_path / "a.png") == 1
    assert capsys.readouterr().err.startswith("demo energy: backend: name must be one of")


def test_modes_are_counted():
    assert energy.modes(CENTRES.repeat(20, 1), CENTRES) == (25, 1.0)
    assert energy.modes(CENTRES[:3].repeat(20, 1), CENTRES) == (3, 1.0)
    assert energy.modes(CENTRES + 0.5, CENTRES) == (0, 0.0)


def test_held_out_digits_are_not_trained_on():
    train, test, anomalous = energy.digits(7, torch.device("cpu"))
    assert len(test) == 359 and len(train) + 359 < 1797 and 20 < anomalous.sum() < 60
    assert train.shape[1] == 64 and 0 <= train.min() and train.max() <= 1
