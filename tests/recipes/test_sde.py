"""Short runs of the SDE demo, its likelihoods, timed loops and samples."""

from __future__ import annotations

import argparse
import json
import math

import pytest
import torch

for package in ("matplotlib", "sklearn", "torchdiffeq", "tqdm"):
    pytest.importorskip(package)

from pyflow.flows import bits_per_dim
from pyflow.recipes import _data, _demo, _loops, sde
from pyflow.sde import VPSDE, make_step

SETTINGS = sde.Settings(
    width=16, blocks=1, steps=40, batch=32, warmup=5, sampling_steps=24, samples=32, scored=20, rounds=1, compile=False
)
CPU = torch.device("cpu")


def run(*argv):
    parser = argparse.ArgumentParser()
    sde.add_arguments(parser)
    return sde.run(parser.parse_args([*map(str, argv)]))


@pytest.fixture(autouse=True)
def one_thread():
    """One thread: two that wait for each other on a busy machine take six times as long."""
    with _demo.threads(1):
        yield


@pytest.fixture(scope="module")
def images():
    return _data.load("digits", None)


@pytest.fixture
def net(images):
    torch.manual_seed(0)
    net = sde.ScoreNet(VPSDE(), images, SETTINGS).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(sde, "QUICK", SETTINGS)
    cases = [_loops.Case(case.name, (*case.shape[:1], 64), case.network, 3) for case in _loops.CASES]
    monkeypatch.setattr(_loops, "CASES", cases)


def test_a_seed_repeats_the_run(small, tmp_path, capsys):
    threads, metrics = torch.get_num_threads(), []
    for name in ("a.png", "b.png"):
        out = tmp_path / "pictures" / name
        assert run("--quick", "--seed", 3, "--device", "cpu", "--out", out) == 0
        metrics.append(json.loads(out.with_suffix(".json").read_text()))
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr()
    from matplotlib.image import imread

    picture = imread(out)
    assert picture.shape[0] > 700 and picture.shape[1] > 1000 and picture.std() > 0.1
    got = metrics[0]
    assert got["seed"] == 3 and 2 < got["loss"] < 32
    for row in got["likelihoods"]:
        assert row["bits_per_dim"] == pytest.approx(math.log2(17) - row["nats"] / (64 * math.log(2)), abs=1e-4)
        assert row["digits"] == 20 and 2 < row["bits_per_dim"] < 4 and 0 < row["standard_error"] < 0.5
        assert f"{row['nats']:.2f}" in printed.out and f"{row['bits_per_dim']:.3f}" in printed.out
    assert [row["method"] for row in got["methods"]] == list(sde.METHODS)
    assert [row["scores_per_step"] for row in got["methods"]] == [1, 1, 1, 2, 1]
    for row in got["methods"]:
        assert row["steps_per_second"] > 0 and -0.1 < row["energy_distance"] < 3
    assert len(got["energy_distances_among_digits"]) == 1257 // 32
    assert all(abs(distance) < 0.1 for distance in got["energy_distances_among_digits"])
    for speeds in got["steps_per_second"].values():
        assert set(speeds) == {"eager torch", "pyflow"} and min(speeds.values()) > 0
    assert got["loop_difference"] < 1e-4
    at_once, in_parts, by_reference = got["alone"][0], got["alone"][-2], got["alone"][-1]
    assert at_once["difference"] < 1e-4
    assert in_parts["equal"] and by_reference["equal"] and in_parts["difference"] == 0
    for text in ("equal bit for bit", "not timed", "20 held-out digits", "energy distance", str(out)):
        assert text in printed.out
    assert "loss" in printed.err and "of the noise left" in printed.err and "probability_flow" in printed.err
    for each in metrics:
        for name in ("steps_per_second", "training_seconds", "total_seconds"):
            each.pop(name)
        for row in each["methods"]:
            row.pop("steps_per_second")
    assert metrics[0] == metrics[1]


