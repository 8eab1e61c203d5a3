"""Short runs of the FSQ demo, its scores and its verdicts."""

from __future__ import annotations

import argparse
import json
import math

import pytest
import torch

for package in ("matplotlib", "PIL", "skimage", "sklearn", "tqdm", "vector_quantize_pytorch"):
    pytest.importorskip(package)

import numpy as np
from PIL import Image

from pyflow.recipes import _data, _pictures, fsq

SETTINGS = fsq.Settings(width=8, latent=4, blocks=1, batch=4, warmup=2, threads=1)
TRAINING = fsq.Training(700, 0.1, {100: 0.5})


def run(*argv):
    parser = argparse.ArgumentParser()
    fsq.add_arguments(parser)
    return fsq.run(parser.parse_args([*map(str, argv)]))


@pytest.fixture
def folder(tmp_path):
    """Two pictures without equal pixels, a copy of one of them, and a text file."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number, (height, width) in enumerate(((200, 270), (130, 256))):
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0] = np.arange(width) % 256
        pixels[..., 1] = np.arange(height)[:, None]
        pixels[..., 2] = 2 * number + np.arange(width) // 256
        Image.fromarray(pixels).save(folder / f"{number}.png")
    Image.open(folder / "0.png").save(folder / "again.bmp")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(fsq, "LEVELS", ((5, 4), (11, 10, 10)))
    monkeypatch.setattr(fsq, "COUNTED", 6)
    monkeypatch.setattr(fsq, "Settings", lambda **changes: fsq.replace(SETTINGS, **changes))
    fsq.Settings.steps = 4


def test_a_seed_repeats_the_run(folder, small, tmp_path, capsys):
    metrics = []
    for name in ("a.png", "b.png"):
        out = tmp_path / "pictures" / name
        assert run("--data", folder, "--steps", 4, "--seed", 3, "--device", "cpu", "--out", out) == 0
        metrics.append(json.loads(out.with_suffix(".json").read_text()))
    printed = capsys.readouterr()
    from matplotlib.image import imread

    picture = imread(out)
    assert picture.shape[0] > 1000 and picture.shape[1] > 300 and picture.std() > 0.1
    scores = metrics[0]["scores"]
    assert [(s["quantizer"], s["codes"], s["training"]["steps"]) for s in scores] == [
        *((name, codes, 4) for codes in (20, 1100) for name in ("FSQ", "VQ", "VQ revived")),
        ("FSQ longer", 1100, 4 * fsq.LONGER),
    ]
    assert all(s["training"]["usage"].keys() == {"4"} for s in scores[:-1])
    assert [*scores[-1]["training"]["usage"]] == ["6", "12"]
    for s in scores:
        training = s.pop("training")
        assert training["step_seconds"] > 0 and all(0 < share <= 1 for share in training["usage"].values())
        assert all(math.isfinite(v) for v in s.values() if not isinstance(v, str)), s
        assert s["psnr"] == pytest.approx(-10 * math.log10(s["mse"])) and 3 < s["psnr"] < 40
        assert 0 < s["held_out_usage"] <= s["usage"] <= 1 <= s["held_out_perplexity"]
        assert s["perplexity"] <= s["usage"] * s["codes"] * (1 + 1e-5)
        if s["quantizer"].startswith("FSQ"):
            assert 0 < s["offsets_usage"] <= 1 and s["perplexity"] <= s["independent_perplexity"] * (1 + 1e-5)
        assert f"{s['psnr']:.2f} dB" in printed.out and f"{s['usage']:.1%}" in printed.out
    assert "without overlap, from 2 photographs" in printed.out and str(out) in printed.out
    assert "VQ revived: VectorQuantize(4, codes, kmeans_init=True, threshold_ema_dead_code=2)" in printed.out
    assert all(sentence in printed.out for sentence in metrics[1]["verdict"]) and "duplicates" not in printed.err
    assert "loss" in printed.err and "dB" in printed.err
    for s in metrics[1]["scores"]:
        s.pop("training")
    assert scores == metrics[1]["scores"]


def test_scores_match_the_tokens_and_pixels(folder):
    photographs = _data.photographs(folder)
    for name in ("FSQ", "VQ"):
        model = fsq.build(name, (5, 4), SETTINGS, seed=0)
        got = fsq.score(model, photographs, name, TRAINING)
        tokens = []
        for tiles in (photographs.train, photographs.test):
            with torch.no_grad():
                x, indices, _ = model(tiles / 127.5 - 1)
            assert indices.shape == (len(tiles), 16, 16)
            tokens.append(indices)
        error = ((x.clamp(-1, 1) + 1) / 2 - photographs.test / 255).double().square().mean().item()
        assert got.mse == pytest.approx(error, rel=1e-5)
        counts = torch.bincount(torch.cat(tokens).flatten().long(), minlength=20).double()
        assert got.usage == pytest.approx((counts > 0).double().mean().item())
        entropy = torch.special.entr(counts / counts.sum()).sum()
        assert got.perplexity == pytest.approx(entropy.exp().item(), rel=1e-5)
        assert got.held_out_usage == pytest.approx(len(tokens[1].unique()) / 20)
        if name == "FSQ":
            digits = torch.cat(tokens).flatten().long()
            entropy = sum(
                torch.special.entr(torch.bincount(d, minlength=5) / len(d)).sum() for d in (digits % 5, digits // 5)
            )
            assert got.independent_perplexity == pytest.approx(entropy.exp().item(), rel=1e-4)


def test_offsets_give_every_pixel_a_token(folder, monkeypatch):
    photographs, seen = _data.photographs(folder), []
    encode = fsq.encode
    monkeypatch.setattr(fsq, "encode", lambda model, tiles: seen.append(tiles[0, :, 0, 0]) or encode(model, tiles))
    got = fsq.score(fsq.build("FSQ", (5, 4), SETTINGS, seed=0), photographs, "FSQ", TRAINING)
    corners = photographs.test[0, :, : fsq.DOWN, : fsq.DOWN].flatten(1).mT
    assert torch.stack(seen[1:]).equal(corners) and got.offsets_usage > 0


def test_initial_weights_are_shared_and_k_means_gets_enough_tokens(folder):
    models = [fsq.build(name, (5, 4), SETTINGS, seed=7) for name in ("FSQ", "VQ", "VQ revived")]
    for model in models[1:]:
        for part in ("encoder", "decoder"):
            ours, theirs = (getattr(m, part).state_dict() for m in (models[0], model))
            assert all(ours[key].equal(theirs[key]) for key in ours)
    revived = models[2].quantizer
    fsq.start_codebook(models[2], _data.photographs(folder).train, SETTINGS, torch.device("cpu"))
    assert revived._codebook.initted and revived.codebook.std(0).min() > 0
    before = revived.codebook.clone()
    fsq.start_codebook(models[2], _data.photographs(folder).train, SETTINGS, torch.device("cpu"))
    assert revived.codebook.equal(before)


def test_the_split_is_fixed_and_disjoint(folder):
    photographs, again = _data.photographs(folder), _data.photographs(folder)
    assert photographs.names == ("0.png", "1.png")
    assert photographs.train.equal(again.train) and photographs.test.equal(again.test)
    # 3 x 4 and 2 x 4 tiles; the copy of the first picture adds none
    assert len(photographs.test) == 4 and len(photographs.train) == 16
    numbers = torch.cat((photographs.train, photographs.test)).long()
    numbers = numbers[:, 0] + 256 * numbers[:, 1] + 65536 * numbers[:, 2]
    assert len(numbers.unique()) == numbers.numel() == 20 * 64 * 64


def test_crops_lie_within_their_tiles():
    tiles = torch.arange(3 * 3 * 64 * 64).reshape(3, 3, 64, 64)
    got = fsq.crops(tiles, 50, 32, torch.Generator().manual_seed(0))
    first = got[:, :, :1, :1]
    assert (got - first).equal((tiles[:1, :1, :32, :32]).expand(50, 3, 32, 32))
    assert (got // (3 * 64 * 64)).unique().tolist() == [0, 1, 2]
    whole = fsq.crops(tiles, 1, 64, torch.Generator().manual_seed(0))
    assert any(whole[0].equal(tile) for tile in tiles)


def test_the_default_photographs():
    photographs = _data.photographs()
    assert len(photographs.names) == 7 and len(photographs.train) > 300 and len(photographs.test) > 75
    assert photographs.train.dtype == torch.uint8 and photographs.train.shape[1:] == (3, 64, 64)


def made_up(quantizer, codes, psnr, usage):
    values = (quantizer, codes, 10 ** (-psnr / 10), psnr, usage, 2.0, usage, 2.0, TRAINING)
    return fsq.FSQScore(*values, usage, 30.0) if quantizer.startswith("FSQ") else fsq.Score(*values)


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (
            (25.0, 27.0),
            (25.5, 26.0),
            "VQ is better by 0.50 dB and at 4,375 codes FSQ is better by 1.00 dB: this holds;",
        ),
        (
            (25.0, 26.0),
            (25.5, 27.0),
            "VQ is better by 0.50 dB and at 4,375 codes VQ is better by 1.00 dB: this does not",
        ),
        ((25.0, 27.0), (24.95, 26.0), "the two are equal within 0.1 dB (VQ -0.05 dB) and at 4,375 codes FSQ is better"),
    ],
)
def test_the_crossover_verdict_follows_the_scores(ours, theirs, said):
    scores = [
        made_up(name, codes, psnr, 0.97)
        for name, both in (("FSQ", ours), ("VQ", theirs))
        for codes, psnr in zip((240, 4375), both, strict=True)
    ]
    sentence = fsq.verdict([*scores, made_up(fsq.LONG, 4375, 28.0, 0.99)])[-1]
    assert said in sentence and ("holds" in sentence) == ("this holds" in said)
    assert f"FSQ {ours[1] - ours[0]:+.2f} dB and VQ {theirs[1] - theirs[0]:+.2f} dB" in sentence


@pytest.mark.parametrize(
    ("usages", "said"),
    [
        ((1.0, 0.96), "100.0% of 240 codes (this holds) and 96.0% of 4,375 codes (this holds)."),
        ((1.0, 0.4), "100.0% of 240 codes (this holds) and 40.0% of 4,375 codes (this does not hold)."),
    ],
)
@pytest.mark.parametrize(("longer", "found"), [(0.97, "this holds"), (0.7, "this does not hold")])
def test_the_usage_verdict_follows_the_scores(usages, said, longer, found):
    scores = [made_up("FSQ", codes, 25.0, usage) for codes, usage in zip((240, 4375), usages, strict=True)]
    paper, more, channels = fsq.verdict([*scores, made_up(fsq.LONG, 4375, 26.0, longer)])
    assert paper.endswith(said)
    assert f"{usages[1]:.1%} and {longer:.1%} of 4,375 codes" in more and more.endswith(f": {found} in the end.")
    assert "14 times as many tokens" in more and "perplexities of 2 and 2" in channels and "30 and 30" in channels


def test_code_maps_give_each_code_its_own_colour():
    colours = _pictures.code_map(torch.arange(4375).reshape(25, 175), 4375)
    assert colours.shape == (25, 175, 3) and colours.min() >= 0 and colours.max() <= 1
    assert len(colours.flatten(0, 1).unique(dim=0)) == 4375
    assert _pictures.code_map(torch.tensor([7, 7]), 4375).equal(colours[0, 7].expand(2, 3))


def test_bad_folders_and_backends_give_one_sentence(tmp_path, capsys):
    def error(*argv):
        assert run(*argv, "--out", tmp_path / "x.png") == 1
        printed = capsys.readouterr()
        return printed.err

    assert error("--data", tmp_path / "none") == f"demo fsq: --data {tmp_path / 'none'} is not a folder\n"
    assert f"--data {tmp_path} holds no images (.bmp, .jpeg, .jpg" in error("--data", tmp_path)
    Image.new("RGB", (300, 150)).save(tmp_path / "small.png")
    assert "at least 10 tiles of 64 x 64 pixels, got 8" in error("--data", tmp_path)
    (tmp_path / "broken.jpg").write_text("no image")
    assert "broken.jpg cannot be read as an image" in error("--data", tmp_path)
    assert "backend: name must be one of" in error("--backend", "vulkan")
    assert not (tmp_path / "x.png").exists()


def test_wrong_arguments(capsys):
    for argv, said in ((("--steps", 0), "must be at least 1, got 0"), (("--vq", "best"), "invalid choice: 'best'")):
        with pytest.raises(SystemExit):
            run(*argv)
        assert said in capsys.readouterr().err
