"""MALA steps, gradient penalties and energy losses: the right distribution, the reference, every transform."""

from __future__ import annotations

import math

import pytest
import torch

from pyflow import ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(9,), (0, 4), (4, 0), (3, 1), (33, 63), (5, 2, 7, 3), (700, 3), (2, 20011), (65, 513)]
SEED, STEP = 11, 2**33 + 7


def draw(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def chain(shape, dtype=torch.float32):
    """Arguments of mala_accept of which about half the rows accept."""
    z, grad = draw(shape, dtype), draw(shape, dtype, 1)
    u = draw(shape[:1], seed=4)
    u_new = u + draw(shape[:1], seed=5) + 0.5
    return z, z + 0.1 * draw(shape, dtype, 2), u, u_new, grad, grad + 0.05 * draw(shape, dtype, 3)


def seeds(shape):
    return SEED, ops.sample_seeds(SEED, shape[0])


def normal_energy(z):
    return z.square().flatten(1).sum(1) / 2


# the distribution


def stationary(decide, chains=20000, burn=40, steps=60):
    """Mean over time and chains of z^2 on N(0, 1) at alpha = 1/2, and its standard error over the chains."""
    alpha = 0.5
    z = draw((chains, 1), seed=8)
    total = torch.zeros(chains, dtype=torch.float64)
    for step in range(burn + steps):
        noise = ops.normal(z.shape, seed=SEED, step=step)
        z_new = z - alpha * z + math.sqrt(2 * alpha) * noise
        uniforms = ops.uniform((chains,), seed=SEED, step=step, purpose="accept")
        accepted = uniforms.log() < decide(z, z_new, noise, alpha).flatten()
        z = torch.where(accepted[:, None], z_new, z)
        if step >= burn:
            total += z.flatten().double().square()
    return (total / steps).mean().item(), (total / steps).std().item() / math.sqrt(chains)


def log_q(to, start, alpha):
    """Of the proposal on N(0, 1), whose energy has the gradient z."""
    return -(to - start + alpha * start).square() / (4 * alpha)


def energies(z, z_new):
    return (z.square() - z_new.square()) / 2


# what is published in place of log pi(z') - log pi(z) + log q(z|z') - log q(z'|z), and the variance it leads to
RULES = {
    "correct": (1.0, lambda z, n, noise, a: energies(z, n) + log_q(z, n, a) - log_q(n, z, a)),
    "energies alone": (4 / 7, lambda z, n, noise, a: energies(z, n)),
    "densities of the proposals exchanged": (0.736, lambda z, n, noise, a: energies(z, n) - log_q(z, n, a) + log_q(n, z, a)),
    "every proposal": (4 / 3, lambda z, n, noise, a: torch.full_like(z, torch.inf)),
}


@pytest.mark.parametrize("rule", RULES)
def test_variance_of_published_rules(rule):
    want, decide = RULES[rule]
    got, error = stationary(decide)
    print(rule, got, want, error)


def test_the_variance_is_one():
    z = draw((20000, 1), seed=8)
    u, grad = ops.energy_and_grad(normal_energy, z)
    total, burn, steps = torch.zeros(20000, dtype=torch.float64), 40, 60
    for step in range(burn + steps):
        z, u, grad, _ = ops.mala_step(z, u, grad, normal_energy, 0.5, seed=SEED, step=step)
        if step >= burn:
            total += z.flatten().double().square()
    mean = total / steps
    # chains are independent: five standard errors of their mean
    error = mean.std().item() / math.sqrt(len(z))
    assert error < 0.005 and abs(mean.mean().item() - 1) < 5 * error