def test_the_initial_score_is_the_score_of_a_normal(images):
    net = sde.ScoreNet(VPSDE(), images, SETTINGS).eval()
    x = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([1e-3, 0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    alpha, std = (v[:, None] for v in VPSDE().marginal(t))
    # mean and variance of the dequantised digits, scaled to [-1, 1]
    pixels = 2 * (images.train.double() + 0.5) / 17 - 1
    scale = (alpha**2 * (pixels.var(0) + (2 / 17) ** 2 / 12) + std**2).sqrt()
    log_prob = torch.distributions.Normal(alpha * pixels.mean(0), scale).log_prob(x).sum()
    score = torch.autograd.grad(log_prob, x)[0]
    torch.testing.assert_close(net(x.detach().float(), t.float()).double(), score, rtol=2e-4, atol=2e-3)


def test_the_likelihood_of_that_normal_has_the_units_of_demo_nice(images):
    """log_prob accounts for the scaling to [-1, 1]: the closed form is for digits in [0, 1]."""
    net = sde.ScoreNet(VPSDE(), images, SETTINGS).eval()
    x = _data.noisy(images.test, 17, CPU, seed=2)[:6]
    nats = sde.log_prob(VPSDE(), net, x, seed=0)
    alpha, std = VPSDE().marginal(torch.tensor(sde.EPS))
    scale = (alpha**2 * net.variance + std**2).sqrt()
    expected = torch.distributions.Normal((alpha * net.mean + 1) / 2, scale / 2).log_prob(x).sum(1)
    # the prior has mean 0, but 0.007 of the digits' mean is left at t = 1
    torch.testing.assert_close(nats, expected, rtol=0, atol=0.1)
    row = sde.likelihood("normal", nats, images)
    assert row["bits_per_dim"] == pytest.approx(bits_per_dim(nats.mean(), 64, 17).item(), abs=1e-5)


def test_training_raises_the_likelihood_of_the_averaged_weights(images, capsys):
    torch.manual_seed(0)
    net = sde.ScoreNet(VPSDE(), images, SETTINGS)
    average, loss = sde.fit(net, VPSDE(), images, sde.replace(SETTINGS, steps=150), seed=1)
    assert not average.training and loss < 5
    pairs = [*zip(net.parameters(), average.parameters(), strict=True)]
    assert any(not a.equal(b) for a, b in pairs) and all(b.isfinite().all() for _, b in pairs)
    x = _data.noisy(images.test, 17, CPU, seed=2)[:360]
    before = sde.ScoreNet(VPSDE(), images, SETTINGS).eval()
    assert sde.log_prob(VPSDE(), average, x, 0).mean() > sde.log_prob(VPSDE(), before, x, 0).mean() + 1


def test_the_eager_loop_matches_the_sampler(net):
    assert _loops.difference(VPSDE(), net, (6, 64), 40, 1e-3, CPU) < 1e-5


def test_compiled_loops_and_a_missing_compiler(net, monkeypatch, capsys):
    case = _loops.Case("a", (4, 64), True, 3)
    compile, asked = torch.compile, []

    def by_eager(function, **options):
        asked.append(options)
        return compile(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", by_eager)
    options = {"eps": 1e-3, "rounds": 2, "device": CPU}
    paces = _loops.pace(VPSDE(), net, case, compiled=True, **options)
    assert [*paces] == [*_loops.LOOPS] and min(paces.values()) > 0 and asked == [{"fullgraph": True}] * 2
    assert set(_loops.pace(VPSDE(), net, case, compiled=False, **options)) == {"eager torch", "pyflow"}

    def without(function, **options):
        def fail(*args):
            raise RuntimeError("no C++ compiler\nmore")

        return fail

    monkeypatch.setattr(torch, "compile", without)
    paces = _loops.pace(VPSDE(), net, case, compiled=True, **options)
    assert [*paces] == ["eager torch", "pyflow"]
    assert "torch.compile is off: no C++ compiler\n" in capsys.readouterr().err
    assert "not timed" in _loops.table({"a": paces}) and "1.00 x" in _loops.table({"a": paces})


def test_a_sample_drawn_alone_equals_the_one_in_the_batch(net, monkeypatch):
    found = sde.pairs(VPSDE(), net, SETTINGS, 5)
    assert found[0].how == "the batch at once" and found[-1].how.endswith("backend reference")
    for pair in found[-2:]:
        assert pair.of_batch.equal(pair.alone) and pair.said == "equal bit for bit"
    assert found[0].difference < 1e-4
    # with micro_batch=1 equality does not depend on the GEMM
    monkeypatch.setattr(sde, "MICRO_BATCH", 1)
    found = sde.pairs(VPSDE(), net, SETTINGS, 5)
    assert len(found) == 3 and found[1].of_batch.equal(found[1].alone) and found[1].how == "micro_batch=1"
    assert found[1].of_batch.isfinite().all()


def test_pairs_report_their_largest_difference():
    pair = sde.Pair("x", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
    assert pair.difference == 0.5 and pair.said == "largest difference 5.0e-01"


def test_trajectories_end_at_the_sample(net):
    drawn = sde.draw(VPSDE(), net, "ancestral", SETTINGS, 0, columns=5)
    assert drawn.times[0] == 1 and drawn.times[-1] == pytest.approx(sde.EPS) and len(drawn.times) == 5
    assert drawn.states.shape == (5, 64) and drawn.states[-1].equal(drawn.samples[0])
    step = make_step(VPSDE(), net, "ancestral", steps=24, eps=sde.EPS, backend="eager")
    again = step.sample((32, 64), seed=0, progress=False)
    torch.testing.assert_close(drawn.samples, (again + 1) / 2)


def test_energy_distance():
    x, y = torch.randn(2, 400, 3, generator=torch.Generator().manual_seed(0))
    assert abs(sde.energy_distance(x, y)) < 0.03
    assert sde.energy_distance(x, y + 1) > 0.3
    one = torch.tensor([[0.0], [2.0]])
    # 2 * (1 + 3 + 1 + 1) / 4 - 2 - 2
    assert sde.energy_distance(one, one + 1) == pytest.approx(-1)


def test_wrong_arguments_and_backends_give_one_sentence(tmp_path, capsys):
    assert run("--sampling-steps", 20, "--out", tmp_path / "x.png") == 1
    assert capsys.readouterr().err == "demo sde: --sampling-steps must be more than 20, got 20\n"
    assert run("--backend", "vulkan", "--out", tmp_path / "x.png") == 1
    assert "backend: name must be one of" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
    with pytest.raises(SystemExit):
        run("--steps", 0)
    assert "must be at least 1, got 0" in capsys.readouterr().err
