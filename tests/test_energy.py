"""Chains on an energy: their density, how they go on, what they report."""

from __future__ import annotations

import pytest
import torch

from pyflow import ops, testing
from pyflow.energy import sample


def energy(z):
    return z.square().sum(1) / 2


def start(chains=2000):
    return torch.randn(chains, 2, generator=torch.Generator().manual_seed(0))


def test_adjusted_chains_have_the_density_and_unadjusted_ones_their_bias():
    adjusted = sample(energy, start(), 0.5, steps=30, seed=1, progress=False)
    plain = sample(energy, start(), 0.5, steps=30, seed=1, metropolis=False, progress=False)
    # of 4,000 values: five standard errors of a variance
    error = 5 * (2 / 4000) ** 0.5
    assert abs(adjusted.z.var().item() - 1) < error and abs(plain.z.var().item() - 4 / 3) < 4 / 3 * error
    assert 0.5 < adjusted.acceptance.mean() < 1 and (plain.acceptance == 1).all()
    testing.assert_same_bits(adjusted.u, energy(adjusted.z))


def test_a_chain_goes_on_where_it_ended_and_the_batch_does_not_matter():
    seed, z = ops.sample_seeds(3, 2000), start()
    whole = sample(energy, z, 0.3, steps=10, seed=seed, progress=False)
    half = sample(energy, z, 0.3, steps=5, seed=seed, progress=False)
    rest = sample(energy, half.z, 0.3, steps=5, seed=seed, start=5, progress=False)
    testing.assert_same_bits(rest.z, whole.z)
    alone = sample(energy, z[7:8], 0.3, steps=10, seed=seed[7:8], progress=False)
    testing.assert_same_bits(alone.z, whole.z[7:8])


def test_the_bar_and_the_callback(capsys):
    pytest.importorskip("tqdm")
    seen = []
    sample(energy, start(8), 0.3, steps=3, seed=1, start=4, callback=lambda step, z: seen.append((step, z.shape)))
    assert seen == [(4, (8, 2)), (5, (8, 2)), (6, (8, 2))]
    assert "accepted" in capsys.readouterr().err
    with pytest.raises(ValueError, match="^sample: steps must be at least 1, got 0$"):
        sample(energy, start(8), 0.3, steps=0)
