"""Schedulers against those of diffusers: same results for the same noise, in its pipelines, saved and loaded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

theirs = pytest.importorskip("diffusers")

from diffusers.schedulers.deprecated.scheduling_sde_vp import ScoreSdeVpScheduler as TheirVp
from diffusers.schedulers.scheduling_sde_ve import ScoreSdeVeScheduler as TheirVe

from pyflow.integrations.diffusers import ScoreSdeVeScheduler, ScoreSdeVpScheduler
from pyflow.ops import sample_seeds
from pyflow.testing import assert_same_bits

SHAPE = (3, 3, 8, 8)


def prepared(scheduler, steps=20):
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_sigmas"):
        scheduler.set_sigmas(steps)
    return scheduler


def injected(monkeypatch, noise, *modules):
    """Make diffusers draw this noise."""
    for module in modules:
        monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", lambda *_, **__: noise)


def draws(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(3)]


def test_ve_steps_reproduce_diffusers_on_its_noise(monkeypatch):
    ours, published = prepared(ScoreSdeVeScheduler(sigma_max=50.0)), prepared(TheirVe(sigma_max=50.0))
    for i, t in enumerate(ours.timesteps):
        x, score, noise = draws(i)
        injected(monkeypatch, noise, "scheduling_sde_ve")
        a = ours.step_correct(score, x, noise=noise).prev_sample
        torch.testing.assert_close(a, published.step_correct(score, x).prev_sample)
        a, b = ours.step_pred(score, t, x, noise=noise), published.step_pred(score, t, x)
        torch.testing.assert_close(a.prev_sample, b.prev_sample)
        torch.testing.assert_close(a.prev_sample_mean, b.prev_sample_mean)
        a, b = (s.step_pred(score, t, x, return_dict=False) for s in (ours, published))
        torch.testing.assert_close(a[1], b[1])
    assert torch.equal(ours.timesteps, published.timesteps) and torch.equal(ours.sigmas, published.sigmas)
    index, (x, _, noise) = torch.tensor([0, 7, 19]), draws(0)
    torch.testing.assert_close(ours.add_noise(x, noise, index), published.add_noise(x, noise, index))
    assert len(ours) == len(published) and ours.init_noise_sigma == published.init_noise_sigma


def test_vp_step_reproduces_diffusers_on_its_noise(monkeypatch):
    ours, published = prepared(ScoreSdeVpScheduler()), prepared(TheirVp())
    for i, t in enumerate(ours.timesteps):
        x, score, noise = draws(i)
        injected(monkeypatch, noise, "deprecated.scheduling_sde_vp")
        for time in (t, t.expand(3)):
            moved = ours.step_pred(score, x, time, noise=noise)
            for a, b in zip(moved, published.step_pred(score, x, time), strict=True):
                # diffusers' std loses four digits at the last times in float32
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
            for a, b in zip(moved, published.step_pred(score.double(), x.double(), time.double()), strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    x, _, noise = draws(0)
    noised = ours.add_noise(x, noise, torch.tensor([0.0, 1.0, 1.0]))
    torch.testing.assert_close(noised[0], x[0])
    torch.testing.assert_close(noised[1:], noise[1:], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_results_have_the_dtype_of_the_sample(dtype):
    ve, vp = prepared(ScoreSdeVeScheduler(sigma_max=50.0)), prepared(ScoreSdeVpScheduler())
    x, score, noise = (part.to(dtype) for part in draws(0))
    t = ve.timesteps[5]
    out = ve.step_pred(score, t, x)
    results = [out.prev_sample, out.prev_sample_mean, ve.step_correct(score, x).prev_sample]
    results += [ve.step_correct(score, x, noise=noise).prev_sample, *vp.step_pred(score, x, t)]
    results += [ve.add_noise(x, n, torch.tensor([0, 1, 2])) for n in (noise, None)]
    results += [vp.add_noise(x, n, torch.tensor([0.1, 0.2, 0.3])) for n in (noise, None)]
    assert {result.dtype for result in results} == {dtype}


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize(
    "pick", [lambda rows: generators(*(rows + 40).tolist()), lambda rows: sample_seeds(9, 3)[rows]]
)
def test_noise_of_a_sample_depends_only_on_its_generator_or_seed(pick):
    rows = torch.arange(3)
    x, score, _ = draws(1)
    runs = []
    for part in (rows, rows[1:2]):
        ve, vp, generator = prepared(ScoreSdeVeScheduler(norm="sample")), prepared(ScoreSdeVpScheduler()), pick(part)
        corrected = ve.step_correct(score[part], x[part], generator=generator).prev_sample
        moved = ve.step_pred(score[part], ve.timesteps[0], corrected, generator=generator).prev_sample
        again = ve.step_pred(score[part], ve.timesteps[0], corrected, generator=generator).prev_sample
        assert not torch.equal(moved, again)
        runs.append((corrected, moved, vp.step_pred(score[part], x[part], vp.timesteps[0], generator=generator)[0]))
    for together, alone in zip(*runs, strict=True):
        assert_same_bits(together[1:2], alone)


def test_set_timesteps_restarts_the_noise_of_a_seed():
    x, score, _ = draws(1)
    scheduler = prepared(ScoreSdeVeScheduler())
    first = scheduler.step_pred(score, scheduler.timesteps[0], x, generator=3).prev_sample
    second = scheduler.step_pred(score, scheduler.timesteps[0], x, generator=3).prev_sample
    assert not torch.equal(first, second)
    prepared(scheduler)
    assert_same_bits(first, scheduler.step_pred(score, scheduler.timesteps[0], x, generator=3).prev_sample)
    torch.manual_seed(0)
    drawn = scheduler.step_pred(score, scheduler.timesteps[0], x).prev_sample
    torch.manual_seed(0)
    assert_same_bits(drawn, scheduler.step_pred(score, scheduler.timesteps[0], x).prev_sample)


def small_unet():
    torch.manual_seed(0)
    return theirs.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, time_embedding_type="fourier",
    )  # fmt: skip


@pytest.mark.parametrize("kind", [ScoreSdeVeScheduler, ScoreSdeVpScheduler])
def test_a_refused_step_draws_no_seed_and_is_not_counted(kind):
    x, wrong = torch.ones(2, 3), torch.ones(1, 3)
    wrong_times = [(torch.full((3,), 0.5), r"must be one number or one per sample, \(2,\), got \(3,\)")]
    if kind is ScoreSdeVeScheduler:
        wrong_times.append((1.5, r"must be in \[0, 1\], got 1.5"))
        wrong_times.append((torch.tensor([0.5, -1.0]), r"must be in \[0, 1\], got -1"))

    def steps(refused, pick):
        scheduler = kind()
        scheduler.set_timesteps(10)
        if kind is ScoreSdeVeScheduler:
            scheduler.set_sigmas(10)
        t, seed = scheduler.timesteps[3], pick()
        take = {
            ScoreSdeVeScheduler: lambda score, t=t: scheduler.step_pred(score, t, x, seed, return_dict=False)[0],
            ScoreSdeVpScheduler: lambda score, t=t: scheduler.step_pred(score, x, t, seed)[0],
        }[kind]
        if refused:
            with pytest.raises(
                ValueError, match=r"^step_pred: (model_output|score) must have the shape of (sample|x), "
            ):
                take(wrong)
            for time, rule in wrong_times:
                with pytest.raises(ValueError, match=f"^step_pred: (timestep|t) {rule}$"):
                    take(x, time)
        return take(x)

    for pick in (lambda: 7, lambda: torch.Generator().manual_seed(7)):
        assert torch.equal(steps(True, pick), steps(False, pick))


def test_the_pipeline_runs_unchanged():
    pipeline = theirs.ScoreSdeVePipeline(small_unet(), ScoreSdeVeScheduler(num_train_timesteps=5, sigma_max=2.0))
    pipeline.set_progress_bar_config(disable=True)
    images = [
        pipeline(batch_size=2, num_inference_steps=5, generator=generators(1, 2), output_type="np").images
        for _ in range(2)
    ]
    assert images[0].shape == (2, 8, 8, 3) and (images[0] == images[1]).all() and images[0].std() > 0
    single = pipeline(batch_size=2, num_inference_steps=3, generator=generators(1)[0], output_type="np").images
    assert single.shape == (2, 8, 8, 3)


def test_a_pipeline_saves_and_loads_with_its_scheduler(tmp_path):
    pipeline = theirs.ScoreSdeVePipeline(small_unet(), ScoreSdeVeScheduler(sigma_max=2.0))
    pipeline.save_pretrained(tmp_path)
    again = theirs.ScoreSdeVePipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is ScoreSdeVeScheduler
    images = []
    for each in (pipeline, again):
        each.set_progress_bar_config(disable=True)
        images.append(each(num_inference_steps=3, generator=generators(1)[0], output_type="np").images)
    # the bits of a network depend on the memory alignment of its weights
    np.testing.assert_allclose(images[0], images[1], rtol=0, atol=1e-5)


def test_config_saves_loads_and_passes_to_diffusers(tmp_path):
    ours = ScoreSdeVeScheduler(snr=0.2, sigma_max=50.0, norm="sample")
    ours.save_pretrained(tmp_path / "ve")
    loaded = ScoreSdeVeScheduler.from_pretrained(tmp_path / "ve")
    assert (loaded.config.snr, loaded.config.sigma_max, loaded.config.norm) == (0.2, 50.0, "sample")
    assert TheirVe.from_pretrained(tmp_path / "ve").config.snr == 0.2
    assert ScoreSdeVeScheduler.from_config(TheirVe(snr=0.3).config).config.snr == 0.3
    ScoreSdeVpScheduler(beta_max=10).save_pretrained(tmp_path / "vp")
    assert ScoreSdeVpScheduler.from_pretrained(tmp_path / "vp").config.beta_max == 10


def test_config_keeps_positional_and_keyword_arguments(tmp_path):
    for given in (ScoreSdeVeScheduler(100, 0.2, 0.02, 50.0, correct_steps=2), ScoreSdeVpScheduler(100, 0.2, 10)):
        names = [name for name in given.config if not name.startswith("_")]
        wanted = [given.config[name] for name in names]
        given.save_pretrained(tmp_path)
        for again in (type(given).from_config(given.config), type(given).from_pretrained(tmp_path)):
            assert [again.config[name] for name in names] == wanted
    ve = ScoreSdeVeScheduler(100, sigma_max=50.0, norm="sample")
    assert TheirVe.from_config(ve.config).config.sigma_max == 50.0
    assert ScoreSdeVeScheduler.from_config(ve.config, snr=0.3).config.snr == 0.3
    assert set(ve.config["_use_default_values"]) == {"snr", "sigma_min", "sampling_eps", "correct_steps"}


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_and_device_change_nothing(default):
    x, score, noise = draws(0)

    def run():
        ve, vp = prepared(ScoreSdeVeScheduler(sigma_max=50.0)), prepared(ScoreSdeVpScheduler())
        ours = [ve.timesteps, ve.sigmas, ve.discrete_sigmas, vp.timesteps]
        for t in (ve.timesteps[7], float(ve.timesteps[7])):
            ours += [ve.step_correct(score, x, 3).prev_sample, ve.step_pred(score, t, x, 3).prev_sample]
            ours.append(vp.step_pred(score, x, t, 3)[0])
        return [*ours, ve.add_noise(x, noise, torch.tensor([0, 7, 19], device="cpu"))]

    wanted = run()
    torch.set_default_dtype(default)
    # stands for an accelerator
    torch.set_default_device("meta")
    try:
        got = run()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for ours, want in zip(got, wanted, strict=True):
        assert_same_bits(ours, want)


def test_noise_of_half_samples_is_added_in_float32():
    vp, (x, _, noise) = ScoreSdeVpScheduler(), draws(0)
    t = torch.tensor(0.501)
    alpha, std = (v.item() for v in vp._sde().marginal(t))
    got = vp.add_noise(x.half(), noise.half(), t)
    assert_same_bits(got, (alpha * x.half().float() + std * noise.half().float()).half())


WRONG = [
    (lambda: ScoreSdeVeScheduler(norm="l2"), ValueError, "ScoreSdeVeScheduler: norm must be one of batch, sample, got 'l2'"),
    (
        lambda: ScoreSdeVpScheduler().step_pred(torch.ones(2, 3), torch.ones(2, 3), 0.5),
        ValueError,
        "step_pred: timesteps are not set, call set_timesteps first",
    ),
    (
        lambda: prepared(ScoreSdeVeScheduler()).step_correct(torch.ones(2, 3), torch.ones(2, 3), generators(1)),
        ValueError,
        "step_correct: generator must have one entry per sample, 2, got 1",
    ),
    (
        lambda: prepared(ScoreSdeVeScheduler()).step_correct(torch.ones(2, 3), torch.ones(2, 3), "seed"),
        TypeError,
        "step_correct: generator must be torch.Generators or seeds, got str",
    ),
    (lambda: ScoreSdeVeScheduler(sigma_min=0.0), ValueError, "set_sigmas: sigma_min must be positive and finite, got 0.0"),
    (
        lambda: ScoreSdeVpScheduler().set_timesteps(0),
        ValueError,
        "set_timesteps: num_inference_steps must be at least 1, got 0",
    ),
    (
        lambda: ScoreSdeVpScheduler().add_noise(torch.ones(2, 3).long(), torch.ones(2, 3), torch.tensor([0.5, 0.5])),
        TypeError,
        "add_noise: original_samples must be float32, float64, bfloat16 or float16, got int64",
    ),
    (
        lambda: prepared(ScoreSdeVeScheduler()).step_correct(torch.ones(1, 3), torch.ones(1, 3), [5]),
        TypeError,
        "step_correct: generator must hold torch.Generators, got int",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), WRONG, ids=[text for _, _, text in WRONG])
def test_wrong_arguments(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text
