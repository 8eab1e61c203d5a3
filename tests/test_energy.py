"""Langevin chains: density, continuation, bar, callback and wrong arguments."""

from __future__ import annotations

import sys

import pytest
import torch

from pyflow import ops, testing
from pyflow.energy import sample


def energy(z):
    return z.square().sum(1) / 2


def start(chains=2000):
    return torch.randn(chains, 2, generator=torch.Generator().manual_seed(0))


def test_variance_of_adjusted_and_unadjusted_chains():
    adjusted = sample(energy, start(), 0.5, steps=30, seed=1, progress=False)
    plain = sample(energy, start(), 0.5, steps=30, seed=1, metropolis=False, progress=False)
    # five standard errors of the variance of 4,000 values
    error = 5 * (2 / 4000) ** 0.5
    assert abs(adjusted.z.var().item() - 1) < error and abs(plain.z.var().item() - 4 / 3) < 4 / 3 * error
    assert 0.5 < adjusted.acceptance.mean() < 1 and (plain.acceptance == 1).all()
    testing.assert_same_bits(adjusted.u, energy(adjusted.z))


def test_chains_can_be_continued_and_do_not_depend_on_the_batch():
    seed, z = ops.sample_seeds(3, 2000), start()
    whole = sample(energy, z, 0.3, steps=10, seed=seed, progress=False)
    half = sample(energy, z, 0.3, steps=5, seed=seed, progress=False)
    rest = sample(energy, half.z, 0.3, steps=5, seed=seed, start=5, progress=False)
    testing.assert_same_bits(rest.z, whole.z)
    alone = sample(energy, z[7:8], 0.3, steps=10, seed=seed[7:8], progress=False)
    testing.assert_same_bits(alone.z, whole.z[7:8])


def test_bar_and_callback(capsys):
    pytest.importorskip("tqdm")
    seen = []
    sample(energy, start(8), 0.3, steps=3, seed=1, start=4, callback=lambda step, z: seen.append((step, z.shape)))
    assert seen == [(4, (8, 2)), (5, (8, 2)), (6, (8, 2))]
    assert "accepted" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"^sample: steps must be at least 1, got 0$"):
        sample(energy, start(8), 0.3, steps=0)


def test_runs_without_tqdm(monkeypatch, capsys):
    wanted = sample(energy, start(8), 0.3, steps=3, seed=1, progress=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    testing.assert_same_bits(sample(energy, start(8), 0.3, steps=3, seed=1).z, wanted.z)
    assert not capsys.readouterr().err


def test_inference_mode_default_dtype_and_device_change_nothing():
    wanted = sample(energy, start(8), 0.3, steps=300, seed=1, progress=False)
    with torch.inference_mode():
        inner = start(8)
        results = [sample(energy, inner, 0.3, steps=300, seed=1, progress=False)]
    results.append(sample(energy, inner, 0.3, steps=300, seed=1, progress=False))
    z = start(8)
    torch.set_default_dtype(torch.bfloat16)
    # stands for an accelerator
    torch.set_default_device("meta")
    try:
        results.append(sample(energy, z, 0.3, steps=300, seed=1, progress=False))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for chains in results:
        for name in ("z", "u", "grad", "acceptance"):
            testing.assert_same_bits(getattr(chains, name), getattr(wanted, name))


def test_callback_writes_do_not_reach_the_chains_and_results_compare_by_identity():
    wanted = sample(energy, start(8), 0.3, steps=5, seed=1, progress=False)
    got = sample(energy, start(8), 0.3, steps=5, seed=1, progress=False, callback=lambda step, z: z.zero_())
    testing.assert_same_bits(got.z, wanted.z)
    assert got != wanted and got == got and len({got, wanted}) == 2


def test_chains_leave_a_wall():
    # infinite energy and gradient 0 outside of a ball
    walled = lambda z: torch.where(z.square().sum(1) < 9, energy(z), torch.inf)
    chains = sample(walled, torch.full((64, 2), 3.0), 0.5, steps=200, seed=0, progress=False)
    assert chains.u.isfinite().all() and (chains.z.square().sum(1) < 9).all()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"steps": 2, "alpha": -1}, ValueError, "alpha must be positive, got -1.0"),
        ({"steps": 2, "callback": 3}, TypeError, "callback must be callable, got int"),
        ({"steps": 2, "start": 2**56}, ValueError, r"start \+ steps must be at most 2\*\*56, got 72057594037927938"),
        ({"steps": 2, "start": -1}, ValueError, "start must be at least 0, got -1"),
        ({"steps": 2, "metropolis": "no"}, TypeError, "metropolis must be true or false, got str"),
        ({"steps": 2, "seed": 0.5}, TypeError, "seed must be an integer or an int64 tensor, got float"),
        ({"steps": 2, "energy_fn": 3}, TypeError, "energy_fn must be callable, got int"),
        ({"steps": 2, "energy_fn": lambda z: 3}, TypeError, "the energy must be a tensor, got int"),
        (
            {"steps": 2, "energy_fn": lambda z: energy(z)[:, None]},
            ValueError,
            r"the energy must have the shape \(8,\), a value per sample, got \(8, 1\): squeeze its last dim",
        ),
        (
            {"steps": 2, "energy_fn": lambda z: energy(z - z[3:4].detach()).sqrt()},
            ValueError,
            "the energy must be a number and its gradient finite at z, not so in chain 3",
        ),
        (
            {"steps": 2, "energy_fn": lambda z: energy(z) * torch.nan},
            ValueError,
            "the energy must be a number and its gradient finite at z, not so in chain 0",
        ),
    ],
)
def test_wrong_arguments(arguments, error, text):
    before = torch.get_rng_state()
    with pytest.raises(error, match=f"^sample: {text}$"):
        sample(arguments.pop("energy_fn", energy), start(8), arguments.pop("alpha", 0.3), **arguments)
    assert torch.equal(torch.get_rng_state(), before)
