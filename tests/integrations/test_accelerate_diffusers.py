"""diffusers' own score-SDE schedulers accelerated: the steps and images of the same random numbers."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch

import pyflow
from pyflow.testing import UNIT

theirs = pytest.importorskip("diffusers")

from diffusers.schedulers.deprecated.scheduling_sde_vp import ScoreSdeVpScheduler
from diffusers.schedulers.scheduling_sde_ve import ScoreSdeVeScheduler

SHAPE = (3, 3, 8, 8)


def twins(kind, steps=20, **options):
    pair = kind(**options), kind(**options)
    for each in pair:
        each.set_timesteps(steps)
        if kind is ScoreSdeVeScheduler:
            each.set_sigmas(steps)
    return *pair, pyflow.accelerate(pair[1])


def draws(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(2)]


GENERATORS = {
    "default": lambda: None,
    "one": lambda: torch.Generator().manual_seed(5),
    "per sample": lambda: [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)],
}


def assert_near(got, want):
    # five roundings of terms that may cancel
    unit = UNIT[want.dtype]
    torch.testing.assert_close(got, want, rtol=8 * unit, atol=16 * unit * want.abs().max().item())


@pytest.mark.parametrize("generator", GENERATORS.values(), ids=GENERATORS)
def test_ve_steps_are_diffusers_on_its_noise(generator):
    own, fast, report = twins(ScoreSdeVeScheduler, sigma_max=50.0)
    x, score = draws()
    for t in (*own.timesteps[::5], own.timesteps[-1], float(own.timesteps[3]), torch.tensor([0.1, 0.5, 1.0])):
        results = []
        for each in (fast, own):
            torch.manual_seed(4)
            moved = each.step_pred(score, t, x, generator())
            corrected = each.step_correct(score, x, generator=generator())
            plain = each.step_pred(score, t, x, generator=generator(), return_dict=False)
            alone = each.step_correct(score, x, generator(), False)
            assert type(moved).__name__ == "SdeVeOutput" and type(corrected).__name__ == "SchedulerOutput"
            results.append([moved.prev_sample, moved.prev_sample_mean, corrected.prev_sample, *plain, *alone])
            results[-1].append(torch.rand(3))
        for got, want in zip(*results, strict=True):
            assert_near(got, want)
    assert report.calls()[0].fast == 28 and not report.calls()[0].fallback


@pytest.mark.parametrize("generator", GENERATORS.values(), ids=GENERATORS)
def test_vp_steps_are_diffusers_on_its_noise(generator):
    own, fast, report = twins(ScoreSdeVpScheduler)
    x, score = draws()
    for t in (*own.timesteps, torch.tensor([0.1, 0.5, 1.0])):
        results = []
        for each in (fast, own):
            torch.manual_seed(4)
            results.append([*each.step_pred(score, x, t, generator()), torch.rand(3)])
        for got, want in zip(*results, strict=True):
            assert_near(got, want)
    assert report.calls()[0].fast == 21 and not report.calls()[0].fallback


def test_gradients_pass_through_a_step():
    for kind in (ScoreSdeVeScheduler, ScoreSdeVpScheduler):
        own, fast, _ = twins(kind)
        grads = []
        for each in (fast, own):
            x, score = (part.requires_grad_() for part in draws())
            t, generator = each.timesteps[4], torch.Generator().manual_seed(1)
            if kind is ScoreSdeVeScheduler:
                y = each.step_correct(score, x, generator).prev_sample
                y = each.step_pred(score, t, y, generator).prev_sample
            else:
                y = each.step_pred(score, x, t, generator)[0]
            grads.append(torch.autograd.grad(y.square().sum(), (x, score)))
        for got, want in zip(*grads, strict=True):
            # the norms of the corrector are sums of 192 products
            torch.testing.assert_close(got, want, rtol=1e-5, atol=200 * UNIT[want.dtype] * want.abs().max().item())


def test_what_a_kernel_does_not_take_runs_as_in_diffusers():
    x, score = draws(dtype=torch.bfloat16)
    own, fast, report = twins(ScoreSdeVeScheduler)
    results = []
    for each in (fast, own):
        moved = each.step_pred(score, each.timesteps[2], x, torch.Generator().manual_seed(1)).prev_sample
        # diffusers leaves bfloat16 here
        assert moved.dtype == torch.float32
        results.append(moved)
    assert torch.equal(*results)
    assert report.calls()[0].reasons == {"sample and model output are not float32": 1}
    x, score = draws()
    results = []
    for each in (fast, own):
        each.get_adjacent_sigma = lambda timesteps, t: torch.zeros(len(t))
        results.append(each.step_pred(score, each.timesteps[2], x, torch.Generator().manual_seed(1)).prev_sample)
    assert torch.equal(*results)
    unset = ScoreSdeVpScheduler()
    pyflow.accelerate(unset)
    with pytest.raises(ValueError, match=r"`self\.timesteps` is not set"):
        unset.step_pred(x, x, torch.tensor(0.5))


def pipeline():
    torch.manual_seed(0)
    unet = theirs.UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, time_embedding_type="fourier",
    )  # fmt: skip
    made = theirs.ScoreSdeVePipeline(unet, ScoreSdeVeScheduler(num_train_timesteps=5, sigma_max=2.0))
    made.set_progress_bar_config(disable=True)
    return made


def test_a_pipeline_draws_the_same_images():
    made = pipeline()
    sample = lambda: torch.from_numpy(
        made(batch_size=2, num_inference_steps=5, generator=torch.Generator().manual_seed(3), output_type="np").images
    )
    want = sample()
    with pyflow.accelerate(made) as report:
        assert [entry.path for entry in report.replaced] == ["scheduler"]
        got = sample()
        assert report.calls()[0].fast == 10
    # ten roundings of a sample near 2, which the network changes a little
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert want.std() > 0 and type(made.scheduler) is ScoreSdeVeScheduler


def test_config_pickles_and_copies_are_diffusers(tmp_path):
    made = pipeline()
    report = pyflow.accelerate(made)
    assert isinstance(made.scheduler, ScoreSdeVeScheduler) and isinstance(made.scheduler, theirs.SchedulerMixin)
    made.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "model_index.json").read_text())
    assert saved["scheduler"] == ["diffusers", "ScoreSdeVeScheduler"]
    config = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "ScoreSdeVeScheduler" and config["sigma_max"] == 2.0
    assert type(theirs.ScoreSdeVePipeline.from_pretrained(tmp_path).scheduler) is ScoreSdeVeScheduler
    assert type(pickle.loads(pickle.dumps(made.scheduler))) is ScoreSdeVeScheduler
    assert type(copy.deepcopy(made.scheduler)) is type(made.scheduler)
    assert ScoreSdeVeScheduler.from_config(made.scheduler.config).config.sigma_max == 2.0
    assert theirs.ScoreSdeVePipeline(**made.components).scheduler is made.scheduler
    report.restore()
    assert type(made.scheduler) is ScoreSdeVeScheduler
