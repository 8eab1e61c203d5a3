"""Short runs of the HSIC demo: tests of features, training without backpropagation, CKA of the layers."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from pyflow.recipes import hsic


def run(*argv):
    parser = argparse.ArgumentParser()
    hsic.add_arguments(parser)
    return hsic.run(parser.parse_args([*map(str, argv)]))


def test_quick_run(tmp_path, capsys):
    out = tmp_path / "pictures" / "hsic.png"
    threads = torch.get_num_threads()
    assert run("--quick", "--permutations", 60, "--out", out, "--device", "cpu") == 0
    assert torch.get_num_threads() == threads
    from matplotlib.image import imread

    picture = imread(out)
    assert picture.shape[0] > 800 and picture.shape[1] > 800 and picture.std() > 0.1
    metrics = json.loads(out.with_suffix(".json").read_text())
    # all features of wine depend on the cultivar; shuffled features do not
    wine, diabetes = metrics["tests"]["wine"], metrics["tests"]["diabetes"]
    shuffled = [p for tested in (wine, diabetes) for p in tested["shuffled"]]
    assert len(shuffled) == 23 and sum(p <= 0.05 for p in shuffled) <= 5
    wine, diabetes = wine["features"], diabetes["features"]
    assert len(wine) == 13 and len(diabetes) == 10
    assert all(f["pvalue"] <= 0.05 for f in wine)
    strongest = {f["name"] for f in diabetes[:4]}
    assert {"bmi", "s5 triglycerides"} <= strongest and all(f["pvalue"] <= 0.05 for f in diabetes[:4])
    for features in (wine, diabetes):
        assert [f["hsic"] for f in features] == sorted((f["hsic"] for f in features), reverse=True)
    final = {name: curve[-1] for name, curve in metrics["accuracy"].items()}
    assert final["HSIC bottleneck"] >= 0.92 and final["backpropagation"] >= 0.92
    assert final["HSIC bottleneck"] > final["head on untrained layers"]
    assert len(metrics["cka"]) == 5 and all(-0.2 <= value <= 1.001 for row in metrics["cka"] for value in row)
    printed = capsys.readouterr()
    texts = ("wine: 178", "diabetes: 442", "depends", "shuffled", "held-out accuracy", "HSIC bottleneck", "CKA")
    for text in (*texts, str(out)):
        assert text in printed.out
    assert "held-out accuracy" in printed.err and "testing" in printed.err


def test_a_seed_repeats_the_training():
    digits = hsic.load(torch.device("cpu"))
    settings = hsic.Settings(epochs=1, width=16, depth=2)
    runs = []
    for _ in range(2):
        model = hsic.build(settings, 3)
        runs.append(hsic.train(model, "HSIC bottleneck", digits, settings, 3)[0])
    assert runs[0] == runs[1] and len(runs[0]) == 1
    assert (len(digits.x), len(digits.test_x)) == (1437, 360) and digits.x.max() == 1


def test_networks_start_equal_and_train_the_right_parameters():
    digits = hsic.load(torch.device("cpu"))
    settings = hsic.Settings(epochs=1, width=16, depth=2)
    before = hsic.build(settings, 0).state_dict()
    for name in hsic.NETWORKS:
        model = hsic.build(settings, 0)
        hsic.train(model, name, digits, settings, 0)
        moved = {key for key, value in model.named_parameters() if not value.equal(before[key])}
        heads = {"head.weight", "head.bias"}
        assert moved == (heads if name == "head on untrained layers" else {key for key, _ in model.named_parameters()})


def test_wrong_arguments_give_one_sentence(tmp_path, capsys):
    assert run("--backend", "vulkan", "--out", tmp_path / "x.png") == 1
    assert "demo hsic: backend: name must be one of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--epochs", 0)
    assert "must be at least 1, got 0" in capsys.readouterr().err
