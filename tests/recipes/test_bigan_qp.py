"""Short runs of the BiGAN-QP demo, and which networks each loss has gradients for."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

for package in ("matplotlib", "PIL", "skimage", "sklearn", "tqdm"):
    pytest.importorskip(package)

import numpy as np
from PIL import Image

from pyflow.recipes import _data, _demo, bigan_qp

SETTINGS = bigan_qp.Settings(width=16, latent=4, steps=30, batch=16, looks=2)
CONVOLUTIONAL = bigan_qp.replace(bigan_qp.FEW, width=4, latent=4, batch=16)
QUICK = {"width": 16, "latent": 4, "steps": 30, "batch": 16, "looks": 2}


def run(*argv):
    parser = argparse.ArgumentParser()
    bigan_qp.add_arguments(parser)
    return bigan_qp.run(parser.parse_args([*map(str, argv)]))


@pytest.fixture(autouse=True)
def one_thread():
    """One thread: two that wait for each other on a busy machine take six times as long."""
    with _demo.threads(1):
        yield


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bigan_qp, "QUICK", QUICK)


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures with a grey central square and red sides, and a text file."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(12):
        pixels = np.zeros((40, 60, 3), np.uint8)
        pixels[..., 0] = 255
        pixels[:, 10:50] = 20 * number
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_a_seed_repeats_the_run(small, tmp_path, capsys):
    metrics = []
    for name in ("a.png", "b.png"):
        out = tmp_path / "pictures" / name
        assert run("--quick", "--seed", 3, "--device", "cpu", "--out", out) == 0
        metrics.append(json.loads(out.with_suffix(".json").read_text()))
    printed = capsys.readouterr()
    from matplotlib.image import imread

    picture = imread(out)
    assert picture.shape[0] > 1000 and picture.shape[1] > 900 and picture.std() > 0.1
    got = metrics[0]
    assert [e["step"] for e in got["errors"]] == [0, 15, 30]
    first, last = (got["errors"][i]["held_out"] for i in (0, -1))
    assert 0 < last < first and f"{first:.4f}" in printed.out and f"{last / first:.1%}" in printed.out
    assert "fell to" in printed.out and str(out) in printed.out
    assert "no Lipschitz constraint and no gradient penalty is used" in printed.out.replace("\n", " ")
    assert [*got["error_of_linear_components"]] == ["4", "16"]
    few, more = got["error_of_linear_components"].values()
    assert 0 < more < few < got["error_of_the_mean"] < 0.1 and f"16 principal components: {more:.4f}" in printed.out
    assert "reconstruction" in printed.err and "critic" in printed.err
    for each in metrics:
        each.pop("training_seconds"), each.pop("total_seconds")
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("data, shape", [("faces", (25, 25)), ("folder", (32, 32, 3))])
def test_faces_and_folders_can_be_trained_on(data, shape, folder, small, tmp_path):
    data = folder if data == "folder" else data
    out = tmp_path / "x.png"
    assert run("--quick", "--data", data, "--steps", 3, "--latent", 5, "--out", out) == 0
    metrics = json.loads(out.with_suffix(".json").read_text())
    assert metrics["settings"]["latent"] == 5 and out.exists()
    assert _data.gallery(str(data), tmp_path).shape == shape


@pytest.mark.parametrize("shape", [(25, 25), (8, 9), (12, 7, 3)])
def test_convolutional_networks_keep_the_shape_of_images(shape):
    model = bigan_qp.BiGan(shape, CONVOLUTIONAL)
    x = torch.rand(5, np.prod(shape)) * 2 - 1
    z = model.encoder(x)
    assert z.shape == (5, 4) and model.generator(z).shape == x.shape and model.critic(x, z).shape == (5, 1)
    assert "Conv2d and Linear layers" in model.critic_facts(CONVOLUTIONAL)
    assert torch.equal(bigan_qp.Flat()(bigan_qp.Planes(shape)(x)), x)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3)])
def test_images_are_reflected_at_random_and_moved(shape):
    torch.manual_seed(0)
    x = torch.rand(64, np.prod(shape))
    mirrored = torch.from_numpy(np.flip(x.numpy().reshape(-1, *shape), 2).copy()).flatten(1)
    assert torch.equal(bigan_qp.reflected(x, shape), mirrored)
    still = bigan_qp.moved(x, shape, 0.0)
    same, turned = ((still - y).abs().amax(1) < 1e-5 for y in (x, mirrored))
    assert (same ^ turned).all() and 16 < same.sum() < 48
    near = bigan_qp.moved(x, shape, 0.05)
    error = torch.minimum((near - x).square().mean(1), (near - mirrored).square().mean(1))
    assert 0 < error.mean() < 0.5 * (x - mirrored).square().mean() and near.min() >= 0 and near.max() <= 1


def test_every_face_and_file_is_in_one_split(folder, tmp_path):
    faces = _data.gallery("faces", tmp_path)
    assert (len(faces.train), len(faces.validation), len(faces.test)) == (80, 0, 20) and faces.levels == 256
    assert faces.train.dtype == torch.uint8 and faces.train.float().std() > 30
    assert len(torch.cat((faces.train, faces.test)).unique(dim=0)) == 100
    images = _data.gallery(str(folder), tmp_path)
    values = torch.cat((images.train, images.test))
    # the red sides are cut off
    assert (values == values[:, :1]).all() and values[:, 0].sort().values.tolist() == list(range(0, 240, 20))
    again = _data.gallery(str(folder), tmp_path)
    assert torch.equal(images.train, again.train) and torch.equal(images.test, again.test)


@pytest.mark.parametrize("settings", [SETTINGS, CONVOLUTIONAL])
def test_each_loss_trains_its_own_networks(settings):
    torch.manual_seed(0)
    model = bigan_qp.BiGan((2, 3), settings)
    x, z = torch.rand(16, 6) * 2 - 1, torch.randn(16, 4)
    networks = {name: list(getattr(model, name).parameters()) for name in ("generator", "encoder", "critic")}
    trained = lambda: {n for n, ps in networks.items() if any(p.grad is not None for p in ps)}
    bigan_qp.critic_loss(model, x, z, 10.0).backward()
    assert trained() == {"critic"}
    model.zero_grad()
    # with a critic of zeros only the reconstruction terms have gradients
    for parameter in model.critic.parameters():
        torch.nn.init.zeros_(parameter)
    bigan_qp.generator_loss(model, x, z, (1.0, 0.0), settings.noise).backward()
    assert all(p.grad.count_nonzero() for p in networks["encoder"][:1])
    assert not any(p.grad is not None and p.grad.count_nonzero() for p in networks["generator"])
    model.zero_grad()
    bigan_qp.generator_loss(model, x, z, (0.0, 1.0), settings.noise).backward()
    assert all(p.grad.count_nonzero() for p in networks["generator"][:1])
    assert not any(p.grad is not None and p.grad.count_nonzero() for p in networks["encoder"])


def test_baselines_and_neighbours():
    torch.manual_seed(0)
    train = torch.randn(50, 2) @ torch.randn(2, 8)
    mean, linear = bigan_qp.baselines(train, train, [1, 2])
    assert linear[2] < 1e-8 < linear[1] < mean == pytest.approx((train - train.mean(0)).square().mean().item() / 4)
    distance, which = bigan_qp.nearest(train[[7, 3]] + torch.tensor([[0.0], [1e-3]]), train)
    assert which.tolist() == [7, 3] and distance.tolist() == pytest.approx([0, 5e-4], abs=1e-4)


def test_wrong_arguments_give_one_sentence(tmp_path, folder, capsys, monkeypatch):
    out = tmp_path / "x.png"
    assert run("--data", tmp_path / "nowhere", "--out", out) == 1
    assert capsys.readouterr().err == f"demo bigan-qp: --data {tmp_path / 'nowhere'} is not a folder\n"
    assert run("--backend", "vulkan", "--out", out) == 1
    assert "backend: name must be one of" in capsys.readouterr().err
    for number in range(3, 12):
        (folder / f"{number:02}.png").unlink()
    assert run("--data", folder, "--out", out) == 1
    assert f"--data {folder} must hold at least 10 images, got 3" in capsys.readouterr().err
    (folder / "broken.png").write_text("no picture")
    assert run("--data", folder, "--out", out) == 1
    assert "broken.png cannot be read as an image" in capsys.readouterr().err
    monkeypatch.setattr(_data.importlib.util, "find_spec", lambda name: None)
    assert run("--data", "faces", "--out", out) == 1
    assert "the faces of scikit-image are not here; pip install scikit-image" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--steps", 0)
    assert "must be at least 1, got 0" in capsys.readouterr().err
    assert not out.exists()
