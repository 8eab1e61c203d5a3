"""A short run of the loss-only demo and its singular values."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("lightning")

from pyflow.recipes import loss_only


def run(*argv):
    parser = argparse.ArgumentParser()
    loss_only.add_arguments(parser)
    return loss_only.run(parser.parse_args([*map(str, argv)]))


def test_short_run(tmp_path, capsys):
    out = tmp_path / "pictures" / "vae.png"
    assert run("--quick", "--hidden", 32, "--latent", 4, "--out", out, "--device", "cpu") == 0
    metrics = json.loads(out.with_suffix(".json").read_text())
    layers = {"inward", "inner_norm", "moments", "outward", "outer_norm", "pixels"}
    assert layers == set(metrics["before"]) == set(metrics["after"]) == set(metrics["raw"])
    assert all(abs(value - 1) < 0.05 for value in metrics["after"].values())
    # the initial gain is ones
    assert metrics["before"]["inner_norm"] == pytest.approx(32**0.5)
    assert metrics["held_out"]["reconstruction"] < 45 and metrics["held_out"]["row_norm"] > 0
    assert out.exists() and "train/row_norm" in (Path(metrics["log"]) / "metrics.csv").read_text()
    printed = capsys.readouterr()
    assert "largest singular value" in printed.out and "row_norm" in printed.out + printed.err


@pytest.mark.parametrize(("argv", "epochs"), [((), 60), (("--quick",), 3), (("--quick", "--epochs", 9), 9)])
def test_epochs(argv, epochs, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_only, "demo", lambda images, args, device: {"epochs": args.epochs})
    assert run(*argv, "--out", tmp_path / "a.png") == 0
    assert json.loads((tmp_path / "a.json").read_text()) == {"epochs": epochs}


def test_wrong_arguments_give_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("--epochs", 0, "--out", tmp_path / "x.png")
    assert "argument --epochs: must be at least 1, got 0" in capsys.readouterr().err
    assert run("--backend", "vulkan", "--out", tmp_path / "x.png") == 1
    assert "backend: name must be one of" in capsys.readouterr().err
